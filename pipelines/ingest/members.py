"""Raw media to the members of a sample: read the bytes, extract a page, and decode them once as a check.

This module imports quickly, because the sandbox child that decodes untrusted files imports it too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.media.decode import decode_pixels
from pipelines.media.documents import extract_page
from pipelines.media.jpeg import first_block
from pipelines.media.materialized import SUFFIX, join_frames, materialize
from pipelines.media.sandbox import Sandbox
from pipelines.media.signatures import NUM_BYTES, sniff
from pipelines.samples import (
    ArchiveRef,
    CellRef,
    FramesRef,
    Input,
    Media,
    MediaKind,
    Members,
    RawSample,
    Reference,
    Sample,
)
from pipelines.shards.index import with_hashes
from pipelines.sources.references import ReferenceReader

_WINDOW_SAMPLES = 64
_WINDOW_BYTES = 4 << 20
_Files = Mapping[str, bytes | list[bytes] | BadMedia]
"""Member of a raw sample -> its bytes, those of the pictures of a video, or why they cannot be read."""


def load_samples(
    raws: Iterable[RawSample], config: MediaConfig, *, materialized: bool = False, reader: ReferenceReader
) -> Iterator[tuple[RawSample, tuple[Sample, Members] | BadMedia]]:
    """Yield each sample with its hashes and its members, or why it cannot be used, in order.

    Files are read a few ahead, up to 4 MB and one sample, so that the child checks many pictures in one call.
    """
    for window in _windows(raws, reader):
        sure = _sure_pictures(window, config)
        for number, (raw, files) in enumerate(window):
            try:
                yield raw, _loaded_sample(raw, files, sure.get(number, frozenset()), config, materialized)
            except BadMedia as error:
                yield raw, error


def load_sample(
    raw: RawSample, config: MediaConfig, *, materialized: bool = False, reader: ReferenceReader | None = None
) -> tuple[Sample, Members]:
    """Return the sample with its hashes, and its members. A killable child has decoded each, or what proves it sound.

    Members are original files or single pages, or with `materialized` the frames of a video and the image of a page.
    A video of pictures becomes one file. A member without an extension gets kind and extension from its bytes. Raises
    `BadMedia` for the first bad member: missing_file, unreadable_file, too_many_bytes, unsupported_format, the reasons
    of `ReferenceReader` and those of `pipelines.media`.
    """
    if reader is None:
        with ReferenceReader(config) as own:
            return load_sample(raw, config, materialized=materialized, reader=own)
    ((_, loaded),) = load_samples([raw], config, materialized=materialized, reader=reader)
    if isinstance(loaded, BadMedia):
        raise loaded
    return loaded


def _windows(raws: Iterable[RawSample], reader: ReferenceReader) -> Iterator[list[tuple[RawSample, _Files]]]:
    """Yield samples with their files, several at a time."""
    window: list[tuple[RawSample, _Files]] = []
    num_bytes = 0
    for raw in raws:
        files = {member: _read(ref, reader) for member, ref in raw.files.items()}
        window.append((raw, files))
        num_bytes += sum(map(_num_bytes, files.values()))
        if len(window) == _WINDOW_SAMPLES or num_bytes > _WINDOW_BYTES:
            yield window
            window, num_bytes = [], 0
    if window:
        yield window


def _num_bytes(data: bytes | list[bytes] | BadMedia) -> int:
    return sum(map(len, data)) if isinstance(data, list) else 0 if isinstance(data, BadMedia) else len(data)


def _read(ref: Reference, reader: ReferenceReader) -> bytes | list[bytes] | BadMedia:
    try:
        return reader.read(ref)
    except BadMedia as error:
        return error


def _sure_pictures(window: Sequence[tuple[RawSample, _Files]], config: MediaConfig) -> dict[int, set[str]]:
    """Return number of a sample -> members that are pictures which are known to decode, as their first blocks do."""
    places, blocks = [], []
    for number, (_, files) in enumerate(window):
        for member, data in files.items():
            if isinstance(data, bytes) and (block := first_block(data, config)):
                places.append((number, member))
                blocks.append(block)
    try:
        decoded = _sandbox(config).call(which_decode, blocks, config) if blocks else []
    except BadMedia:  # each file is decoded by itself, and says why
        return {}
    sure: dict[int, set[str]] = {}
    for (number, member), is_sure in zip(places, decoded, strict=True):
        if is_sure:
            sure.setdefault(number, set()).add(member)
    return sure


def which_decode(pictures: Sequence[bytes], config: MediaConfig) -> list[bool]:
    """Return whether each picture can be decoded. Runs in the sandbox."""
    return [_decodes(data, config) for data in pictures]


def _decodes(data: bytes, config: MediaConfig) -> bool:
    try:
        decode_pixels("image", data, config)
    except BadMedia:
        return False
    return True


def _loaded_sample(
    raw: RawSample, files: _Files, sure: Collection[str], config: MediaConfig, materialized: bool
) -> tuple[Sample, Members]:
    members: Members = {}
    stored: dict[str, Media] = {}
    for media in (media for part in raw.sample.inputs() for media in part.media):
        if media.member not in raw.files:
            raise BadMedia("missing_file", f"no file is given for {media.member}")
        ref, data = raw.files[media.member], files[media.member]
        try:
            if isinstance(data, BadMedia):
                raise data
            stored[media.member], content = _loaded(media, ref, data, media.member in sure, config, materialized)
        except BadMedia as error:
            raise BadMedia(error.reason, f"{_shown(ref)}: {error.detail}".removesuffix(": ")) from error
        members[stored[media.member].member] = content
    sample = _with_media(raw.sample, lambda media: stored[media.member])
    return with_hashes(sample, members), members


def _loaded(
    media: Media, ref: Reference, data: bytes | list[bytes], is_sure: bool, config: MediaConfig, materialized: bool
) -> tuple[Media, bytes]:
    """Return a medium as it is stored, and its bytes. A picture that `is_sure` to decode is not decoded."""
    if isinstance(data, list):
        video = _sandbox(config).call(join_frames, data, config, materialized)
        return Media("video", f"{media.member}.{SUFFIX['video']}"), video
    page = None if isinstance(ref, FramesRef) else ref.page
    if "." not in media.member:
        media = _named(media, data)
        if media.kind == "document":
            page = page or 0
        elif page is not None:
            raise BadMedia("no_such_page", f"page {page} of a file that is no document: {media.kind}")
    if media.kind == "image" and is_sure:
        return media, data
    content = _sandbox(config).call(stored_content, media.kind, data, page, config, materialized)
    return _stored_media(media, materialized), content or data


def _named(media: Media, data: bytes) -> Media:
    if not data:
        raise BadMedia("empty_file")
    found = sniff(data[:NUM_BYTES])
    if found is None:
        raise BadMedia("unsupported_format", f"begins with {data[:8]!r}")
    return Media(found[0], media.member + found[1])


def _shown(ref: Reference) -> str:
    """Return where a medium is, for messages."""
    page = "" if isinstance(ref, FramesRef) or ref.page is None else f" page {ref.page}"
    if isinstance(ref, CellRef):
        return f"{ref.path} part {ref.part} row {ref.row} {'.'.join(map(str, ref.column))}{page}"
    return f"{ref.path} {ref.member}{page}" if isinstance(ref, ArchiveRef) else f"{ref.path}{page}"


def stored_content(kind: MediaKind, data: bytes, page: int | None, config: MediaConfig, materialized: bool) -> bytes:
    """Return what is stored instead of a file: one page, or decoded pixels. Empty means the file itself.

    Runs in the sandbox, which then need not send the file back. Raises `BadMedia`.
    """
    content = data if page is None else extract_page(data, page, config)
    frames, times_s = decode_pixels(kind, content, config)
    if materialized and kind in SUFFIX:
        return materialize(kind, frames, times_s)
    return b"" if page is None else content


def _stored_media(media: Media, materialized: bool) -> Media:
    if not materialized or media.kind not in SUFFIX:
        return media
    return replace(media, member=f"{media.member.rpartition('.')[0]}.{SUFFIX[media.kind]}")


def _with_media(sample: Sample, stored: Callable[[Media], Media]) -> Sample:
    query, positive, *negatives = (
        Input(part.text, tuple(map(stored, part.media))) if part.media else part for part in sample.inputs()
    )
    return replace(sample, query=query, positive=positive, negatives=tuple(negatives))


@cache
def _sandbox(config: MediaConfig) -> Sandbox:
    """Return the child of this process for these settings. It ends with the process, when its standard input closes."""
    return Sandbox(config)
