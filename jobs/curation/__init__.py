"""Which samples training leaves out: duplicates, leakage, pairs that do not fit, and limits."""
