"""Raw files to the members of a sample: read a file, extract its page, and decode it once as a check.

This module imports quickly, because the sandbox child that decodes untrusted files imports it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.media.decode import decode_pixels
from pipelines.media.documents import extract_page
from pipelines.media.files import read_file
from pipelines.media.materialized import SUFFIX, materialize
from pipelines.media.sandbox import Sandbox
from pipelines.samples import Media, MediaKind, Members, RawSample, Sample
from pipelines.shards.index import with_hashes


def load_sample(raw: RawSample, config: MediaConfig, *, materialized: bool = False) -> tuple[Sample, Members]:
    """Return the sample with its hashes, and its members. A killable child has decoded each of them.

    Members are original files or single pages, or with `materialized` the frames of a video and the image of a page.
    Raises `BadMedia` for the first bad member: missing_file, unreadable_file, too_many_bytes, and the reasons of
    `pipelines.media`.
    """
    members: Members = {}
    for media in (media for part in raw.sample.inputs() for media in part.media):
        if media.member not in raw.files:
            raise BadMedia("missing_file", f"no file is given for {media.member}")
        ref = raw.files[media.member]
        try:
            data = read_file(ref.path, config)
            content = _sandbox(config).call(stored_content, media.kind, data, ref.page, config, materialized)
        except BadMedia as error:
            raise BadMedia(error.reason, f"{ref.path}: {error.detail}".removesuffix(": ")) from error
        members[_stored_media(media, materialized).member] = content or data
    sample = _with_media(raw.sample, lambda media: _stored_media(media, materialized))
    return with_hashes(sample, members), members


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
    query, positive, *negatives = (replace(part, media=tuple(map(stored, part.media))) for part in sample.inputs())
    return replace(sample, query=query, positive=positive, negatives=tuple(negatives))


@cache
def _sandbox(config: MediaConfig) -> Sandbox:
    """Return the child of this process for these settings. It ends with the process, when its standard input closes."""
    return Sandbox(config)
