"""Several datasets as one: the queries of all, and the candidates of all in one pool, as people search an index.

A candidate of equal content is relevant wherever a relevant one is, whatever dataset or instruction brings it. A
candidate that shows what the query shows is excluded, unless it is relevant. Pools of single queries do not count.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.benchmarks.types import Dataset, Pool, Query, Row
from pipelines.items.types import ID, Item

NAME = "mixed pool"
_COLUMNS = np.dtype([("id", ID), ("content", ID), ("modality", ID)])


@dataclass(frozen=True, slots=True)
class JoinedDatasets:
    """The joined `dataset` and its `pool`.

    `places` has, for each dataset by name, the place of each of its queries among the joined ones, `[Q]`. `modalities`
    are modality -> number of candidates, in the order that `modality_N` counts in: that of each candidate, `[N]`.
    `asked` has the modalities that each dataset by name asks for: those of its own candidates.
    """

    dataset: Dataset
    pool: Pool
    places: dict[str, npt.NDArray[np.int64]]
    modalities: dict[str, int]
    modality_N: npt.NDArray[np.int64]  # noqa: N815  a shape
    asked: dict[str, frozenset[str]]


def join_datasets(datasets: Sequence[Dataset]) -> JoinedDatasets:
    """Return all as one. Reads the candidates of each corpus once, and keeps about 100 bytes of each."""
    candidates = _Candidates(list({dataset.corpus: dataset for dataset in datasets}.values()))
    queries: dict[str, Query] = {}
    places: dict[str, npt.NDArray[np.int64]] = {}
    for dataset in datasets:
        for query in dataset.queries:
            joined = candidates.widened(query)
            same = queries.get(query.item.id)  # one question with answers in two datasets
            queries[query.item.id] = joined if same is None else _merged(same, joined)
        numbers = {id: number for number, id in enumerate(queries)}
        places[dataset.row.name] = np.array([numbers[query.item.id] for query in dataset.queries], np.int64)
    row = Row(NAME, datasets[0].row.suite, "mixed", NAME, "global", "hit@1", None, "joined")
    # Each dataset is checked on its own for the instructions of its candidates.
    pool = Pool(candidates.ids, frozenset())
    modalities, modality_N = candidates.modalities()
    asked = {dataset.row.name: candidates.modalities_of(dataset.corpus) for dataset in datasets}
    whole = Dataset(row, list(queries.values()), candidates, NAME)
    return JoinedDatasets(whole, pool, places, modalities, modality_N, asked)


def _merged(first: Query, second: Query) -> Query:
    relevance = {**first.relevance, **second.relevance}
    excluded = {*first.excluded, *second.excluded} - relevance.keys()
    return replace(first, relevance=relevance, excluded=tuple(sorted(excluded)))


class _Candidates:
    """The distinct candidates of datasets of different corpora: a stream, and the ids in its order, `[N]`."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._datasets = datasets
        columns = [np.fromiter(_rows_of(dataset), dtype=_COLUMNS) for dataset in datasets]
        self._modalities = {
            dataset.corpus: frozenset(name.decode() for name in np.unique(some["modality"]).tolist())
            for dataset, some in zip(datasets, columns, strict=True)
        }
        self._starts = np.cumsum([0, *map(len, columns)])
        table = np.concatenate(columns)
        self._kept = np.sort(np.unique(table["id"], return_index=True)[1])
        self._table = table[self._kept]
        self._by_id = np.argsort(self.ids)
        self._by_content = np.argsort(self._table["content"], kind="stable")

    @property
    def ids(self) -> npt.NDArray[np.bytes_]:
        """Return the id of each candidate."""
        ids: npt.NDArray[np.bytes_] = self._table["id"]
        return ids

    def __iter__(self) -> Iterator[Item]:
        kept = set(self._kept.tolist())
        everything = (item for dataset in self._datasets for item in dataset.candidates)
        return (item for number, item in enumerate(everything) if number in kept)

    def pick(self, places: Collection[int]) -> dict[int, Item]:
        """Return the candidates at these places."""
        found: dict[int, Item] = {}
        wanted = np.array(sorted(places), np.int64)
        numbers = self._kept[wanted]
        owners = np.searchsorted(self._starts, numbers, side="right") - 1
        for owner in np.unique(owners).tolist():
            mine = owners == owner
            inside = (numbers[mine] - self._starts[owner]).tolist()
            items = self._datasets[owner].pick(inside)
            found |= {place: items[at] for place, at in zip(wanted[mine].tolist(), inside, strict=True)}
        return found

    def modalities(self) -> tuple[dict[str, int], npt.NDArray[np.int64]]:
        """Return modality -> number of candidates, and the place in it of each candidate's own, `[N]`."""
        names, own_N, counts = np.unique(self._table["modality"], return_inverse=True, return_counts=True)
        found = {name.decode(): count for name, count in zip(names.tolist(), counts.tolist(), strict=True)}
        return found, own_N.astype(np.int64)

    def modalities_of(self, corpus: str) -> frozenset[str]:
        """Return the modalities that a corpus has candidates of."""
        return self._modalities[corpus]

    def widened(self, query: Query) -> Query:
        """Return the query with every candidate that has the content of a relevant one, and without a pool."""
        relevance: dict[str, float] = {}
        for id, grade in query.relevance.items():
            for same in self._same_content(self._content_of(id)):
                relevance[same] = max(grade, relevance.get(same, 0.0))
        shown = {*query.excluded, *self._same_content(query.item.content.encode())}
        return Query(query.item, relevance, None, tuple(sorted(shown - relevance.keys())))

    def _content_of(self, id: str) -> bytes:
        place = self._by_id[np.searchsorted(self.ids, id.encode(), sorter=self._by_id)]
        content: bytes = self._table["content"][place]
        return content

    def _same_content(self, content: bytes) -> list[str]:
        contents = self._table["content"]
        first, last = (
            int(np.searchsorted(contents, content, side=side, sorter=self._by_content)) for side in ("left", "right")
        )
        return [id.decode() for id in self.ids[self._by_content[first:last]].tolist()]


def _rows_of(dataset: Dataset) -> Iterator[tuple[Any, ...]]:
    return ((item.id.encode(), item.content.encode(), item.modality.encode()) for item in dataset.candidates)
