"""What the feed gives to the training workers, and what it asks of the learning half."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from pipelines.samples import DecodedSample, Rejected


class Encoder(Protocol):
    """What the learning half makes of samples. Must pickle.

    One with `visual_pixels` says how many pixels of an image or page its model takes in. Media are then decoded for it.
    """

    def sample(self, sample: DecodedSample) -> Any:
        """Encode one sample. Raises `BadMedia` for one that the model cannot take."""

    def collate(self, samples: list[Any]) -> Any:
        """Return one rank's share of a batch, from encoded samples in plan order."""


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a group of workers starts. It is read once, and both the feed and the learner are given it."""

    step: int = 0
    """First step that is still to be done, as the checkpoint says."""
    checkpoint: str = ""
    """Path of that checkpoint below the run's folder; empty where there is none."""


@dataclass(frozen=True, slots=True)
class FeedBlock:
    """One rank's share of a block: `num_samples` of one source, with one task, that are contrasted with each other."""

    source: str
    task: str
    epoch: int
    num_samples: int


@dataclass(frozen=True, slots=True)
class FeedBatch:
    """One rank's share of one global batch: good samples, block after block, and the `rejected` ones they replace.

    `cached_fraction` is the share of its media whose pixels came from the cache of the node.
    """

    step: int
    rank: int
    blocks: tuple[FeedBlock, ...]
    batch: Any
    rejected: tuple[Rejected, ...]
    cached_fraction: float = 0.0

    @property
    def source(self) -> str:
        """Sources of all blocks, joined by `+`."""
        return "+".join(block.source for block in self.blocks)

    @property
    def num_samples(self) -> int:
        """Samples of all blocks."""
        return sum(block.num_samples for block in self.blocks)
