"""What is embedded: one input with an id of its content and the place of its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipelines.samples import FileRef, Input, Sample, TimeRange

Role = Literal["query", "positive"]
ID = "S32"
"""numpy's type of an id."""
FRAMES = "frames"
"""Suffix of the member of a video that is a folder of pictures (`pipelines.items.frames`)."""


@dataclass(frozen=True, slots=True)
class ShardRow:
    """One input of a sample in a dataset. `index` counts the samples of the source."""

    split: str
    source: str
    index: int
    role: Role


@dataclass(frozen=True, slots=True)
class Item:
    """One input to embed. `id` is 32 hex digits, a digest of all content that decides the vector.

    The media of `input` are in `files` (by member; a folder for a video of frames) or, where `row` is given, in a
    shard. `name` is what people and result files call it. `content` are 32 hex digits of text and media only: equal for
    a query and a candidate that show the same, whatever their instructions. `segment` is the part of a video that is
    embedded, None for all of it.
    """

    id: str
    name: str
    input: Input
    content: str
    instruction: str = ""
    files: dict[str, FileRef] = field(default_factory=dict)
    row: ShardRow | None = None
    segment: TimeRange | None = None

    @property
    def modality(self) -> str:
        """Media kinds and text of the input, without the instruction: `text`, `image`, `image+text`, `video`, ..."""
        kinds = sorted({media.kind for media in self.input.media})
        return "+".join([*kinds, *(["text"] if self.input.text else [])])


def content_id(content: object) -> str:
    """Return 32 hex digits for any content that JSON can hold."""
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def query_id(sample: Sample) -> str:
    """Return the id of a sample's query: equal for equal content and instruction, wherever it is."""
    kinds = [media.kind for media in sample.query.media]
    return content_id(["query", sample.query_sha256, kinds, sample.instruction])


def target_id(sample: Sample) -> str:
    """Return the id of a sample's target, as `query_id` does that of its query."""
    kinds = [media.kind for media in sample.positive.media]
    return content_id(["target", sample.target_sha256, kinds, sample.target_instruction])


def segment_sha256(target_sha256: str, segment: TimeRange) -> str:
    """Return 64 hex digits for the content of a segment: a function of the video's content and the range."""
    text = f"{target_sha256} {segment.start_s:.3f} {segment.end_s:.3f}"
    return hashlib.sha256(text.encode()).hexdigest()


def as_ids(ids: Iterable[str]) -> npt.NDArray[np.bytes_]:
    """Return ids as an array of 32 bytes each."""
    return np.fromiter((id.encode() for id in ids), dtype=ID)
