"""Raw files to the members of a sample: read, cut out one page, decode once to know that it can be trained on.

Light to import, because the sandbox child that decodes strangers' files imports it too.
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
from pipelines.shards.index import target_sha256


def load_sample(raw: RawSample, config: MediaConfig, *, materialized: bool = False) -> tuple[Sample, Members]:
    """The sample with `target_sha256` filled, and its members, every one decoded in a killable child.

    Members are files or single pages as they came, or `materialized`: a video's frames, the image of a page. Raises
    `BadMedia` for the first bad member: missing_file, unreadable_file, too_many_bytes, and the reasons of
    `pipelines.media`.
    """
    members: Members = {}
    for media in (media for side in raw.sample.inputs() for media in side.media):
        if media.member not in raw.files:
            raise BadMedia("missing_file", f"no file is given for {media.member}")
        ref = raw.files[media.member]
        try:
            data = read_file(ref.path, config)
            instead = _sandbox(config).call(usable, media.kind, data, ref.page, config, materialized)
        except BadMedia as error:
            raise BadMedia(error.reason, f"{ref.path}: {error.detail}".removesuffix(": ")) from error
        members[_stored(media, materialized).member] = instead or data
    sample = _with_sides(raw.sample, lambda media: _stored(media, materialized))
    return replace(sample, target_sha256=target_sha256(sample.positive, members)), members


def usable(kind: MediaKind, data: bytes, page: int | None, config: MediaConfig, materialized: bool) -> bytes:
    """What is stored in place of a file: one page of it, or what was decoded; empty for the file. Raises `BadMedia`."""
    content = data if page is None else extract_page(data, page, config)
    frames, times_s = decode_pixels(kind, content, config)
    if materialized and kind in SUFFIX:
        return materialize(kind, frames, times_s)
    return b"" if page is None else content


def _stored(media: Media, materialized: bool) -> Media:
    if not materialized or media.kind not in SUFFIX:
        return media
    return replace(media, member=f"{media.member.rpartition('.')[0]}.{SUFFIX[media.kind]}")


def _with_sides(sample: Sample, stored: Callable[[Media], Media]) -> Sample:
    query, positive, *negatives = (replace(side, media=tuple(map(stored, side.media))) for side in sample.inputs())
    return replace(sample, query=query, positive=positive, negatives=tuple(negatives))


@cache
def _sandbox(config: MediaConfig) -> Sandbox:
    """One child per process and config; it ends with the process, when its standard input closes."""
    return Sandbox(config)
