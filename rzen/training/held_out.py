"""Held-out scores while a run trains: a small, fixed set of samples is searched as an evaluation does.

The queries of a source are searched among the targets of its samples, and ties count against the relevant ones
(`rzen.evaluation.ranking`). Accuracy inside a training batch is another number: a model may reach 80% there that finds
nothing in a search.

Scoring changes no weights. The model draws no random numbers while it is scored (tests/integration/test_training.py).

Shapes: S samples, Q queries, N candidates, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from rzen.evaluation.metrics import Relevant
from rzen.evaluation.ranking import Pairs, rank_candidates
from rzen.evaluation.vectors import FloatArray, IntArray
from rzen.inputs.pairs import EncodedPairs
from rzen.inputs.processor import EncodedBatch
from rzen.model.chunks import chunks_of
from rzen.training.held_out_scores import HeldOutRow, SourceScore

if TYPE_CHECKING:
    from rzen.training.step import EmbeddingLearner

# Tokens that are read at once where the run has no `chunk_tokens`. Without gradients that is little memory.
CHUNK_TOKENS = 8192


@dataclass(frozen=True)
class HeldOutShare:
    """One rank's samples of a source, with their rows in the split, as `held_out` of the encoder makes them.

    `samples` is None if it has none.
    """

    rows: Sequence[int]
    samples: Any


@dataclass(frozen=True)
class HeldOut:
    """What is scored, and how often: before the first step, every few steps, and after the last one."""

    every_steps: int
    read: Callable[[], Mapping[str, HeldOutShare]]
    """Return this rank's share of each source, the same sources on all ranks. It is called once."""


class HeldOutScorer:
    """Scores the model when it is due. Every rank has one. `on_scores` is called on rank 0."""

    def __init__(
        self, engine: Any, held_out: HeldOut | None, *, num_steps: int, on_scores: Callable[[HeldOutRow], None]
    ) -> None:
        self._engine = engine
        self._held_out = held_out
        self._num_steps = num_steps
        self._on_scores = on_scores
        self._shares: Mapping[str, HeldOutShare] | None = None

    def after(self, done: int) -> None:
        """Score the weights after `done` steps, if that is due. A collective."""
        if self._held_out is None or (done % self._held_out.every_steps and done != self._num_steps):
            return
        began_s = time.perf_counter()
        if self._shares is None:
            self._shares = self._held_out.read()
        self._engine.eval()
        sources = self._engine.module.score(self._shares)
        self._engine.train()
        if sources:
            hit = float(np.mean([source["hit"] for source in sources.values()]))
            self._on_scores(
                {"step": done, "hit": hit, "seconds": round(time.perf_counter() - began_s, 2), "sources": sources}
            )


def score(learner: EmbeddingLearner, shares: Mapping[str, HeldOutShare]) -> dict[str, SourceScore]:
    """Return the score of each source that has samples. Ranks other than 0 return nothing. A collective."""
    own = dict(zip(shares, _own_samples(learner, shares), strict=True))
    parts: list[dict[str, _Samples]] = [own]
    if dist.is_initialized():
        parts = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, own)
        if dist.get_rank() != 0:
            return {}
    joined = {source: _join([part[source] for part in parts]) for source in shares}
    return {source: _search(some, learner) for source, some in joined.items() if len(some.rows)}


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


def _own_samples(learner: EmbeddingLearner, shares: Mapping[str, HeldOutShare]) -> Iterator[_Samples]:
    batches = [
        batch for share in shares.values() if share.samples for batch in (share.samples.queries, share.samples.targets)
    ]
    vectors = _embed(learner, batches)
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


@torch.no_grad()
def _embed(learner: EmbeddingLearner, batches: Sequence[EncodedBatch]) -> FloatArray:
    """Return the vectors of all inputs in order, fp32. All ranks call the model equally often where they must."""
    if not batches and not learner.blanks:
        return np.zeros((0, 0), np.float32)
    lengths = np.concatenate([np.zeros(0, np.int32), *(batch.lengths for batch in batches)])
    inputs = [single for batch in batches for single in batch.split()]
    chunks = chunks_of(lengths, learner.chunk_tokens or CHUNK_TOKENS, packed=learner.embedder.packs)
    vectors: FloatArray = learner.embed(inputs, chunks).float().cpu().numpy()
    # Vectors that are not finite would tie with nothing, and rank first. Zeros tie with everything, and rank last.
    return np.nan_to_num(vectors, nan=0.0, posinf=0.0, neginf=0.0)


def _join(parts: Sequence[_Samples]) -> _Samples:
    """Return the samples of all ranks by their rows, so that the number of ranks does not decide their order."""
    parts = [part for part in parts if len(part.rows)] or list(parts[:1])
    order = np.argsort(np.concatenate([part.rows for part in parts]))

    def joined(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(part, name) for part in parts])[order]

    return _Samples(*(joined(name) for name in ("rows", "asked", "target_ids", "queries", "targets")))


def _search(samples: _Samples, learner: EmbeddingLearner) -> SourceScore:
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
        device=str(learner.embedder.image_mean.device),
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
