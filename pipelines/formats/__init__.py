"""Shards to the formats of other libraries, and back."""
