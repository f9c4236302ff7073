"""Public benchmarks, custom datasets and splits as queries, candidates and relevance: a table of rows, and readers."""
