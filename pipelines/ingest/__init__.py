"""Jobs that make a dataset: raw files to shards, and external shards to an index."""
