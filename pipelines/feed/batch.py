"""What the feed gives to the training workers, and what it asks of the learning half."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pipelines.samples import DecodedInput, DecodedSample, Rejected


@dataclass(frozen=True, slots=True)
class Candidate:
    """A negative that a candidate table names: what the encoder made of it, its content, and its teacher's score."""

    encoded: Any
    sha256: str
    teacher: float = float("nan")


class Encoder(Protocol):
    """What the learning half makes of samples. Must pickle.

    One with `visual_pixels` says how many pixels of an image or page its model takes in. Media are then decoded for it.
    """

    def sample(self, sample: DecodedSample) -> Any:
        """Encode one sample. Raises `BadMedia` for one that the model cannot take."""

    def collate(self, samples: list[Any]) -> Any:
        """Return one rank's share of a batch, from encoded samples in plan order."""

    def candidate(self, decoded: DecodedInput) -> Any:
        """Encode a target that may become a negative of several samples. Raises `BadMedia` as `sample` does."""

    def positive_of(self, encoded: Any) -> Any:
        """Return the positive of an encoded sample, as `candidate` would have encoded it."""

    def with_candidates(self, encoded: Any, candidates: Sequence[Candidate], positive_teacher: float) -> Any:
        """Return an encoded sample with further negatives, and with the teacher's score of its positive."""


class NoEncoder:
    """Leaves samples decoded. A batch is a list of them."""

    def sample(self, sample: DecodedSample) -> DecodedSample:
        """Return the sample."""
        return sample

    def collate(self, samples: list[DecodedSample]) -> list[DecodedSample]:
        """Return the list."""
        return samples

    def candidate(self, decoded: DecodedInput) -> DecodedInput:
        """Return the input."""
        return decoded

    def positive_of(self, encoded: DecodedSample) -> DecodedInput:
        """Return the positive."""
        return encoded.positive

    def with_candidates(
        self, encoded: DecodedSample, candidates: Sequence[Candidate], positive_teacher: float
    ) -> DecodedSample:
        """Return the sample with further negatives. Scores are left out."""
        return replace(
            encoded,
            negatives=(*encoded.negatives, *(some.encoded for some in candidates)),
            negative_sha256=(*encoded.negative_sha256, *(some.sha256 for some in candidates)),
        )


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

    `cached_fraction` is the share of its media whose pixels came from the cache of the node. `num_candidates` of a
    table are negatives here, each counted once. `rejected_candidates` of them were bad and are left out.
    """

    step: int
    rank: int
    blocks: tuple[FeedBlock, ...]
    batch: Any
    rejected: tuple[Rejected, ...]
    cached_fraction: float = 0.0
    rejected_candidates: tuple[Rejected, ...] = ()
    num_candidates: int = 0

    @property
    def source(self) -> str:
        """Sources of all blocks, joined by `+`."""
        return "+".join(block.source for block in self.blocks)

    @property
    def num_samples(self) -> int:
        """Samples of all blocks."""
        return sum(block.num_samples for block in self.blocks)
