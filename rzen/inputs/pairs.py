"""Encoded pairs: built one sample at a time in the tasks that decode, then joined into one rank's batch.

Workers that decode media import this module, so that it must be quick to import: no torch, no transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipelines.errors import UserError
from pipelines.items.types import as_ids, query_id, target_id
from pipelines.samples import DecodedInput, DecodedSample
from rzen.inputs.processor import EncodedBatch, Processor


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs ready for the model: target b is the positive of query b."""

    queries: EncodedBatch
    """B query inputs."""
    targets: EncodedBatch
    """B target inputs."""
    target_ids: npt.NDArray[np.int64]
    """[B], equal for targets of equal content: the first 8 bytes of `target_sha256`."""
    query_ids: npt.NDArray[np.int64]
    """[B], the same of `query_sha256`: equal to that of a target that shows the same."""
    instruction_ids: npt.NDArray[np.int64]
    """[B], equal for queries that are asked with equal instructions, in whichever of their wordings."""
    negatives: EncodedBatch | None
    """Mined negatives, those of query 0 first. None if there are none at all."""
    negative_counts: npt.NDArray[np.int64]
    """[B], how many of them each query has."""
    negative_ids: npt.NDArray[np.int64]
    """Content of each mined negative, as `target_ids`."""
    keys: tuple[str, ...]
    """[B], `source/key` of each sample, for messages."""
    relevance: npt.NDArray[np.float64]
    """[B], how well each target answers its query. NaN for pairs that are not graded."""
    teacher_scores: npt.NDArray[np.float32]
    """[B], score that a teacher gives each target for its query. NaN where unknown."""
    negative_teacher_scores: npt.NDArray[np.float32]
    """The same of each mined negative."""
    vector_ids: npt.NDArray[np.bytes_]
    """[B, 2], ids by which stored vectors of query and target are found (`pipelines.items`)."""
    teacher_vectors: npt.NDArray[np.float32] | None = None
    """[B, 2, D], vectors that a teacher gives query and target. NaN where unknown. None without a teacher."""

    @property
    def num_without_teacher(self) -> int:
        """Pairs for which the teacher has no vector of the query or of the target. 0 without a teacher."""
        if self.teacher_vectors is None:
            return 0
        return int(np.isnan(self.teacher_vectors[..., 0]).any(axis=1).sum())

    def __len__(self) -> int:
        return len(self.target_ids)


class ScoredCandidate(Protocol):
    """A negative that a candidate table names, as the data loader brings it."""

    @property
    def encoded(self) -> EncodedBatch:
        """The input, encoded by `PairEncoder.candidate`."""

    @property
    def sha256(self) -> str:
        """Hash of its content."""

    @property
    def teacher(self) -> float:
        """Score that a teacher gives it; NaN where unknown."""


