"""HTML reports that open offline: searches, scores, curves and settings in one file."""
