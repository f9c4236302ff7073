"""The encoder of the data loader's tasks. Imported by many processes on many nodes, so without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from jobs.training.runs import Run
from jobs.training.teacher import Teacher
from pipelines.feed.batch import Candidate
from pipelines.samples import DecodedInput, DecodedSample
from rzen.config import PairPromptConfig, PromptConfig, TinyBackbone
from rzen.inputs.pairs import PairEncoder
from rzen.inputs.processor import Processor
from rzen.model.locate import checkpoint_folder
from rzen.reranking.encoder import JointEncoder
from rzen.reranking.lists import ListEncoder

BACKBONE = "backbone"


def backbone_url(run: Run) -> str:
    """Return the URL of the run's own tiny backbone, or the backbone that the spec names."""
    named = run.spec.model.backbone
    return run.store.child(BACKBONE).url if isinstance(named, TinyBackbone) else named


class LocalEncoder:
    """A `PairEncoder`, or the `ListEncoder` of a re-ranker, for tasks on any node.

    It finds the backbone's files when it encodes its first sample. With a teacher, pairs get its vectors.
    """

    def __init__(
        self,
        backbone: str,
        endpoint: str | None,
        prompt: PromptConfig | PairPromptConfig,
        teacher: Teacher | None = None,
    ) -> None:
        self._arguments = (backbone, endpoint, prompt, teacher)

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalEncoder, self._arguments

    @cached_property
    def _encoder(self) -> Any:
        backbone, endpoint, prompt, _ = self._arguments
        folder = checkpoint_folder(backbone, endpoint)
        if isinstance(prompt, PairPromptConfig):
            return ListEncoder(JointEncoder(folder, prompt))
        return PairEncoder(Processor(folder, prompt))

    def sample(self, decoded: DecodedSample) -> Any:
        """Encode one sample, as `PairEncoder.sample`."""
        return self._encoder.sample(decoded)

    @property
    def visual_pixels(self) -> int:
        """Pixels of an image or page that the model takes in at most."""
        pixels: int = self._encoder.visual_pixels
        return pixels

    @property
    def held_out_group(self) -> int:
        """Held-out samples that are scored together."""
        size: int = self._encoder.held_out_group
        return size

    def candidate(self, decoded: DecodedInput) -> Any:
        """Encode a candidate, as `PairEncoder.candidate`."""
        return self._encoder.candidate(decoded)

    def positive_of(self, encoded: Any) -> Any:
        """Return the target of a pair, as `PairEncoder.positive_of`."""
        return self._encoder.positive_of(encoded)

    def with_candidates(self, encoded: Any, candidates: Sequence[Candidate], positive_teacher: float) -> Any:
        """Add negatives to a pair, as `PairEncoder.with_candidates`."""
        return self._encoder.with_candidates(encoded, candidates, positive_teacher)

    def collate(self, samples: list[Any]) -> Any:
        """Join samples, as `PairEncoder.collate`, and add the vectors of the teacher."""
        batch = self._encoder.collate(samples)
        teacher = self._arguments[-1]
        return batch if teacher is None else replace(batch, teacher_vectors=teacher.vectors(batch.vector_ids))

    def held_out(self, groups: Sequence[Sequence[Any]]) -> Any:
        """Join held-out samples, as `PairEncoder.held_out`."""
        return self._encoder.held_out(groups)


def encoder_of(run: Run, teacher: Teacher | None = None) -> LocalEncoder:
    """Return the encoder of the samples of this run, with the vectors of a teacher where one is given."""
    return LocalEncoder(backbone_url(run), run.endpoint, run.spec.prompt, teacher)