@dataclass(frozen=True)
class PairEncoder:
    """Encodes decoded samples for one checkpoint and prompt. Pickles as the processor does, without its files."""

    processor: Processor
    held_out_group = 1
    """Held-out samples that are scored together, so that one worker reads them: each query searches all targets."""

    @property
    def visual_pixels(self) -> int:
        """Pixels of an image or page that the model takes in at most."""
        return self.processor.visual_pixels

    def sample(self, decoded: DecodedSample) -> EncodedPairs:
        """Return one pair. Negatives of a graded pair are left out, because it is not contrasted.

        Raises `BadMedia` for a shape that the backbone cannot take, `UserError` without content hashes.
        """
        sample = decoded.sample
        place = f"{sample.source}/{sample.key}"
        for name, sha256 in (("target_sha256", sample.target_sha256), ("query_sha256", sample.query_sha256)):
            if not sha256:
                # With one id for all, every target would be a duplicate of every positive, and the loss would be zero.
                raise UserError(place, f"has no {name}", "ingest its source again")
        if len(decoded.negative_sha256) != len(decoded.negatives):
            raise UserError(
                place, "has negatives without negative_sha256", "read it with `pipelines.feed.reader.Reader`"
            )
        negatives = decoded.negatives if sample.relevance is None else ()
        instruction_sha256 = hashlib.sha256(decoded.instruction.encode()).hexdigest()
        return EncodedPairs(
            queries=self.processor.encode([decoded.query]),
            targets=self.processor.encode([decoded.positive]),
            target_ids=_ids([sample.target_sha256]),
            query_ids=_ids([sample.query_sha256]),
            instruction_ids=_ids([instruction_sha256]),
            keys=(place,),
            negatives=self.processor.encode(negatives) if negatives else None,
            negative_counts=np.array([len(negatives)], np.int64),
            negative_ids=_ids(decoded.negative_sha256[: len(negatives)]),
            relevance=np.array([sample.relevance], np.float64),  # None becomes NaN
            teacher_scores=np.full(1, np.nan, np.float32),
            negative_teacher_scores=np.full(len(negatives), np.nan, np.float32),
            vector_ids=as_ids([query_id(sample), target_id(sample)]).reshape(1, 2),
        )

    def candidate(self, decoded: DecodedInput) -> EncodedBatch:
        """Return a target that may be a negative of several pairs. Raises `BadMedia` as `sample` does."""
        return self.processor.encode([decoded])

    def positive_of(self, encoded: EncodedPairs) -> EncodedBatch:
        """Return the target of one pair."""
        return encoded.targets

    def with_candidates(
        self, encoded: EncodedPairs, candidates: Sequence[ScoredCandidate], positive_teacher: float
    ) -> EncodedPairs:
        """Return one pair with further mined negatives, and with the teacher's score of its target."""
        negatives = [] if encoded.negatives is None else [encoded.negatives]
        negatives += [some.encoded for some in candidates]
        scores = np.array([some.teacher for some in candidates], np.float32)
        return replace(
            encoded,
            negatives=EncodedBatch.concat(negatives) if negatives else None,
            negative_counts=encoded.negative_counts + len(candidates),
            negative_ids=np.concatenate([encoded.negative_ids, _ids([some.sha256 for some in candidates])]),
            teacher_scores=np.array([positive_teacher], np.float32),
            negative_teacher_scores=np.concatenate([encoded.negative_teacher_scores, scores]),
        )

    def collate(self, pairs: Sequence[EncodedPairs]) -> EncodedPairs:
        """Return all pairs in order as one batch. At least one is needed."""
        negatives = [pair.negatives for pair in pairs if pair.negatives is not None]
        return EncodedPairs(
            queries=EncodedBatch.concat([pair.queries for pair in pairs]),
            targets=EncodedBatch.concat([pair.targets for pair in pairs]),
            target_ids=np.concatenate([pair.target_ids for pair in pairs]),
            query_ids=np.concatenate([pair.query_ids for pair in pairs]),
            instruction_ids=np.concatenate([pair.instruction_ids for pair in pairs]),
            negatives=EncodedBatch.concat(negatives) if negatives else None,
            negative_counts=np.concatenate([pair.negative_counts for pair in pairs]),
            negative_ids=np.concatenate([pair.negative_ids for pair in pairs]),
            keys=tuple(key for pair in pairs for key in pair.keys),
            relevance=np.concatenate([pair.relevance for pair in pairs]),
            teacher_scores=np.concatenate([pair.teacher_scores for pair in pairs]),
            negative_teacher_scores=np.concatenate([pair.negative_teacher_scores for pair in pairs]),
            vector_ids=np.concatenate([pair.vector_ids for pair in pairs]),
            teacher_vectors=_joined_vectors(pairs),
        )

    def held_out(self, groups: Sequence[Sequence[EncodedPairs]]) -> EncodedPairs:
        """Return all held-out pairs in order as one batch. At least one is needed."""
        return self.collate([pair for group in groups for pair in group])


def _joined_vectors(pairs: Sequence[EncodedPairs]) -> npt.NDArray[np.float32] | None:
    """Return the teacher's vectors of all pairs. Either all pairs have such rows, or none has."""
    known = [pair.teacher_vectors for pair in pairs if pair.teacher_vectors is not None]
    assert len(known) in (0, len(pairs)), "pairs with and without a teacher"
    return np.concatenate(known) if known else None


def _ids(sha256: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return the first 8 bytes of each hash."""
    return np.array([int.from_bytes(bytes.fromhex(text)[:8], signed=True) for text in sha256], np.int64)
