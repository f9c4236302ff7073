"""Media files: the extensions of each kind, in folders and in tars, and files on local disks."""

from __future__ import annotations

import re
from pathlib import Path

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.samples import MediaKind

_EXTENSIONS: dict[MediaKind, tuple[str, ...]] = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"),
    "document": (".pdf",),
    "video": (
        *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".flv", ".ogv", ".wmv", ".asf"),
        *(".mpg", ".mpeg", ".ts", ".mts", ".m2ts"),
    ),
}
KINDS: dict[str, MediaKind] = {extension: kind for kind, group in _EXTENSIONS.items() for extension in group}


_CONTENT_TYPES: dict[str, MediaKind] = {"image": "image", "video": "video", "application/pdf": "document"}
_PAGE = re.compile(r"(?P<name>.+)#page=(?P<page>\d{1,9})", re.DOTALL)


def kind_of(path: Path) -> MediaKind:
    """Return the kind of a media file by its extension. Raises `UserError` for another extension."""
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise UserError(str(path), f"has the extension {path.suffix!r}", f"use one of {' '.join(KINDS)}")
    return kind


def kind_of_content(content_type: str) -> MediaKind | None:
    """Return the kind of a medium by the content type that a server sends, such as `image/png`."""
    whole = content_type.partition(";")[0].strip().lower()
    return _CONTENT_TYPES.get(whole) or _CONTENT_TYPES.get(whole.partition("/")[0])


def split_page(name: str) -> tuple[str, int | None]:
    """Return `a.pdf` and 2 for `a.pdf#page=2`, and None for a name without a page. Pages count from zero."""
    found = _PAGE.fullmatch(name)
    return (found["name"], int(found["page"])) if found else (name, None)


def read_file(path: str, config: MediaConfig) -> bytes:
    """Return all bytes of a file. Raises `BadMedia`: too_many_bytes, missing_file, unreadable_file."""
    try:
        num_bytes = Path(path).stat().st_size
        if num_bytes > config.max_bytes:
            raise BadMedia("too_many_bytes", f"{num_bytes} bytes, at most {config.max_bytes}")
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise BadMedia("missing_file") from error
    except OSError as error:
        raise BadMedia("unreadable_file", error.strerror or str(error)) from error
