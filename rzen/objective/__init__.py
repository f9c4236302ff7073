"""The training objective, and the gather that makes it one across ranks."""
