"""The encoder of the data loader's tasks. Imported by many processes on many nodes, so without torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jobs.training.runs import Run
from pipelines.feed.batch import Candidate
from pipelines.samples import DecodedInput, DecodedSample
from rzen.config import PromptConfig, TinyBackbone
from rzen.inputs.pairs import EncodedPairs, PairEncoder
from rzen.inputs.processor import EncodedBatch, Processor
from rzen.model.locate import checkpoint_folder

BACKBONE = "backbone"


def backbone_url(run: Run) -> str:
    """Return the URL of the run's own tiny backbone, or the backbone that the spec names."""
    named = run.spec.model.backbone
    return run.store.child(BACKBONE).url if isinstance(named, TinyBackbone) else named


class LocalEncoder:
    """A `PairEncoder` for tasks on any node. It finds the backbone's files when it encodes its first sample."""

    def __init__(self, backbone: str, endpoint: str | None, prompt: PromptConfig) -> None:
        self._arguments = (backbone, endpoint, prompt)

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalEncoder, self._arguments

    @cached_property
    def _encoder(self) -> PairEncoder:
        backbone, endpoint, prompt = self._arguments
        return PairEncoder(Processor(checkpoint_folder(backbone, endpoint), prompt))

    def sample(self, decoded: DecodedSample) -> EncodedPairs:
        """Encode one sample, as `PairEncoder.sample`."""
        return self._encoder.sample(decoded)

    @property
    def visual_pixels(self) -> int:
        """Pixels of an image or page that the model takes in at most."""
        return self._encoder.visual_pixels

    def candidate(self, decoded: DecodedInput) -> EncodedBatch:
        """Encode a candidate, as `PairEncoder.candidate`."""
        return self._encoder.candidate(decoded)

    def positive_of(self, encoded: EncodedPairs) -> EncodedBatch:
        """Return the target of a pair, as `PairEncoder.positive_of`."""
        return self._encoder.positive_of(encoded)

    def with_candidates(
        self, encoded: EncodedPairs, candidates: Sequence[Candidate], positive_teacher: float
    ) -> EncodedPairs:
        """Add negatives to a pair, as `PairEncoder.with_candidates`."""
        return self._encoder.with_candidates(encoded, candidates, positive_teacher)

    def collate(self, pairs: list[EncodedPairs]) -> EncodedPairs:
        """Join pairs, as `PairEncoder.collate`."""
        return self._encoder.collate(pairs)


def encoder_of(run: Run) -> LocalEncoder:
    """Return the encoder of the pairs that this run trains on."""
    return LocalEncoder(backbone_url(run), run.endpoint, run.spec.model.prompt)
