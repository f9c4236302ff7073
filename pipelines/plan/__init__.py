"""Which samples form each global batch: pure functions of sources, settings, seed and step."""
