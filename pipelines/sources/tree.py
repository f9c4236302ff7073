"""The files of a folder, by path."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.errors import BadMedia
from pipelines.storage.publish import LEASE, MARK


@dataclass(frozen=True, slots=True)
class FolderTree:
    """Files by path relative to `root` with `/`, sorted, and their sizes in bytes; None where unreadable."""

    root: Path
    sizes: dict[str, int | None]
    by_letters: dict[str, str] = field(default_factory=dict)
    """Path in Unicode's form C -> path, where the two differ."""
    outside: frozenset[str] = frozenset()
    """Links to files outside of `root`, which are not read."""

    def spelled(self, name: str) -> str:
        """Return the path of a file as the folder writes it: a Mac stores letters with accents as two characters."""
        return name if name in self.sizes else self.by_letters.get(unicodedata.normalize("NFC", name), name)

    def read(self, name: str) -> bytes:
        """Return the bytes of a file. Raises `BadMedia`: unreadable, outside_folder."""
        self.check_readable(name)
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise BadMedia("unreadable", str(error)) from error

    def check_readable(self, name: str) -> None:
        """Raise `BadMedia` for a link that leaves the folder, and for what is no readable file."""
        if name in self.outside:
            raise BadMedia("outside_folder", f"{name} is a link to {(self.root / name).readlink()}")
        if self.sizes[name] is None:
            raise BadMedia("unreadable", name)  # opening a named pipe would wait indefinitely


def list_folder(root: Path, *, follow_links: bool = False) -> FolderTree:
    """List all files below a folder that are not hidden, without the mark and lease of a folder that rzen wrote.

    Links to files of the folder are followed, and links to others only with `follow_links`. Links to folders are not.
    """
    sizes: dict[str, int | None] = {}
    outside: set[str] = set()
    real_root = os.path.realpath(root)

    def unreadable(error: OSError) -> None:
        sizes[Path(error.filename).relative_to(root).as_posix()] = None

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        place = Path(folder)
        prefix = place.relative_to(root).as_posix()
        for name in names:
            if not name.startswith(".") and name not in (MARK, LEASE):
                raw = posixpath.normpath(f"{prefix}/{name}")
                # A name that is not UTF-8 cannot be stored: it is rejected, with a readable form of the name.
                shown = os.fsencode(raw).decode(errors="replace")
                sizes[shown] = _size(place / name) if shown == raw else None
                is_link = sizes[shown] is not None and (place / name).is_symlink()
                if is_link and not follow_links and not _is_in(place / name, real_root):
                    outside.add(shown)
    by_letters = {unicodedata.normalize("NFC", name): name for name in sorted(sizes) if not name.isascii()}
    return FolderTree(root, dict(sorted(sizes.items())), by_letters, frozenset(outside))


def _is_in(link: Path, real_root: str) -> bool:
    return os.path.realpath(link).startswith(f"{real_root.rstrip(os.sep)}{os.sep}")


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() and os.access(path, os.R_OK) else None
    except OSError:
        return None
