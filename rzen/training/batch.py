"""What a training step receives from the feed."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Protocol

from rzen.training.learner import OwnBatch


class FeedBlockProtocol(Protocol):
    """One rank's share of the pairs that are contrasted with each other, all of one source."""

    @property
    def source(self) -> str:
        """Name of the dataset that they come from."""

    @property
    def task(self) -> str:
        """Name of the task, which owns their temperature."""

    @property
    def num_samples(self) -> int:
        """Number of own pairs, equal on every rank."""


class FeedBatchProtocol(Protocol):
    """One rank's share of a global batch, as the data loader gives it to a step."""

    @property
    def step(self) -> int:
        """Number of the global batch, from 0."""

    @property
    def blocks(self) -> Sequence[FeedBlockProtocol]:
        """Blocks of the batch, usually one."""

    @property
    def batch(self) -> OwnBatch:
        """Own samples, block after block."""

    @property
    def rejected(self) -> Sized:
        """Own samples that were bad and have been replaced, one entry each."""

    @property
    def rejected_candidates(self) -> Sized:
        """Own candidates that were bad and have been left out, one entry each."""

    @property
    def cached_fraction(self) -> float:
        """Share of the own media whose pixels came from the cache of the data loader."""
