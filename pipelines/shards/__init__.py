"""Shards on disk: tar files, indices, manifests, and what is known of external shards."""
