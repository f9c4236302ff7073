"""From vectors by id to the scores of one benchmark dataset, and what they were made of, query by query.

    dataset = open_dataset(row, root)                    pipelines.benchmarks: queries, candidates, pools, relevance
    queries = Vectors.join([...])                        of whatever encoded them, in any order and any number of parts
    scored = score_dataset(dataset, queries, candidates)
    write_files(scored, folder)                          rzen.evaluation.files

Whatever is wrong with a dataset or its vectors is a `UserError`, and no score: an id that is missing or there twice (as
padded shards bring), NaN, vectors that are not unit, and collapse. A run reports it and goes on with the next dataset.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.benchmarks.types import Dataset, Pool, as_ids, check, read_pool
from pipelines.errors import UserError
from rzen.evaluation.metrics import METRIC_NAMES, Relevant, metrics_by_query
from rzen.evaluation.scoring import Ranked, rank_candidates, rank_pools
from rzen.evaluation.vectors import NONE, FloatArray, IntArray, check_block_by_block


@dataclass(frozen=True, slots=True)
class Vectors:
    """Unit vectors `[N, D]` of any float type, memory-mapped if they are many, and their ids `[N]` (as bytes)."""

    ids: npt.NDArray[np.bytes_]
    rows: FloatArray

    @classmethod
    def of(cls, ids: Iterable[str], rows: FloatArray) -> Vectors:
        return cls(as_ids(ids), rows)

    @classmethod
    def join(cls, parts: Sequence[tuple[Iterable[str], FloatArray]]) -> Vectors:
        """Of several shards, in memory. Padding must have been cut off: an id that came twice is an error later."""
        ids = np.concatenate([as_ids(ids) for ids, _ in parts])
        return cls(ids, np.concatenate([rows for _, rows in parts]))

    def places(self, wanted: npt.NDArray[np.bytes_], place: str) -> IntArray:
        """Rows of the wanted ids, which must be all that there are, each once. Raises `UserError` otherwise."""
        if len(self.ids) != len(self.rows):
            raise UserError(place, f"{len(self.ids)} ids for {len(self.rows)} vectors", "repair the encoding")
        order = np.argsort(self.ids)
        known = self.ids[order]
        for wrong, problem in (
            (known[1:][known[1:] == known[:-1]], "came twice"),
            (np.setdiff1d(wanted, known), "did not come back"),
            (np.setdiff1d(known, wanted), "was not asked for"),
        ):
            if len(wrong):
                fix = "encode it again, and cut off what pads the shards"
                raise UserError(f"{place} {wrong[0].decode()}", f"{problem} ({len(wrong)} such ids)", fix)
        return order[np.searchsorted(known, wanted)]


@dataclass(frozen=True, slots=True)
class DatasetScores:
    """The scores of a dataset: means over its queries (`metrics`), and each query's own, `[Q]`.

    `names` has the benchmark's name of every candidate that the files mention, by its row. `unanswerable` queries have
    no relevant candidate in their pool and score 0. `decided_by_ties` queries would have another rank of their best
    relevant candidate if ties went the other way.
    """

    dataset: Dataset
    metrics: dict[str, float]
    by_query: dict[str, npt.NDArray[np.float64]]
    relevant: Relevant
    ranked: Ranked
    names: dict[int, str]
    modalities: dict[int, str]
    num_candidates: int
    unanswerable: int
    decided_by_ties: int

    @property
    def value(self) -> float:
        """Of the metric that counts."""
        return self.metrics[self.dataset.row.metric]

    @property
    def remarks(self) -> list[str]:
        """What a reader of the score should know."""
        told = {
            "would have another rank if ties went the other way": self.decided_by_ties,
            "have no relevant candidate in their pool and score 0": self.unanswerable,
        }
        return [f"{count} of {len(self.dataset.queries)} queries {what}" for what, count in told.items() if count]


def score_dataset(
    dataset: Dataset,
    queries: Vectors,
    candidates: Vectors,
    *,
    pool: Pool | None = None,
    num_top: int = 100,
    device: str = "",
) -> DatasetScores:
    """Raises `UserError` for whatever would make the scores untrue. `num_top` is how many candidates files list.

    `pool` is what `read_pool` gave for a dataset of the same corpus; it is read where it is not given.
    """
    row = dataset.row
    if row.metric not in METRIC_NAMES:
        raise UserError(f"{row.name} metric {row.metric!r}", "is not known", f"use one of {', '.join(METRIC_NAMES)}")
    pool = pool or read_pool(dataset)
    check(dataset, pool)
    query_rows = queries.places(as_ids(query.item.id for query in dataset.queries), f"{row.name} queries")
    candidate_rows = candidates.places(pool.ids, f"{row.name} candidates")
    check_block_by_block(queries.rows, f"{row.name} queries")
    check_block_by_block(candidates.rows, f"{row.name} candidates")
    widths = queries.rows.shape[1], candidates.rows.shape[1]
    if widths[0] != widths[1]:
        problem = f"has queries of width {widths[0]} and candidates of width {widths[1]}"
        raise UserError(row.name, problem, "encode both with one model")
    place_of = _IdIndex(pool.ids, candidate_rows)
    relevant = _relevant(dataset, place_of)
    asked_QD = queries.rows[query_rows]
    if dataset.queries[0].pool is None:
        ranked = rank_candidates(asked_QD, candidates.rows, relevant, num_top=num_top, device=device)
    else:
        pools = [place_of.rows(query.pool or ()) for query in dataset.queries]
        ranked = rank_pools(asked_QD, candidates.rows, relevant, pools, num_top=num_top, device=device)
    by_query = metrics_by_query(relevant, ranked.rank)
    mentioned = np.concatenate([relevant.row, ranked.rows[ranked.rows != NONE]])
    places = np.flatnonzero(np.isin(candidate_rows, mentioned)).tolist()
    shown = {int(candidate_rows[place]): item for place, item in dataset.pick(places).items()}
    return DatasetScores(
        dataset=dataset,
        metrics={name: float(values.mean()) for name, values in by_query.items()},
        by_query=by_query,
        relevant=relevant,
        ranked=ranked,
        names={number: item.name for number, item in shown.items()},
        modalities={number: item.modality for number, item in shown.items()},
        num_candidates=len(pool.ids),
        unanswerable=int((relevant.count() == 0).sum()),
        decided_by_ties=_decided_by_ties(relevant, ranked),
    )


class _IdIndex:
    """Rows of the vectors by id, found by bisection: a dictionary of ten million ids is a gigabyte."""

    def __init__(self, ids: npt.NDArray[np.bytes_], rows: IntArray) -> None:
        order = np.argsort(ids)
        self._ids, self._rows = ids[order], rows[order]

    def rows(self, ids: Iterable[str]) -> IntArray:
        found: IntArray = self._rows[np.searchsorted(self._ids, as_ids(ids))]
        return found


def _relevant(dataset: Dataset, places: _IdIndex) -> Relevant:
    pairs = [(number, *pair) for number, query in enumerate(dataset.queries) for pair in query.relevance.items()]
    return Relevant(
        np.array([number for number, _, _ in pairs], dtype=np.int64),
        places.rows(id for _, id, _ in pairs),
        np.array([grade for _, _, grade in pairs], dtype=np.float64),
        len(dataset.queries),
    )


def _decided_by_ties(relevant: Relevant, ranked: Ranked) -> int:
    best = np.full(relevant.num_queries, np.iinfo(np.int64).max)
    np.minimum.at(best, relevant.query, ranked.rank)
    is_best = ranked.rank == best[relevant.query]
    return int((is_best & (ranked.tied > 0)).sum())
