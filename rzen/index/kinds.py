"""Names of the kinds of index, which the command line and specs offer."""

from __future__ import annotations

from typing import Literal, get_args

IndexKind = Literal["exact", "lance", "faiss_sq8", "faiss_rabitq", "qdrant"]
"""`exact` compares with every vector. `lance` is a LanceDB table, and `qdrant` a collection of a Qdrant server. The
others are resident in memory."""
INDEX_KINDS: tuple[IndexKind, ...] = get_args(IndexKind)
LOCAL_KINDS = tuple(kind for kind in INDEX_KINDS if kind != "qdrant")
"""Kinds that need no server. Their files are next to the vectors."""
