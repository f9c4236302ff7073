"""Indices over the vectors of a corpus: exact, LanceDB on a disk or in a bucket, FAISS in memory, a Qdrant server."""
