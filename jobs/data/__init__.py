"""Jobs that make datasets."""
