"""Held-out scores of an embedder while it trains: each query is searched as an evaluation does.

The queries of a source are searched among the targets of its samples, and ties count against the relevant ones
(`rzen.evaluation.ranking`).

Shapes: S samples, Q queries, N candidates, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rzen.evaluation.metrics import Relevant
from rzen.evaluation.ranking import Pairs, rank_candidates
from rzen.evaluation.vectors import FloatArray, IntArray
from rzen.inputs.pairs import EncodedPairs
from rzen.inputs.processor import EncodedBatch
from rzen.training.held_out import HeldOutShare, gathered
from rzen.training.held_out_scores import SourceScore

Embed = Callable[[Sequence[EncodedBatch]], FloatArray]
"""Returns the vectors of all inputs of some batches in order, fp32 `[N, D]`. A collective."""


def score(embed: Embed, shares: Mapping[str, HeldOutShare], *, device: str = "") -> dict[str, SourceScore]:
    """Return the score of each source that has samples. Ranks other than 0 return nothing. A collective."""
    parts = gathered(dict(zip(shares, _own_samples(embed, shares), strict=True)))
    joined = {source: _join([part[source] for part in parts]) for source in shares if parts}
    return {source: _search(some, device) for source, some in joined.items() if len(some.rows)}


@dataclass(frozen=True)
class _Samples:
    """Samples of a source: row in the split, ids and vectors of both inputs."""

    rows: IntArray
    asked: IntArray
    """`[S, 2]`: content and instruction of the query."""
    target_ids: IntArray
    queries: FloatArray
    targets: FloatArray
    """Vectors, `[S, D]`."""


def _own_samples(embed: Embed, shares: Mapping[str, HeldOutShare]) -> Iterator[_Samples]:
    batches = [
        batch for share in shares.values() if share.samples for batch in (share.samples.queries, share.samples.targets)
    ]
    # Vectors that are not finite would tie with nothing, and rank first. Zeros tie with everything, and rank last.
    vectors = np.nan_to_num(embed(batches), nan=0.0, posinf=0.0, neginf=0.0)
    start = 0
    for share in shares.values():
        pairs: EncodedPairs | None = share.samples
        size = len(share.rows)
        ids = np.zeros((0, 3), np.int64)
        if pairs is not None:
            ids = np.stack([pairs.query_ids, pairs.instruction_ids, pairs.target_ids], axis=1)
        queries_SD, targets_SD = vectors[start : start + size], vectors[start + size : start + 2 * size]
        yield _Samples(np.array(share.rows, np.int64), ids[:, :2], ids[:, 2], queries_SD, targets_SD)
        start += 2 * size


def _join(parts: Sequence[_Samples]) -> _Samples:
    """Return the samples of all ranks by their rows, so that the number of ranks does not decide their order."""
    parts = [part for part in parts if len(part.rows)] or list(parts[:1])
    order = np.argsort(np.concatenate([part.rows for part in parts]))

    def joined(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(part, name) for part in parts])[order]

    return _Samples(*(joined(name) for name in ("rows", "asked", "target_ids", "queries", "targets")))


def _search(samples: _Samples, device: str) -> SourceScore:
    """Search each distinct query among the distinct targets. A target that shows what the query shows is excluded."""
    _, candidate_rows, candidate_S = np.unique(samples.target_ids, return_index=True, return_inverse=True)
    asked_Q2, query_rows, query_S = np.unique(samples.asked, axis=0, return_index=True, return_inverse=True)
    pairs = np.unique(np.stack([query_S.ravel(), candidate_S.ravel()], axis=1), axis=0)
    relevant = Relevant(pairs[:, 0], pairs[:, 1], np.ones(len(pairs)), len(query_rows))
    content = samples.target_ids[candidate_rows]
    itself = np.stack(np.nonzero(asked_Q2[:, :1] == content), axis=1)
    answers = set(map(tuple, pairs.tolist()))
    excluded = np.array([pair for pair in itself.tolist() if tuple(pair) not in answers], np.int64).reshape(-1, 2)
    ranked = rank_candidates(
        samples.queries[query_rows],
        samples.targets[candidate_rows],
        relevant,
        excluded=Pairs(excluded[:, 0], excluded[:, 1]),
        num_top=1,
        device=device,
    )
    rank_Q = np.full(len(query_rows), np.iinfo(np.int64).max)
    np.minimum.at(rank_Q, relevant.query, ranked.rank)
    return {
        "hit": float((rank_Q == 1).mean()),
        "candidates": len(candidate_rows),
        "queries": samples.rows[query_rows].tolist(),
        "ranks": rank_Q.tolist(),
        "found": samples.rows[candidate_rows[ranked.rows[:, 0]]].tolist(),
    }
