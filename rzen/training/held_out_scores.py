"""Held-out scores as a run keeps them. Read by processes without torch."""

from __future__ import annotations

from typing_extensions import TypedDict

from pipelines.stored_json import stored_file


@stored_file
class SourceScore(TypedDict):
    """How the queries of a source did. A row is the number of a sample in the split."""

    hit: float
    """Queries whose first candidate is relevant, as a share."""
    candidates: int
    """Number of distinct targets that each query was searched among."""
    queries: list[int]
    """Row of each distinct query."""
    ranks: list[int]
    """Rank of its first relevant candidate, from 1."""
    found: list[int]
    """Row of the first candidate."""


@stored_file
class HeldOutRow(TypedDict):
    """The score of the weights after `step` steps: `hit` is the mean over the sources, scoring took `seconds`."""

    step: int
    hit: float
    seconds: float
    sources: dict[str, SourceScore]
