"""Inputs to embed, each with an id of its content: what they are, where their bytes are, and how they are decoded."""
