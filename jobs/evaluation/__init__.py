"""Jobs that score models."""
