"""Paths, file:// and s3:// URLs, folders, globs and braces to the absolute URLs of shards."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

from pipelines.errors import UserError
from pipelines.storage.location import open_store
from pipelines.storage.urls import is_local

_BRACES = re.compile(r"\{([^{}]*)\}")
_GLOB = re.compile(r"[*?[]")
_MAX_RANGE = 10_000_000
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A shard: absolute URL, and the store's tag of its content."""

    url: str
    tag: str


def find_shards(urls: Sequence[str], endpoint: str | None = None) -> list[ShardFile]:
    """Return all tars that the URLs name, each once, in the order given and by name within a folder or glob.

    `{000..099}` and `{a,b}` are expanded first. A folder stands for all tars below it. If a file or folder has the very
    name that is given, such as `data[1].tar`, it is not taken as a pattern. Raises `UserError` for a missing shard, and
    for a URL that matches none.
    """

    @cache
    def listed(folder: str) -> _Listing:
        store = open_store(folder, endpoint)
        return _Listing(store.url.rstrip("/"), store.tags())

    found: dict[str, str] = {}
    for url in urls:
        named = _named(url, listed) if _BRACES.search(url) else {}
        for expanded in () if named else expand_braces(url):
            named |= _matching(expanded, listed)
        found |= named
    return [ShardFile(url, tag) for url, tag in found.items()]


def expand_braces(url: str) -> Iterator[str]:
    """Expand `a{0..2}{x,y}` to a0x, a0y, a1x, ... Braces without a range or a comma stay as they are."""
    matched = next((match for match in _BRACES.finditer(url) if "," in match[1] or ".." in match[1]), None)
    if not matched:
        yield url
        return
    head, tail = url[: matched.start()], url[matched.end() :]
    for choice in _choices(matched[1], url):
        for rest in expand_braces(tail):
            yield f"{head}{choice}{rest}"


def is_glob(name: str) -> bool:
    """Return whether a name has characters of a pattern."""
    return bool(_GLOB.search(name))


def fits_glob(path: str, pattern: str) -> bool:
    """Return whether a path matches a pattern. A `*` stays within its folder, as in a shell."""
    parts, patterns = path.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _choices(inside: str, url: str) -> Iterator[str]:
    if "," in inside:
        yield from inside.split(",")
        return
    first, _, last = inside.partition("..")
    if not (first.isdecimal() and last.isdecimal() and 0 <= int(last) - int(first) < _MAX_RANGE):
        raise UserError(url, f"{{{inside}}} is not a range of numbers", "write it like {000..099} or {a,b}")
    width = len(first) if first.startswith("0") else 0
    yield from (str(number).zfill(width) for number in range(int(first), int(last) + 1))


@dataclass(frozen=True, slots=True)
class _Listing:
    """A folder: its absolute URL, and every object below it as relative path -> tag."""

    url: str
    tags: dict[str, str]

    def absolute(self, paths: Iterable[str]) -> dict[str, str]:
        return {f"{self.url}/{path}": self.tags[path] for path in paths if path in self.tags}


def _matching(url: str, listed: Callable[[str], _Listing]) -> dict[str, str]:
    """Return absolute URL -> tag of the tars that a URL without braces names."""
    if url.endswith(_COMPRESSED):
        raise UserError(url, "is compressed, and compressed tars cannot be read by range", "unpack it to a .tar")
    hits = _named(url, listed)
    parts = url.split("/")
    for depth, part in enumerate(parts):
        # Folders before a pattern may have brackets in their names.
        if not hits and is_glob(part):
            listing = listed("/".join(parts[:depth]) or ("." if depth == 0 else "/"))
            hits = listing.absolute(path for path in listing.tags if fits_glob(path, "/".join(parts[depth:])))
    if not hits:
        problem = "there is no such shard" if _is_tar(url) else "holds no .tar"
        raise UserError(url, problem, "name tars, a folder of them, a glob like s3://bucket/a/*.tar, or {000..099}")
    return hits


def _named(url: str, listed: Callable[[str], _Listing]) -> dict[str, str]:
    """Return the tar, or the tars of the folder, that a URL names if no character in it is special."""
    if not _is_tar(url):
        listing = listed(url)
        return listing.absolute(path for path in listing.tags if _is_tar(path))
    folder, slash, name = url.rpartition("/")
    listing = listed(folder or (slash or "."))
    # A key of S3 may have several slashes in a row, which are not part of the folder's URL.
    return listing.absolute([url.removeprefix(f"{listing.url}/") if not is_local(url) else name])


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")
