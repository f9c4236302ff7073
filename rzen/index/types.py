"""What an index is: the columns of its rows, its entry in `vectors.json`, and how it is searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, Protocol

from typing_extensions import TypedDict

from pipelines.config import NonNegativeInt
from pipelines.stored_json import stored_file
from rzen.evaluation.vectors import FloatArray
from rzen.index.filters import Condition
from rzen.index.kinds import IndexKind

LARGE = 200_000
"""Vectors above which a corpus gets a LanceDB table by default: exact search then takes 30 ms and more."""
INDEX = "index"
"""Folder of the indices of a corpus."""
KEY = "target_sha256"
"""Column with the content of a target. Of equal targets, a search finds the first one."""
Row = dict[str, Any]
"""A row of a corpus without its vector, and its `score`, the cosine with the query in fp32."""


@stored_file
class IndexEntry(TypedDict):
    """An index of a version of the vectors: its kind and its folder.

    `version` is that of a LanceDB table, or of a collection in Qdrant.
    """

    kind: IndexKind
    path: str
    version: NotRequired[NonNegativeInt]
    trained_rows: NotRequired[NonNegativeInt]
    """Rows on which the table's index was trained, 0 for a table that is scanned."""


@dataclass(frozen=True, slots=True)
class TargetPlace:
    """A target: number `index` of `source` in a split of the dataset. Of a video, the segment from `start_s` on."""

    split: str
    source: str
    index: int
    start_s: float | None = None


class CorpusIndex(Protocol):
    """Finds the vectors of a corpus that are nearest to a query."""

    @property
    def kind(self) -> IndexKind:
        """Return which index it is."""

    def search(self, queries_QD: FloatArray, k: int, conditions: Sequence[Condition] = ()) -> list[list[Row]]:
        """Return the k best rows of each query that fulfill all conditions, best first. Equal targets come once."""


def distinct(rows: Sequence[Row], k: int) -> list[Row]:
    """Return the k best of these rows by score, each target once. Equal scores keep the order of the corpus."""
    ordered = sorted(rows, key=lambda row: (-row["score"], row["split"], row["source"], row["index"]))
    found: dict[str, Row] = {}
    for row in ordered:
        found.setdefault(row[KEY], row)
    return list(found.values())[:k]
