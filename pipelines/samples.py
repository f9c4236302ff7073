"""Shared data types: what a sample is in storage, decoded, and in memory.

A sample is one (query, positive, negatives) triple. Each of these inputs is text, media, or both. In a shard, a sample
is `{key}.json` (`Sample.to_json`), followed by its members `{key}.{member}`, for example `000017.p0.jpg`.

Everything here is plain data: no Ray, no torch, and no import from other modules of the project.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

MediaKind = Literal["image", "video", "document"]
SOURCE_PATTERN = r"^[^./\\\s\x00-\x1f\x7f-\x9f][^/\\\x00-\x1f\x7f-\x9f]{0,199}$"
"""Names of sources, which become folders of the dataset."""
MEDIA_KINDS: tuple[MediaKind, ...] = ("image", "video", "document")
Modality = Literal["image", "page", "video", "text"]
"""What a target is for those who search."""
MODALITIES: tuple[Modality, ...] = ("image", "page", "video", "text")
Split = Literal["train", "held_out"]
StoredSplit = Literal["train", "held_out", "uncaptioned"]
"""Splits that ingest writes. Media in `uncaptioned` are embedded and searched. Nothing is trained on them."""
_MODALITY_OF: dict[MediaKind, Modality] = {"image": "image", "document": "page", "video": "video"}
UInt8Array = npt.NDArray[np.uint8]
Members = dict[str, bytes]
"""Member of a sample -> bytes of the file."""


_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode
_STORED = with_config(ConfigDict(extra="forbid", strict=True))


@_STORED
@dataclass(frozen=True, slots=True)
class Media:
    """One file of a sample. `member` is its name in the shard after the key: `q0.png`, `p0.mp4`, `p0.pdf`."""

    kind: MediaKind
    member: str


@_STORED
@dataclass(frozen=True, slots=True)
class Input:
    """A query or target before decoding: text, media, or both. Only the query of an uncaptioned medium has neither."""

    text: str = ""
    media: tuple[Media, ...] = ()

    @property
    def modality(self) -> Modality:
        """Return what the input is for those who search, by its first medium."""
        return _MODALITY_OF[self.media[0].kind] if self.media else "text"


@_STORED
@dataclass(frozen=True, slots=True)
class Sample:
    """One training or evaluation pair.

    `source` is the dataset, and a global batch is drawn from one. Each `task` has its own temperature. `instruction`
    is put before the query and `target_instruction` before the targets, in stages with instructions.
    `instruction_variants` say the same in other words. Training draws one wording in each epoch. `target_sha256`
    identifies the content of the positive (text and bytes), and `query_sha256` that of the query. So duplicates and
    right answers are not scored as negatives. `relevance` is a finite number: how well the positive
    answers the query, in datasets that grade their pairs (STS has 0 to 5). Only its order counts. `origin` says where
    the sample came from: file, and page or line in it.
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
    query_sha256: str = ""
    origin: str = ""
    relevance: Annotated[float, Field(allow_inf_nan=False)] | None = None
    instruction_variants: tuple[str, ...] = ()

    @property
    def instructions(self) -> tuple[str, ...]:
        """Return the instruction, then its variants."""
        return (self.instruction, *self.instruction_variants)

    def inputs(self) -> tuple[Input, ...]:
        """Return the query, the positive, then the negatives."""
        return (self.query, self.positive, *self.negatives)

    def to_json(self) -> bytes:
        """Return UTF-8 JSON with sorted keys: equal samples give equal bytes.

        Left out are a missing relevance or `query_sha256`, and variants of the instruction where there are none.
        """
        fields = {name: getattr(self, name) for name in self.__slots__}  # faster than `asdict`, which copies texts
        fields |= {"query": _as_json(self.query), "positive": _as_json(self.positive)}
        fields["negatives"] = [_as_json(negative) for negative in self.negatives]
        if self.relevance is None:
            del fields["relevance"]
        if not self.query_sha256:
            del fields["query_sha256"]
        if not self.instruction_variants:
            del fields["instruction_variants"]
        return _encode(fields).encode()

    @classmethod
    def from_json(cls, data: bytes | str) -> Sample:
        """Parse what `to_json` wrote. Raises `ValueError` for anything else."""
        try:
            sample: Sample = _parser().validate_json(data, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise ValueError(f"not a sample: {key}: {first['msg']}".replace(": :", ":")) from error
        return sample


class InstructionFields(TypedDict):
    """The fields of `Sample` that hold an instruction in several wordings."""

    instruction: str
    instruction_variants: tuple[str, ...]


def instruction_fields(wordings: Iterable[str]) -> InstructionFields:
    """Return the fields for an instruction in several wordings, the main one first, each once."""
    first, *others = dict.fromkeys(filter(None, wordings)) or [""]
    return {"instruction": first, "instruction_variants": tuple(others)}


def _as_json(part: Input) -> dict[str, object]:
    return {"text": part.text, "media": [{"kind": media.kind, "member": media.member} for media in part.media]}


@cache
def _parser() -> TypeAdapter[Sample]:
    return TypeAdapter(Sample)


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file: a local path or an s3:// URL, or one zero-based `page` of a document."""

    path: str
    page: int | None = None


@dataclass(frozen=True, slots=True)
class ArchiveRef:
    """A member of a tar or zip at `path`: `num_bytes` from `offset`, which is that of its local header in a zip.

    In a zip, `packing` is `stored` or `deflated`. `page` is that of a document, from zero.
    """

    path: str
    member: str
    offset: int
    num_bytes: int
    packing: Literal["tar", "stored", "deflated"]
    page: int | None = None


@dataclass(frozen=True, slots=True)
class CellRef:
    """Bytes in a table: a `row` in a `part` (row group or record batch), and the way to the value in that row.

    `column` names columns and fields, and gives positions in lists. `sha256` is that of the bytes. `page` is that of a
    document, from zero.
    """

    path: str
    part: int
    row: int
    column: tuple[str | int, ...]
    sha256: str
    page: int | None = None


@dataclass(frozen=True, slots=True)
class FramesRef:
    """A video that is a folder of pictures, in order. `path` is the folder."""

    path: str
    pictures: tuple[FileRef | ArchiveRef, ...]


Reference = FileRef | ArchiveRef | CellRef | FramesRef
"""Where the bytes of a member are. `pipelines.sources.references` reads all of them."""


@dataclass(frozen=True, slots=True)
class RawSample:
    """What a source yields: a sample whose hashes are still empty, and a reference for every member it names.

    A member without an extension gets its kind and extension from its bytes, when they are read. `split` is set if the
    data define their own split, and for uncaptioned media.
    """

    sample: Sample
    files: dict[str, Reference] = field(default_factory=dict)
    split: StoredSplit | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A file, line or sample that is not used: `origin` (file, page or line), countable `reason`, readable `detail`."""

    origin: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class TimeRange:
    """A segment of a video: what a player shows from `start_s` until `end_s`, in seconds from the first frame."""

    start_s: float
    end_s: float

    def __str__(self) -> str:
        """Return the range as players write it, such as `1:30-2:00`."""
        return f"{clock_time(self.start_s)}-{clock_time(self.end_s)}"


def clock_time(seconds: float) -> str:
    """Return a time as players write it: `1:30`, `1:00:05`, `0:02.5`."""
    whole_ms = round(seconds * 1000)
    minutes, ms = divmod(whole_ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}:{minutes:02}" if hours else str(minutes)
    rest = f".{ms % 1000:03}".rstrip("0") if ms % 1000 else ""
    return f"{text}:{ms // 1000:02}{rest}"


@dataclass(frozen=True, slots=True)
class Clip:
    """A file that a browser plays. What was asked for begins `start_s` after its first frame, and ends at `end_s`.

    A copy begins with a key frame, which may come some seconds earlier.
    """

    data: bytes
    media_type: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Visual:
    """Decoded pixels. `frames` is uint8 RGB `[T, H, W, 3]`; T is 1 for images and document pages.

    `times_s` says when each frame of a video is shown, in seconds from its start, or from the start of the segment that
    it is. It is empty if that is unknown.
    """

    kind: MediaKind
    frames: UInt8Array
    times_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodedInput:
    """A query or target with pixels instead of files. `instruction` is empty in stages without instructions."""

    text: str = ""
    visuals: tuple[Visual, ...] = ()
    instruction: str = ""

    @property
    def frames(self) -> list[UInt8Array]:
        """All pictures, `[H, W, 3]` each."""
        return [frame for visual in self.visuals for frame in visual.frames]


@dataclass(frozen=True, slots=True)
class DecodedSample:
    """A sample with pixels instead of files, ready for the processor."""

    sample: Sample
    query: DecodedInput
    positive: DecodedInput
    negatives: tuple[DecodedInput, ...] = ()
    negative_sha256: tuple[str, ...] = ()
    """Content of each negative, as `Sample.target_sha256`; filled by whoever read their bytes."""

    @property
    def instruction(self) -> str:
        """Return the instruction of the query, the same for all of its wordings. Empty without instructions."""
        asked = self.query.instruction
        return self.sample.instruction if asked in self.sample.instruction_variants else asked
