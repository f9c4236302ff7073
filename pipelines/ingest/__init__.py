"""Raw files to shards, and indices of external shards, as Ray tasks."""
