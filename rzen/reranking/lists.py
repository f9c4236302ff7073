"""Lists of pairs to train a re-ranker on: each query with its positive and its negatives.

Built one sample at a time in the tasks that decode, then joined into one rank's batch. Workers that decode media import
this module, so that it must be quick to import: no torch, no transformers.

Shapes: B queries, P pairs of all queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from pipelines.errors import UserError
from pipelines.samples import DecodedInput, DecodedSample
from rzen.reranking.encoder import EncodedSide, JointBatch, JointEncoder

Int64Array = npt.NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True)
class EncodedList:
    """One query with its targets: the positive first, then negatives."""

    key: str
    """`source/key` of the sample, for messages."""
    query: EncodedSide
    asked: tuple[str, str]
    """Content and instruction of the query: equal for queries that ask the same."""
    targets: tuple[EncodedSide, ...]
    contents: tuple[str, ...]
    """SHA-256 of each target."""


@dataclass(frozen=True)
class RerankBatch:
    """One rank's share of a batch: the pairs of query 0 first, and in them its positive first."""

    joint: JointBatch
    """P pairs."""
    counts: Int64Array
    """[B], pairs of each query, 1 at least."""
    keys: tuple[str, ...]
    """[B], `source/key` of each sample, for messages."""

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def is_positive(self) -> npt.NDArray[np.bool_]:
        """[P], whether the pair is a query with its positive."""
        found = np.zeros(len(self.joint), np.bool_)
        found[np.cumsum(self.counts) - self.counts] = True
        return found

    @property
    def query_of(self) -> Int64Array:
        """[P], number of the query of each pair."""
        return np.repeat(np.arange(len(self)), self.counts)


@dataclass(frozen=True)
class CrossedGroups:
    """Queries of each group with all targets of the group, for held-out scores. No input of a group is there twice."""

    joint: JointBatch
    """P pairs."""
    pairs: Int64Array
    """[P, 2]: number of the sample that brings the query, and of the one that brings the target."""
    is_relevant: npt.NDArray[np.bool_]
    """[P], whether some sample of the group has this query with this target."""


class ScoredCandidate(Protocol):
    """A negative that a candidate table names, as the data loader brings it."""

    @property
    def encoded(self) -> Any:
        """The target, encoded by `ListEncoder.candidate`."""

    @property
    def sha256(self) -> str:
        """Hash of its content."""


@dataclass(frozen=True)
class ListEncoder:
    """Encodes decoded samples for one checkpoint and prompt. Pickles as the `JointEncoder` does."""

    joint: JointEncoder
    held_out_group = 8
    """Samples whose queries are scored with all targets of the group."""

    @property
    def visual_pixels(self) -> int:
        """Pixels of an image or page that the model takes in at most."""
        return self.joint.visual_pixels

    def sample(self, decoded: DecodedSample) -> EncodedList:
        """Return one list. Negatives that equal the positive, or a negative before them, are left out.

        Raises `BadMedia` for a shape that the backbone cannot take, `UserError` for a graded pair and for one without
        content hashes.
        """
        sample = decoded.sample
        place = f"{sample.source}/{sample.key}"
        if sample.relevance is not None:
            fix = "leave its source out of data.mixture.weights"
            raise UserError(place, "is a graded pair, and a re-ranker is trained on right and wrong answers", fix)
        if not (sample.target_sha256 and sample.query_sha256):
            raise UserError(place, "has no hashes of its contents", "ingest its source again")
        contents = (sample.target_sha256, *decoded.negative_sha256)
        sides = [self.joint.side(target) for target in (decoded.positive, *decoded.negatives)]
        asked = (sample.query_sha256, decoded.instruction)
        return _without_duplicates(EncodedList(place, self.joint.side(decoded.query), asked, tuple(sides), contents))

    def candidate(self, decoded: DecodedInput) -> EncodedSide:
        """Return a target that may be a negative of several queries. Raises `BadMedia` as `sample` does."""
        return self.joint.side(decoded)

    def positive_of(self, encoded: EncodedList) -> EncodedSide:
        """Return the positive of a list."""
        return encoded.targets[0]

    def with_candidates(
        self, encoded: EncodedList, candidates: Sequence[ScoredCandidate], positive_teacher: float
    ) -> EncodedList:
        """Return a list with further negatives. The teacher's scores are not used."""
        targets = (*encoded.targets, *(some.encoded for some in candidates))
        contents = (*encoded.contents, *(some.sha256 for some in candidates))
        return _without_duplicates(replace(encoded, targets=targets, contents=contents))

    def collate(self, lists: Sequence[EncodedList]) -> RerankBatch:
        """Return all lists in order as one batch. At least one is needed."""
        counts = np.array([len(some.targets) for some in lists], np.int64)
        pairs = np.stack([np.repeat(np.arange(len(lists)), counts), np.arange(counts.sum())], axis=1)
        targets = [target for some in lists for target in some.targets]
        joint = self.joint.join([some.query for some in lists], targets, pairs)
        return RerankBatch(joint, counts, tuple(some.key for some in lists))

    def held_out(self, groups: Sequence[Sequence[EncodedList]]) -> CrossedGroups:
        """Return every query of a group with every target of it. Negatives are left out.

        A target that shows what the query shows is left out, unless it is its positive.
        """
        rows: list[tuple[int, int, bool]] = []
        start = 0
        for group in groups:
            queries = _first_places(some.asked for some in group)
            targets = _first_places(some.contents[0] for some in group)
            answers = {(some.asked, some.contents[0]) for some in group}
            for asked, query in queries.items():
                for content, target in targets.items():
                    is_relevant = (asked, content) in answers
                    if is_relevant or content != asked[0]:
                        rows.append((start + query, start + target, is_relevant))
            start += len(group)
        lists = [some for group in groups for some in group]
        pairs = np.array([row[:2] for row in rows], np.int64)
        joint = self.joint.join([some.query for some in lists], [some.targets[0] for some in lists], pairs)
        return CrossedGroups(joint, pairs, np.array([row[2] for row in rows], np.bool_))


def _first_places(values: Iterable[T]) -> dict[T, int]:
    """Return each value once, in order, with the number of its first place."""
    places: dict[T, int] = {}
    for number, value in enumerate(values):
        places.setdefault(value, number)
    return places


def _without_duplicates(some: EncodedList) -> EncodedList:
    """Return the list with each content once. The first is kept, so that no negative equals the positive."""
    kept = _first_places(some.contents).values()
    if len(kept) == len(some.contents):
        return some
    return replace(
        some,
        targets=tuple(some.targets[number] for number in kept),
        contents=tuple(some.contents[number] for number in kept),
    )
