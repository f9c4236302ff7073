"""Retrieval metrics, the task table, and the report a reader can check."""
