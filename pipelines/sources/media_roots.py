"""Where the media are that a table names: folders on a disk or in a store, and members of zip and tar files."""

from __future__ import annotations

import os
import posixpath
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pipelines.errors import BadMedia, UserError
from pipelines.samples import ArchiveRef, FileRef, FramesRef, Reference
from pipelines.sources.archives import check_archive, is_archive, list_archive
from pipelines.sources.table_files import absolute
from pipelines.storage.location import open_object, open_store
from pipelines.storage.store import LocalStore
from pipelines.storage.urls import WEB_SCHEMES, is_local, plain_path, scheme_of

_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_NUMBER = re.compile(r"(\d+)")


class _Root(ABC):
    """A place with media. `find` returns None for a path that it does not have."""

    @abstractmethod
    def find(self, path: str) -> Reference | None: ...


@dataclass(frozen=True)
class _Folder(_Root):
    """A folder on a disk."""

    root: Path
    follow_links: bool

    def find(self, path: str) -> Reference | None:
        try:
            return self._find(path)
        except OSError as error:  # such as a name that is too long, or a folder that may not be read
            raise BadMedia("unreadable_file", f"{path[:200]}: {error.strerror}") from error

    def _find(self, path: str) -> Reference | None:
        for form in dict.fromkeys((path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path))):
            place = self.root / form
            if place.is_file():
                self._check_inside(place, path)
                return FileRef(str(place))
            if place.is_dir():
                self._check_inside(place, path)
                names = _frames(entry.name for entry in os.scandir(place) if entry.is_file(follow_symlinks=False))
                return FramesRef(str(place), tuple(FileRef(str(place / name)) for name in names)) if names else None
        return None

    def _check_inside(self, place: Path, path: str) -> None:
        if not self.follow_links and not Path(os.path.realpath(place)).is_relative_to(os.path.realpath(self.root)):
            raise BadMedia("outside_folder", f"{path} is a link that leaves {self.root}")


@dataclass(frozen=True)
class _StoreFolder(_Root):
    """A folder in an object store. Whether a file exists is found out when it is read."""

    url: str
    endpoint: str | None

    def find(self, path: str) -> Reference | None:
        if posixpath.splitext(path)[1]:
            return FileRef(f"{self.url}/{path}")
        names = _frames(open_store(self.url, self.endpoint).child(path).list())
        pictures = tuple(FileRef(f"{self.url}/{path}/{name}") for name in names)
        return FramesRef(f"{self.url}/{path}", pictures) if pictures else FileRef(f"{self.url}/{path}")


@dataclass(frozen=True)
class _Archive(_Root):
    """A zip or tar."""

    url: str
    members: Mapping[str, ArchiveRef]
    folders: dict[str, list[str]] = field(default_factory=dict)

    def find(self, path: str) -> Reference | None:
        if found := self.members.get(path) or self.members.get(unicodedata.normalize("NFC", path)):
            return found
        if not self.folders:
            for name in self.members:
                folder, _, base = name.rpartition("/")
                self.folders.setdefault(folder, []).append(base)
        names = _frames(self.folders.get(path, ()))
        pictures = tuple(self.members[f"{path}/{name}"] for name in names)
        return FramesRef(f"{self.url}/{path}", pictures) if pictures else None


@dataclass(frozen=True, slots=True)
class MediaRoots:
    """The places in which media of a source are looked for, in order. It pickles.

    `rebase` replaces the start of paths. A path must stay inside of a root, and a URL must begin with one.
    """

    urls: tuple[str, ...]
    rebase: tuple[tuple[str, str], ...] = ()
    endpoint: str | None = None
    follow_links: bool = False

    def check(self, place: str) -> None:
        """Raise `UserError` for a root that is missing, or for an archive that cannot be read by range."""
        for url in self.urls:
            if is_archive(url):
                store, name = open_object(url, self.endpoint)
                if not store.exists(name):
                    there = _siblings(url) if isinstance(store, LocalStore) else "check the URL"
                    raise UserError(f"{place}={url}", "there is no such archive", f"fetch it: {there}")
                check_archive(url, place)
            elif is_local(url) and not Path(url).is_dir():
                raise UserError(f"{place}={url}", "is not a folder", f"correct the path: {_siblings(url)}")

    def hint(self) -> str:
        """Return what could help to find media that no root has: a member of an archive, or an archive in a folder."""
        if archive := next(filter(is_archive, self.urls), None):
            return f"; {archive} has {next(iter(list_archive(archive, self.endpoint)), 'no members')}"
        folders = [Path(url) for url in self.urls if is_local(url) and Path(url).is_dir()]
        found = sorted(path for folder in folders for path in folder.glob("*") if is_archive(path.name))
        if not found:
            return ""
        readable = found[0].name.lower().endswith((".zip", ".tar"))
        return f"; {found[0]} is there: " + ("name it as media_root" if readable else "unpack it")

    def find(self, value: str) -> Reference:
        """Return the reference for a path or URL of a cell.

        Raises `BadMedia`: missing_file, outside_folder, web_address, unreadable_file.
        """
        path, is_inside = self._path(value), False
        for url in self.urls:
            relative = path.removeprefix(f"{url}/")
            if posixpath.isabs(relative) or scheme_of(relative):
                continue
            is_inside = True
            relative = posixpath.normpath(relative)
            if relative == ".." or relative.startswith("../"):
                raise BadMedia("outside_folder", value)
            is_root = relative == "."  # a root is no video, whatever pictures it has
            if not is_root and (found := _opened(url, self.endpoint, self.follow_links).find(relative)):
                return found
        if scheme_of(path) in WEB_SCHEMES:
            raise BadMedia("web_address", f"{value[:200]}: fetch it first, as with img2dataset")
        if not is_inside:
            raise BadMedia("outside_folder", f"{value[:200]} is in no media_root: name a folder above it, or rebase it")
        raise BadMedia("missing_file", value[:200])

    def _path(self, value: str) -> str:
        for start, replacement in self.rebase:
            if value.startswith(start):
                return replacement + value[len(start) :]
        return plain_path(value)


def media_roots(urls: Sequence[str], rebase: Mapping[str, str], **options: Any) -> MediaRoots:
    """Return the roots with absolute paths."""
    return MediaRoots(tuple(absolute(url) for url in urls), tuple(rebase.items()), **options)


@cache
def _opened(url: str, endpoint: str | None, follow_links: bool) -> _Root:
    if is_archive(url):
        return _Archive(url, list_archive(url, endpoint))
    store = open_store(url, endpoint)
    return _Folder(store.root, follow_links) if isinstance(store, LocalStore) else _StoreFolder(url, endpoint)


def _frames(names: Iterable[str]) -> list[str]:
    """Return the pictures of a folder by the numbers in their names: `frame_10` after `frame_9`."""
    pictures = [name for name in names if name.lower().endswith(_PICTURES) and not name.startswith(".")]
    return sorted(pictures, key=_numbered)


def _numbered(name: str) -> list[tuple[int, int | str]]:
    parts = _NUMBER.split(name)
    return [(0, int(part)) if number % 2 else (1, part.lower()) for number, part in enumerate(parts)]


def _siblings(url: str) -> str:
    parent = Path(url).parent
    if not parent.is_dir():
        return f"{parent} does not exist"
    names = sorted(path.name for path in parent.iterdir())
    return f"{parent} has {', '.join(names[:5]) or 'nothing'}" + (
        f" and {len(names) - 5} more" if len(names) > 5 else ""
    )
