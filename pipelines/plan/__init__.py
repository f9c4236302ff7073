"""Which samples form each global batch: a pure function without Ray, files or time."""
