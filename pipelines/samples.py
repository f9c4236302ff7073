"""The contract of the whole house: what a sample is, in storage, decoded, and in memory.

A sample is one (query, positive, negatives) triple. Each side is text, media, or both. In a shard a sample is
`{key}.json` (this module's `Sample.to_json`) followed by its members `{key}.{member}`, for example `000017.p0.jpg`.

Everything here is plain data: no Ray, no torch, and nothing of ours is imported.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

MediaKind = Literal["image", "video", "document"]
MEDIA_KINDS: tuple[MediaKind, ...] = ("image", "video", "document")
UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Media:
    """One file of a sample. `member` is its name inside the shard after the key: `q0.png`, `p0.mp4`, `p0.pdf`."""

    kind: MediaKind
    member: str


@dataclass(frozen=True, slots=True)
class Input:
    """One end of a pair, before decoding: text, media, or both. At least one of them is present."""

    text: str = ""
    media: tuple[Media, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One training or evaluation pair.

    `source` is the data set (a global batch is drawn from one), `task` owns a temperature. `instruction` goes with
    the query and `target_instruction` with the targets, in stages that use instructions. `target_sha256` identifies
    the content of the positive (text and bytes), so that duplicates can be told apart from negatives. `relevance` says
    how well the positive answers the query, any finite number, in data sets that grade their pairs (as STS does, 0 to
    5); only its order counts. `origin` says where the sample came from (file, and page or line in it).
    """

    key: str
    source: str
    task: str
    query: Input
    positive: Input
    negatives: tuple[Input, ...] = ()
    instruction: str = ""
    target_instruction: str = ""
    target_sha256: str = ""
    origin: str = ""
    relevance: float | None = None

    def sides(self) -> tuple[Input, ...]:
        """Query, positive, then the negatives."""
        return (self.query, self.positive, *self.negatives)

    def to_json(self) -> bytes:
        """UTF-8 JSON with sorted keys: equal samples give equal bytes. Without a relevance it is not named."""
        fields = asdict(self)
        if self.relevance is None:
            del fields["relevance"]
        return json.dumps(fields, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes | str) -> Sample:
        """Inverse of `to_json`. Raises `ValueError` for anything else."""
        try:
            fields = json.loads(data)
            query, positive = _side(fields.pop("query")), _side(fields.pop("positive"))
            negatives = tuple(_side(negative) for negative in fields.pop("negatives"))
            return cls(query=query, positive=positive, negatives=negatives, **fields)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a sample: {error}") from error


def _side(fields: dict[str, Any]) -> Input:
    return Input(text=fields["text"], media=tuple(Media(**media) for media in fields["media"]))


@dataclass(frozen=True, slots=True)
class FileRef:
    """Where an adapter found the bytes of a member: a local file, or one zero-based `page` of a document."""

    path: str
    page: int | None = None


@dataclass(frozen=True, slots=True)
class RawSample:
    """What an adapter yields: the sample (its `target_sha256` still empty) and a file for every member it names.

    `split` is given where the data come with a split of their own.
    """

    sample: Sample
    files: dict[str, FileRef] = field(default_factory=dict)
    split: Literal["train", "held_out"] | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A file, line or sample that was not used: `origin` (file, page or line), countable `reason`, human `detail`."""

    origin: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Visual:
    """Decoded pixels. `frames` is uint8 RGB `[T, H, W, 3]`; T is 1 for images and document pages.

    `times_s` says when each frame of a video is shown, in seconds from its start; empty where it is not known.
    """

    kind: MediaKind
    frames: UInt8Array
    times_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodedInput:
    """A side with pixels in place of files. `instruction` is empty in stages without instructions."""

    text: str = ""
    visuals: tuple[Visual, ...] = ()
    instruction: str = ""


@dataclass(frozen=True, slots=True)
class DecodedSample:
    """A sample with pixels in place of files, ready for the processor."""

    sample: Sample
    query: DecodedInput
    positive: DecodedInput
    negatives: tuple[DecodedInput, ...] = ()
