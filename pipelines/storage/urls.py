"""What the start of a place says: on a disk, in an object store, or on the web."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

READ_ONLY_SCHEMES = ("gs", "gcs", "abfs", "abfss", "hf")
"""Object stores that data are read from, and nothing is written to."""
STORE_SCHEMES = ("s3", *READ_ONLY_SCHEMES)
WEB_SCHEMES = ("http", "https")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def scheme_of(url: str) -> str:
    """Return the scheme of a URL in lower case, and "" for a path or any other text."""
    found = _SCHEME.match(url)
    return found[1].lower() if found else ""


def is_local(url: str) -> bool:
    """Return whether a path or URL is a place on a local disk."""
    return scheme_of(url) in ("", "file")


def local_path(url: str) -> Path:
    """Return the path of a place on a local disk. `~` stands for the home folder, except in a file:// URL."""
    return Path(unquote(url.partition("://")[2])) if scheme_of(url) else Path(url).expanduser()


def plain_path(value: str) -> str:
    """Return the path that a file:// URL names, and any other text as it is."""
    return str(local_path(value)) if scheme_of(value) == "file" else value
