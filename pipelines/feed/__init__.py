"""Batches of a plan: a reader without Ray, and the same on Ray Data."""
