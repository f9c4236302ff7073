"""Vectors by id become the scores of one dataset, and what they were made of, query by query.

    dataset = open_dataset(row, root)                    pipelines.benchmarks: queries, candidates, pools, relevance
    queries = Vectors.join([...])                        of whatever encoded them, in any order and any number of parts
    scored = score_dataset(dataset, queries, candidates)
    write_files(scored, folder)                          rzen.evaluation.files

Whatever is wrong with a dataset or its vectors is a `UserError`, and there is no score. Examples: an id that is missing
or there twice (as padded shards bring), NaN, vectors that are not unit, and collapse. The job reports it and goes on
with the next dataset.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipelines.benchmarks.types import Dataset, Pool, check, read_pool
from pipelines.errors import UserError
from pipelines.items.types import as_ids
from rzen.evaluation.metrics import CUTOFFS, FAMILIES, Relevant, metrics_by_query
from rzen.evaluation.ranking import Kinds, Pairs, Ranked, rank_candidates, rank_pools
from rzen.evaluation.vectors import NONE, IntArray, Vectors, check_block_by_block, check_width


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
    collapsed: tuple[str, ...] = ()
    """Which of queries and candidates are one vector."""

    @property
    def value(self) -> float:
        """The mean of the metric that counts."""
        return self.metrics[self.dataset.row.metric]

    @property
    def remarks(self) -> list[str]:
        """What a reader of the score should know."""
        told = {
            "would have another rank if ties went the other way": self.decided_by_ties,
            "have no relevant candidate in their pool and score 0": self.unanswerable,
        }
        counted = [f"{count} of {len(self.dataset.queries)} queries {what}" for what, count in told.items() if count]
        return [*(f"all {name} have one vector" for name in self.collapsed), *counted, *self.dataset.notes]


def score_dataset(
    dataset: Dataset,
    queries: Vectors,
    candidates: Vectors,
    *,
    pool: Pool | None = None,
    kinds: Kinds | None = None,
    num_top: int = 100,
    device: str = "",
    collapse_is_error: bool = True,
) -> DatasetScores:
    """Score a dataset. Raises `UserError` for whatever would make the scores untrue.

    `num_top` is how many candidates files list. `pool` is what `read_pool` gave for a dataset of the same corpus; it is
    read where it is not given. `kinds` limits the candidates of each query, for queries without pools of their own;
    `kinds.of_N` is in the order of the pool. Without `collapse_is_error`, candidates that are one vector are scored:
    all tie, which counts against the relevant ones, and a remark reports it.
    """
    row = dataset.row
    cutoffs = sorted({*CUTOFFS, *row.cutoffs})
    known = [f"{family}@{k}" for family in FAMILIES for k in cutoffs]
    if row.metric not in known:
        raise UserError(f"{row.name} metric {row.metric!r}", "is not known", f"use one of {', '.join(known)}")
    pool = pool or read_pool(dataset)
    check(dataset, pool)
    query_rows = queries.places(as_ids(query.item.id for query in dataset.queries), f"{row.name} queries")
    candidate_rows = candidates.places(pool.ids, f"{row.name} candidates")
    collapsed = [
        name
        for name, vectors in (("queries", queries), ("candidates", candidates))
        if check_block_by_block(vectors.rows, f"{row.name} {name}", collapse_is_error=collapse_is_error)
    ]
    check_width(queries.rows, candidates.rows.shape[1], f"{row.name} queries")
    place_of = _IdIndex(pool.ids, candidate_rows)
    relevant = _relevant(dataset, place_of)
    asked_QD = queries.rows[query_rows]
    if dataset.queries[0].pool is None:
        excluded = _excluded(dataset, place_of)
        by_row = None if kinds is None else replace(kinds, of_N=kinds.of_N[np.argsort(candidate_rows)])
        ranked = rank_candidates(
            asked_QD, candidates.rows, relevant, excluded=excluded, kinds=by_row, num_top=num_top, device=device
        )
    else:
        pools = [place_of.rows(id for id in query.pool or () if id not in query.excluded) for query in dataset.queries]
        ranked = rank_pools(asked_QD, candidates.rows, relevant, pools, num_top=num_top, device=device)
    by_query = metrics_by_query(relevant, ranked.rank, cutoffs)
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
        collapsed=tuple(collapsed),
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


def _excluded(dataset: Dataset, places: _IdIndex) -> Pairs:
    pairs = [(number, id) for number, query in enumerate(dataset.queries) for id in query.excluded]
    return Pairs(np.array([number for number, _ in pairs], dtype=np.int64), places.rows(id for _, id in pairs))


def _decided_by_ties(relevant: Relevant, ranked: Ranked) -> int:
    best = np.full(relevant.num_queries, np.iinfo(np.int64).max)
    np.minimum.at(best, relevant.query, ranked.rank)
    is_best = ranked.rank == best[relevant.query]
    return int((is_best & (ranked.tied > 0)).sum())
