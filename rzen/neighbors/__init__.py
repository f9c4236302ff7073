"""Nearest neighbors among many vectors: exact in blocks, and approximate by inverted lists."""
