"""Jobs that run other jobs."""
