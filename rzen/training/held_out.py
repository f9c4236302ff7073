"""Held-out scores while a run trains: a small, fixed set of samples is searched.

Accuracy inside a training batch is another number: a model may reach 80% there that finds nothing in a search.

Scoring changes no weights. The model draws no random numbers while it is scored (tests/integration/test_training.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from rzen.training.held_out_scores import HeldOutRow

# Tokens that are read at once where the run has no `chunk_tokens`. Without gradients that is little memory.
CHUNK_TOKENS = 8192

_Part = TypeVar("_Part")


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


def gathered(own: _Part) -> list[_Part]:
    """Return what each rank has, in their order. Ranks other than 0 get nothing. A collective."""
    if not dist.is_initialized():
        return [own]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return parts if dist.get_rank() == 0 else []
