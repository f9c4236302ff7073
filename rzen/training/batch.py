"""What a training step receives from the feed."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Protocol

from rzen.inputs.pairs import EncodedPairs


class FeedBlockProtocol(Protocol):
    """Pairs that are contrasted with each other: one rank's share, of one source."""

    @property
    def source(self) -> str:
        """Where they come from."""

    @property
    def task(self) -> str:
        """Which temperature they use."""

    @property
    def num_samples(self) -> int:
        """Own pairs, equally many on every rank."""


class FeedBatchProtocol(Protocol):
    """What a step receives from the feed: one rank's share of a global batch."""

    @property
    def step(self) -> int:
        """Number of the global batch."""

    @property
    def blocks(self) -> Sequence[FeedBlockProtocol]:
        """What the batch consists of: usually one block."""

    @property
    def batch(self) -> EncodedPairs:
        """The own pairs, block after block."""

    @property
    def rejected(self) -> Sized:
        """One entry for each own sample that was bad and has been replaced."""
