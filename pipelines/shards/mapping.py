"""Samples of external shards: which member is the query, the positive, a negative, an instruction.

A selector names a member by its extension, or a field of a JSON member: `txt`, `left.jpg`, `json:caption`,
`json:meta.title`. The extension is everything after the first dot of the file name, in lower case. With `|`, the first
alternative that exists is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from pipelines.config import Config
from pipelines.errors import BadMedia
from pipelines.media.files import KINDS
from pipelines.samples import Input, Media, MediaKind, Sample, instruction_fields
from pipelines.shards.tars import Buffer, Group
from pipelines.texts import MAX_TEXT_BYTES, decode_text


def _alternatives(selector: str) -> list[tuple[str, str]]:
    """Return member and field of each alternative. The field is empty for a whole member."""
    parts = (part.strip().partition(":") for part in selector.split("|"))
    return [(member.lower(), field) for member, _, field in parts]


def _check_text(selector: str) -> str:
    for part in selector.split("|"):
        member, colon, field = part.strip().partition(":")
        if not member or "/" in member or (colon and not all(field.split("."))):
            raise ValueError(
                f"{selector!r} is not a selector; write one like 'txt', 'json:caption' or 'txt | json:caption'"
            )
    return selector


def _kind(member: str) -> MediaKind | None:
    return KINDS.get(f".{member.rpartition('.')[2]}")


def _check_media(selector: str) -> str:
    for member, field in _alternatives(_check_text(selector)):
        if field or _kind(member) is None:
            known = ", ".join(extension[1:] for extension in KINDS)
            raise ValueError(f"{selector!r} must name members with one of these extensions: {known}")
    return selector


TextSelector = Annotated[str, AfterValidator(_check_text)]
MediaSelector = Annotated[str, AfterValidator(_check_media)]


class InputMapping(Config):
    """Where a query or target comes from. With text and media, a sample that lacks one of them is rejected."""

    text: TextSelector | None = None
    """Member, or field of a JSON member."""
    media: MediaSelector | None = None
    """Member with a file. Its extension says the kind, as in folders: jpg, png, webp, avif and others are images, mp4,
    mkv, webm and others are videos. A pdf is a document; its first page is used."""

    @model_validator(mode="after")
    def _not_empty(self) -> InputMapping:
        if self.text is None and self.media is None:
            raise ValueError("names neither text nor media")
        return self


class FromMember(Config):
    """A text that each sample has in a member."""

    member: TextSelector
    """Member, or field of a JSON member."""


class SourceMapping(Config):
    """How a source's members become samples. The defaults fit img2dataset: caption -> image."""

    task: Annotated[str, Field(min_length=1)] = "text_image"
    """Task of all samples; each task has its own temperature. `rzen evaluate` knows text_image, text_page, text_video
    and others."""
    query: InputMapping = InputMapping(text="txt | json:caption")
    """Where the query comes from."""
    positive: InputMapping = InputMapping(media="jpg | jpeg | png | webp")
    """Where the positive comes from."""
    negatives: list[InputMapping] = Field(default_factory=list)
    """Mined negatives. A field may hold a list of texts. Negatives that a sample lacks are left out."""
    instruction: str | Annotated[list[str], Field(min_length=1)] | FromMember = ""
    """Put before the query, in stages with instructions. `{member: json:prompt}` reads it from each sample. A list has
    several wordings: training draws one in each epoch, and everything else takes the first."""
    target_instruction: str | FromMember = ""
    """Put before the targets, in stages with instructions."""
    relevance: TextSelector | None = Field(default=None, exclude_if=lambda selector: selector is None)
    """Member, or field of a JSON member, with a finite number: how well the positive answers the query. The source is
    then trained on the order of these numbers."""

    def selection(self) -> dict[str, Any]:
        """Return the fields that decide which samples are usable and what their targets are, as an index needs them."""
        instructions = {"instruction", "target_instruction"}
        constant = {name for name in instructions if not isinstance(getattr(self, name), FromMember)}
        return self.model_dump(include={"query", "positive", "negatives", "relevance", *instructions} - constant)


