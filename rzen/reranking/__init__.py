"""Re-rankers: one model reads a query together with a document, and says how well they fit."""
