"""Items become vectors that are kept: one engine for all jobs."""
