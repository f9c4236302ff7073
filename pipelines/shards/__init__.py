"""Shards on disk: tars, indices and manifests, and what is known about external shards."""
