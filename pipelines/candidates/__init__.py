"""Candidates of each sample next to a dataset: mined, scored, chosen, clustered. The shards stay as they are."""
