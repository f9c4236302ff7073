"""Packs the working directory that a submitted job runs in, and refuses what no cluster could take.

Ray would do it in three passes, follow links out of the folder or round in circles, and only then report the size. Here
one pass decides what travels, so that a mistake is reported at once and the size is that of the package.
"""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ray._private.ray_constants import (
    DASHBOARD_CLIENT_MAX_SIZE,
    RAY_RUNTIME_ENV_IGNORE_GITIGNORE,
    get_runtime_env_default_excludes,
)
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE
from ray._private.thirdparty.pathspec import PathSpec

from pipelines.errors import UserError

# Not sent to the cluster: history, environments and results.
EXCLUDES = [".git", ".venv", "/runs", "**/__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"]
# Ray's job server accepts requests of 100 MiB, its store messages of 512 MiB.
LIMIT_BYTES: int = min(DASHBOARD_CLIENT_MAX_SIZE, GCS_STORAGE_MAX_SIZE)
IGNORE_FILES = (".gitignore", ".rayignore")
_ENTRY_BYTES = 30 + 46  # headers of a file in a zip, next to its name twice
_ENOUGH = 10  # times the limit: more need not be counted
_SHOWN = 5
_OLDEST = (1980, 1, 1, 0, 0, 0)
_FIX = "leave it out with submit.excludes in the spec"


@dataclass(frozen=True)
class Rule:
    """Patterns in the language of .gitignore, relative to the folder that they are for."""

    folder: str
    patterns: PathSpec

    def matches(self, path: str) -> bool:
        """Return whether a path leaves what is sent. Paths of folders end with a slash."""
        return bool(self.patterns.match_file(path[len(self.folder) :]))


@dataclass
class Package:
    """What is sent to a cluster: paths below `folder`, with their sizes."""

    folder: Path
    sizes: dict[str, int] = field(default_factory=dict)
    num_bytes: int = 0
    """Size of the zip file."""

    def add(self, path: str, size: int) -> None:
        """Add a file, or an empty folder, whose path ends with a slash."""
        if path not in self.sizes:
            self.sizes[path] = size
            self.num_bytes += size + _ENTRY_BYTES + 2 * len(path.encode())

    def largest(self) -> list[str]:
        """Return the largest files, with their sizes."""
        found = sorted(self.sizes.items(), key=lambda item: -item[1])[:_SHOWN]
        return [f"{path} ({size / 1e6:.1f} MB)" for path, size in found if size]

    def write(self, path: Path) -> None:
        """Write the zip file. Equal files give equal bytes, so that Ray sends them once."""
        with zipfile.ZipFile(path, "w") as packed:
            for name in sorted(self.sizes):
                file = self.folder / name
                entry = zipfile.ZipInfo(name, _OLDEST)
                entry.external_attr = file.stat().st_mode << 16
                if name.endswith("/"):
                    packed.writestr(entry, b"")
                    continue
                with file.open("rb") as content, packed.open(entry, "w") as out:
                    shutil.copyfileobj(content, out, 1 << 20)


def pack(folder: Path, excludes: Sequence[str], needed: Sequence[Path] = ()) -> Package:
    """Return what of `folder` is sent. `excludes` are patterns next to `EXCLUDES`, .gitignore and .rayignore.

    `needed` files travel even if a pattern matches them. Raise `UserError` for a package above Ray's limit, and for
    links that leave the folder or contain themselves, named pipes and files that cannot be read or named.
    """
    folder = folder.resolve()
    package = Package(folder)
    for file in needed:
        package.add(file.relative_to(folder).as_posix(), file.stat().st_size)
    patterns = [*get_runtime_env_default_excludes(), *EXCLUDES, *excludes]
    root = folder.stat()
    for path, size in _walk(folder, "", [Rule("", _patterns(patterns))], ((root.st_dev, root.st_ino),)):
        package.add(path, size)
        if package.num_bytes > _ENOUGH * LIMIT_BYTES:
            break
    if package.num_bytes >= LIMIT_BYTES:
        more = "more than " if package.num_bytes > _ENOUGH * LIMIT_BYTES else ""
        problem = f"has {more}{package.num_bytes / 1e6:.0f} MB to send, and Ray takes {LIMIT_BYTES / 1e6:.0f} MB"
        largest = f"the largest files are {', '.join(package.largest())}"
        fix = "leave files out with submit.excludes in the spec, or with a .rayignore file"
        raise UserError(str(folder), f"{problem}; {largest}", fix)
    return package


def _patterns(lines: Sequence[str]) -> PathSpec:
    return PathSpec.from_lines("gitwildmatch", lines)


def _walk(
    root: Path, folder: str, rules: Sequence[Rule], above: Sequence[tuple[int, int]]
) -> Iterator[tuple[str, int]]:
    """Yield paths below `root` with their sizes. `folder` ends with a slash; `above` are the folders around it."""
    rules = [*rules, *_ignore_files(root, folder)]
    is_empty = True
    try:
        entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
    except PermissionError as error:
        raise UserError(str(root / folder), "cannot be read", _FIX) from error
    for entry in entries:
        is_empty = False
        path = f"{folder}{entry.name}"
        try:
            status = entry.stat()
        except OSError:  # a link to nothing; Ray leaves it out, too
            continue
        is_folder = stat.S_ISDIR(status.st_mode)
        if any(rule.matches(path) or (is_folder and rule.matches(f"{path}/")) for rule in rules):
            continue
        if entry.is_symlink():
            _check_link(root, path)
        _check_name(root, path)
        if is_folder:
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                raise UserError(str(root / path), f"is a link to {(root / path).readlink()}, a folder around it", _FIX)
            yield from _walk(root, f"{path}/", rules, (*above, identity))
        elif stat.S_ISREG(status.st_mode):
            if not os.access(root / path, os.R_OK):
                raise UserError(str(root / path), "cannot be read", _FIX)
            yield path, status.st_size
    if is_empty and folder:
        yield folder, 0


def _ignore_files(root: Path, folder: str) -> Iterator[Rule]:
    names = IGNORE_FILES[1:] if os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE) == "1" else IGNORE_FILES
    for name in names:
        file = root / folder / name
        if file.is_file():
            yield Rule(folder, _patterns(file.read_text(errors="replace").splitlines()))


def _check_link(root: Path, path: str) -> None:
    target = (root / path).resolve()
    if not target.is_relative_to(root):
        problem = f"is a link to {target}, which is not in the folder that is sent"
        raise UserError(str(root / path), problem, f"copy it there, or {_FIX}")


def _check_name(root: Path, path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode(errors="replace")
        raise UserError(f"{root}/{shown}", "has a name that is not UTF-8", f"rename it, or {_FIX}") from error
