"""Indices over the vectors of a corpus: exact search, LanceDB tables on a disk or in a bucket, FAISS in memory."""
