"""What the samples of a source have in common: the columns or members that a format needs for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce

from pipelines.samples import Input, MediaKind, Sample

_SEVERAL = 2  # instructions that are kept: whether there is one or more is all that matters


@dataclass(frozen=True, slots=True)
class InputShape:
    """How many of `num_inputs` have text and media, the most media of one, and the kinds and extensions of all."""

    num_inputs: int = 0
    with_text: int = 0
    with_media: int = 0
    max_media: int = 0
    kinds: frozenset[MediaKind] = frozenset()
    extensions: frozenset[str] = frozenset()
    """Such as `jpg`."""

    @classmethod
    def of(cls, given: Input) -> InputShape:
        """Return the shape of one input."""
        return cls(
            num_inputs=1,
            with_text=int(bool(given.text)),
            with_media=int(bool(given.media)),
            max_media=len(given.media),
            kinds=frozenset(media.kind for media in given.media),
            extensions=frozenset(extension(media.member) for media in given.media),
        )

    def __add__(self, other: InputShape) -> InputShape:
        """Return the shape of the inputs of both."""
        return InputShape(
            self.num_inputs + other.num_inputs,
            self.with_text + other.with_text,
            self.with_media + other.with_media,
            max(self.max_media, other.max_media),
            self.kinds | other.kinds,
            self.extensions | other.extensions,
        )

    @property
    def is_uniform(self) -> bool:
        """Return whether all have text or none, and all have media or none."""
        return {self.with_text, self.with_media} <= {0, self.num_inputs}


@dataclass(frozen=True, slots=True)
class SourceShape:
    """The shape of all samples of a source. `negatives` are those of all, `max_negatives` the most of one."""

    query: InputShape = InputShape()
    positive: InputShape = InputShape()
    negatives: InputShape = InputShape()
    max_negatives: int = 0
    with_fewer_negatives: bool = False
    """Whether another sample has fewer than `max_negatives`."""
    num_graded: int = 0
    instructions: frozenset[str] = field(default_factory=frozenset)
    """The instruction of all queries, or some of several, or of its wordings."""
    target_instructions: frozenset[str] = field(default_factory=frozenset)
    has_variants: bool = False
    """Whether a sample has its instruction in several wordings."""

    @classmethod
    def of(cls, sample: Sample) -> SourceShape:
        """Return the shape of one sample."""
        return cls(
            InputShape.of(sample.query),
            InputShape.of(sample.positive),
            reduce(InputShape.__add__, map(InputShape.of, sample.negatives), InputShape()),
            len(sample.negatives),
            num_graded=int(sample.relevance is not None),
            instructions=frozenset(sample.instructions),
            target_instructions=frozenset([sample.target_instruction]),
            has_variants=bool(sample.instruction_variants),
        )

    def __add__(self, other: SourceShape) -> SourceShape:
        """Return the shape of the samples of both."""
        differ = self.max_negatives != other.max_negatives and min(self.num_samples, other.num_samples) > 0
        return SourceShape(
            self.query + other.query,
            self.positive + other.positive,
            self.negatives + other.negatives,
            max(self.max_negatives, other.max_negatives),
            self.with_fewer_negatives or other.with_fewer_negatives or differ,
            self.num_graded + other.num_graded,
            _some(self.instructions | other.instructions),
            _some(self.target_instructions | other.target_instructions),
            self.has_variants or other.has_variants,
        )

    @property
    def num_samples(self) -> int:
        """Return the number of samples."""
        return self.query.num_inputs

    def inputs(self) -> dict[str, InputShape]:
        """Return the shapes of query, positive and negatives, by name."""
        return {"query": self.query, "positive": self.positive, "negatives": self.negatives}


def shape_of(samples: Iterable[Sample]) -> SourceShape:
    """Return the shape of samples."""
    return reduce(SourceShape.__add__, map(SourceShape.of, samples), SourceShape())


def extension(member: str) -> str:
    """Return the extension of a member, in lower case and without the dot."""
    return member.rpartition(".")[2].lower()


def _some(texts: frozenset[str]) -> frozenset[str]:
    return frozenset(sorted(texts)[:_SEVERAL])