class SampleMapper:
    """Makes samples of a source by its mapping. Members are named by extension, in lower case."""

    def __init__(self, source: str, mapping: SourceMapping) -> None:
        self._source = source
        self._mapping = mapping
        self._named = frozenset(_named(mapping.selection()))

    def select(self, data: Buffer, group: Group) -> dict[str, bytes]:
        """Return the members of a sample in `data` that the mapping names, by extension in lower case."""
        named = {name: entry for name, entry in group.members.items() if name.lower() in self._named}
        return {name.lower(): data[entry.start : entry.start + entry.size] for name, entry in named.items()}

    def sample(self, key: str, members: Mapping[str, bytes], origin: str = "") -> Sample:
        """Return the sample, without hashes.

        Raises `BadMedia`: missing_member, missing_field, empty_text, empty_file, not_text, not_a_number, not_utf8,
        bad_json, too_long_text.
        """
        mapping = self._mapping
        return Sample(
            key=key,
            source=self._source,
            task=mapping.task,
            query=_input(mapping.query, members),
            positive=_input(mapping.positive, members),
            negatives=tuple(found for negative in mapping.negatives for found in _negatives(negative, members)),
            **instruction_fields(_wordings(mapping.instruction, members)),
            target_instruction=_instruction(mapping.target_instruction, members),
            origin=origin,
            relevance=_number(mapping.relevance, members) if mapping.relevance else None,
        )


def _named(selection: Any) -> Iterator[str]:
    """Yield the members that any selector names."""
    if isinstance(selection, str):
        yield from (member for member, _ in _alternatives(selection))
    elif selection is not None:
        for part in selection.values() if isinstance(selection, dict) else selection:
            yield from _named(part)


def _input(mapping: InputMapping, members: Mapping[str, bytes]) -> Input:
    text = _text(_found(mapping.text, members), mapping.text) if mapping.text else ""
    return Input(text, (_media(mapping.media, members),) if mapping.media else ())


def _negatives(mapping: InputMapping, members: Mapping[str, bytes]) -> list[Input]:
    try:
        if mapping.text and isinstance(texts := _found(mapping.text, members), list):
            media = (_media(mapping.media, members),) if mapping.media else ()
            return [Input(_text(text, mapping.text), media) for text in texts]
        return [_input(mapping, members)]
    except BadMedia as error:
        if error.reason in ("missing_member", "missing_field"):
            return []
        raise


def _wordings(instruction: str | list[str] | FromMember, members: Mapping[str, bytes]) -> list[str]:
    """Return all wordings of an instruction, the main one first."""
    if isinstance(instruction, list):
        return instruction
    if isinstance(instruction, FromMember) and isinstance(found := _found(instruction.member, members), list):
        return [_text(text, instruction.member) for text in found or [None]]
    return [_instruction(instruction, members)]


def _instruction(instruction: str | FromMember, members: Mapping[str, bytes]) -> str:
    if isinstance(instruction, str):
        return instruction
    return _text(_found(instruction.member, members), instruction.member)


def _number(selector: str, members: Mapping[str, bytes]) -> float:
    value = _found(selector, members)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadMedia("not_a_number", f"{selector} is {str(value)[:40]!r}")
    return number


def _media(selector: str, members: Mapping[str, bytes]) -> Media:
    for member, _ in _alternatives(selector):
        if member in members:
            if not members[member]:
                raise BadMedia("empty_file", member)
            kind = _kind(member)
            assert kind is not None, "checked with the mapping"
            return Media(kind, member)
    raise BadMedia("missing_member", selector)


def _found(selector: str, members: Mapping[str, bytes]) -> Any:
    """Return the text of a member, or the value of a field, of the first alternative that exists."""
    lacking = "missing_member"
    for member, field in _alternatives(selector):
        if member not in members:
            continue
        if not field:
            return _decoded(member, members[member])
        value = _parsed(member, members[member])
        for part in field.split("."):
            if not isinstance(value, dict) or part not in value:
                break
            value = value[part]
        else:
            return value
        lacking = "missing_field"
    raise BadMedia(lacking, selector)


def _decoded(member: str, data: bytes) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise BadMedia("too_long_text", f"{member}: {len(data)} bytes, at most {MAX_TEXT_BYTES}")
    try:
        return decode_text(data)
    except UnicodeDecodeError as error:
        raise BadMedia("not_utf8", f"{member}: {error.reason} at byte {error.start}") from error


def _parsed(member: str, data: bytes) -> Any:
    text = _decoded(member, data)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadMedia("bad_json", f"{member}: {error}") from error


def _text(value: Any, selector: str) -> str:
    if value is None:
        raise BadMedia("empty_text", selector)
    if not isinstance(value, str):
        raise BadMedia("not_text", f"{selector} is {type(value).__name__}")
    if not value.strip():
        raise BadMedia("empty_text", selector)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON may escape it
        raise BadMedia("not_utf8", f"{selector}: {error.reason}") from error
    return value.strip()
