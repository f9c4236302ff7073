"""Judges: scores of candidates by a re-ranker, or by a model behind an endpoint."""
