"""Jobs that train, and everything about one run."""
