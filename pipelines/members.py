"""Raw files to the members of a sample: read, cut out one page, decode once to know that it can be trained on.

Light to import, because the sandbox child that decodes strangers' files imports it too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.media.decode import decode_pixels
from pipelines.media.documents import extract_page
from pipelines.media.sandbox import Sandbox
from pipelines.samples import MediaKind, RawSample, Sample
from pipelines.shards import Members, target_sha256


def load_sample(raw: RawSample, config: MediaConfig) -> tuple[Sample, Members]:
    """The sample with `target_sha256` filled, and its members, every one decoded in a killable child.

    Raises `BadMedia` for the first bad member: missing_file, unreadable_file, too_many_bytes, and the reasons of
    `pipelines.media`.
    """
    members: Members = {}
    for media in (media for side in raw.sample.sides() for media in side.media):
        if media.member not in raw.files:
            raise BadMedia("missing_file", f"no file is given for {media.member}")
        ref = raw.files[media.member]
        try:
            data = _read(ref.path, config)
            page = _sandbox(config).call(usable_page, media.kind, data, ref.page, config)
        except BadMedia as error:
            raise BadMedia(error.reason, f"{ref.path}: {error.detail}".removesuffix(": ")) from error
        members[media.member] = page or data
    return replace(raw.sample, target_sha256=target_sha256(raw.sample.positive, members)), members


def usable_page(kind: MediaKind, data: bytes, page: int | None, config: MediaConfig) -> bytes:
    """The page that was asked for as a document of its own, empty for a whole file. Raises `BadMedia`."""
    content = data if page is None else extract_page(data, page, config)
    decode_pixels(kind, content, config)
    return b"" if page is None else content


def _read(path: str, config: MediaConfig) -> bytes:
    try:
        num_bytes = Path(path).stat().st_size
        if num_bytes > config.max_bytes:
            raise BadMedia("too_many_bytes", f"{num_bytes} bytes, at most {config.max_bytes}")
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise BadMedia("missing_file") from error
    except OSError as error:
        raise BadMedia("unreadable_file", error.strerror or str(error)) from error


@cache
def _sandbox(config: MediaConfig) -> Sandbox:
    """One child per process and config; it ends with the process, when its standard input closes."""
    return Sandbox(config)
