"""The interface of a store, and the store on a local disk.

A fault that only the user can fix (full disk, unreachable endpoint, refused access) becomes a `UserError` within
seconds. A missing object is a `FileNotFoundError`. Writes are atomic: a reader gets all of an object or nothing.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING

from pipelines.errors import UserError
from pipelines.storage.faults import OF_DISKS

if TYPE_CHECKING:  # models are loaded without pyarrow
    from pyarrow import fs

PARTIAL = ".rzen-partial-"


class Store(ABC):
    """A folder, local or in an object store. It pickles; each process makes one client for each endpoint, on first use.

    Every `path` is relative to the folder, with `/`, and never leaves it.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def url(self) -> str:
        """The argument with which `open_store` opens this folder again."""

    @abstractmethod
    def child(self, path: str) -> Store:
        """Return the folder `path` inside this one. Nothing is created."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """Return all bytes of an object. Raises `FileNotFoundError`."""

    @abstractmethod
    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`. Raises `FileNotFoundError`, and `UserError` if it ends early."""

    @abstractmethod
    def read_range_if(self, path: str, offset: int, length: int, tag: str) -> bytes | None:
        """Return what `read_range` does, of the object that `tags` lists with `tag`. None if it has another by now."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Create or replace an object, atomically."""

    @abstractmethod
    def read_tagged(self, path: str) -> tuple[bytes, str]:
        """Return all bytes of an object, and the tag of this content for `write_if`. Raises `FileNotFoundError`."""

    @abstractmethod
    def write_if(self, path: str, data: bytes, tag: str | None) -> bool:
        """Replace the object while it has `tag`, or create it while it is absent (`None`), atomically.

        Return False if the object has changed. Of several writers, on any machine, at most one gets True.

        An object that is written in this way must never be written in another. All writers must write different data:
        if an answer is lost and the request repeated, an object store compares data to find out who wrote the object.
        """

    @abstractmethod
    def upload(self, local_file: Path, path: str) -> None:
        """Copy a local file here, atomically."""

    @abstractmethod
    def download(self, path: str, local_file: Path) -> None:
        """Copy an object to a local file, atomically. Raises `FileNotFoundError`."""

    @abstractmethod
    def tags(self, prefix: str = "") -> dict[str, str]:
        """Return path -> tag of the content for each object below the folder `prefix`.

        Paths are sorted and relative to this store.
        """

    @abstractmethod
    def tag(self, path: str) -> str:
        """Return the tag of an object, as `tags` lists it. Raises `FileNotFoundError`."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Return the bytes of an object. Raises `FileNotFoundError`."""

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Return whether there is an object (not a folder) at `path`."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove one object, if it exists."""

    @abstractmethod
    def delete_tree(self, prefix: str) -> None:
        """Remove everything below the folder `prefix`."""

    @abstractmethod
    def ensure_bucket(self) -> None:
        """Create the bucket, or the local folder, if it is missing."""

    @abstractmethod
    def arrow_filesystem(self) -> tuple[fs.FileSystem, str]:
        """Return the folder for libraries that read with pyarrow: a file system, and the path in it."""

    @abstractmethod
    def walk(self, prefix: str = "") -> Iterator[str]:
        """Yield the path of everything below the folder `prefix`, unfinished writes included, in any order.

        An empty folder on a disk ends with a slash. Nothing is read ahead of need.
        """

    @abstractmethod
    def copy(self, source: str, target: str) -> None:
        """Create or replace an object by a copy of another one, atomically, where they are."""

    def list(self, prefix: str = "") -> list[str]:
        """Return the sorted paths, relative to this store, of all objects below the folder `prefix`."""
        return [*self.tags(prefix)]

    def upload_tree(self, local_dir: Path, path: str = "") -> None:
        """Upload all files below `local_dir`, in sorted order."""
        for file in sorted(file for file in local_dir.rglob("*") if file.is_file()):
            self.upload(file, str(PurePosixPath(path) / file.relative_to(local_dir).as_posix()))

    def download_tree(self, path: str, local_dir: Path) -> None:
        """Download all objects below `path`. Raises `FileNotFoundError` if there are none."""
        names = self.list(path)
        if not names:
            raise FileNotFoundError(f"{self.url}/{path}".rstrip("/"))
        for name in names:
            self.download(name, local_dir / PurePosixPath(name).relative_to(path))


@contextmanager
def disk_errors(place: str | Path) -> Iterator[None]:
    """Turn faults of a local disk that the user must fix into a `UserError`. `FileNotFoundError` passes."""
    try:
        yield
    except OSError as error:
        if error.errno in (None, errno.ENOENT):  # without a number it is an error of the network
            raise
        if isinstance(error, NotADirectoryError):
            path = Path(place)
            file = next((one for one in (path, *path.parents) if one.is_file()), path)
            raise UserError(str(file), "is a file", "name a folder") from error
        raise UserError(str(place), error.strerror or str(error), OF_DISKS.get(error.errno, "")) from error


def check_relative_path(path: str) -> PurePosixPath:
    """Return `path` if it is relative and stays in its store, else raise `UserError`: manifests may be untrusted."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise UserError(path, "leaves its store", "use a relative path without `..`")
    return pure


def is_partial(path: PurePath) -> bool:
    """Return whether a path is that of an unfinished write, or in a folder of them."""
    return any(part.startswith(PARTIAL) for part in path.parts)


@contextmanager
def _temporary_name(target: Path) -> Iterator[Path]:
    """Provide a temporary name next to `target`. A file that remains there is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, for one process at a time."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # network file systems lock files only
            os.close(descriptor)
            descriptor = os.open(folder / f"{PARTIAL}lock", os.O_RDWR | os.O_CREAT)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Provide a temporary file that is moved to `target`, durably, when the block ends without an error."""
    with _temporary_name(target) as temporary:
        yield temporary
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class LocalStore(Store):
    """A folder on a local or mounted disk."""

    root: Path

    @property
    def url(self) -> str:
        return str(self.root)

    def _at(self, path: str) -> Path:
        return self.root / check_relative_path(path)

    def child(self, path: str) -> LocalStore:
        return LocalStore(self._at(path))

    def read(self, path: str) -> bytes:
        with disk_errors(self._at(path)):
            return self._at(path).read_bytes()

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        with disk_errors(self._at(path)), self._at(path).open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) != length:
            raise ends_early(str(self._at(path)), f"{len(data)} of the {length} bytes from offset {offset}")
        return data

    def read_range_if(self, path: str, offset: int, length: int, tag: str) -> bytes | None:
        with disk_errors(self._at(path)):
            if _tag(self._at(path).stat()) != tag:
                return None
        data = self.read_range(path, offset, length)
        with disk_errors(self._at(path)):
            return data if _tag(self._at(path).stat()) == tag else None  # it may have been replaced meanwhile

    def write(self, path: str, data: bytes) -> None:
        with disk_errors(self._at(path)), atomic_file(self._at(path)) as temporary:
            temporary.write_bytes(data)

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        data = self.read(path)
        return data, hashlib.sha256(data).hexdigest()

    def write_if(self, path: str, data: bytes, tag: str | None) -> bool:
        target = self._at(path)
        with disk_errors(target), _temporary_name(target) as temporary:
            temporary.write_bytes(data)
            sync(temporary)
            try:
                if tag is None:
                    os.link(temporary, target)  # fails if the target exists; a rename would not
                else:
                    with _locked(target.parent):
                        if self.read_tagged(path)[1] != tag:
                            return False
                        temporary.replace(target)
            except (FileExistsError, FileNotFoundError):
                return False
            sync(target.parent)
            return True

    def upload(self, local_file: Path, path: str) -> None:
        with disk_errors(self._at(path)), atomic_file(self._at(path)) as temporary:
            shutil.copyfile(local_file, temporary)

    def download(self, path: str, local_file: Path) -> None:
        with disk_errors(local_file), atomic_file(local_file) as temporary:
            shutil.copyfile(self._at(path), temporary)

    def tags(self, prefix: str = "") -> dict[str, str]:
        start = self._at(prefix)
        with disk_errors(start):
            files = (file for file in start.rglob("*") if not is_partial(file.relative_to(start)))
            stats = {file.relative_to(self.root).as_posix(): file.stat() for file in files if file.is_file()}
        return {path: _tag(stat) for path, stat in sorted(stats.items())}

    def tag(self, path: str) -> str:
        with disk_errors(self._at(path)):
            return _tag(self._at(path).stat())

    def size(self, path: str) -> int:
        with disk_errors(self._at(path)):
            return self._at(path).stat().st_size

    def walk(self, prefix: str = "") -> Iterator[str]:
        with disk_errors(self._at(prefix)):
            for folder, folders, files in os.walk(self._at(prefix), onerror=_raise):
                inside = Path(folder).relative_to(self.root)
                links = [name for name in folders if Path(folder, name).is_symlink()]
                yield from ((inside / name).as_posix() for name in (*files, *links))
                if not files and not folders and Path(folder) != self._at(prefix):
                    yield f"{inside.as_posix()}/"

    def copy(self, source: str, target: str) -> None:
        with disk_errors(self._at(target)), _temporary_name(self._at(target)) as temporary:
            try:
                os.link(self._at(source), temporary)
            except OSError:  # a file system without hard links, or no such file
                shutil.copyfile(self._at(source), temporary)
            temporary.replace(self._at(target))
            sync(self._at(target).parent)

    def exists(self, path: str) -> bool:
        with disk_errors(self._at(path)):
            return self._at(path).is_file()

    def delete(self, path: str) -> None:
        with disk_errors(self._at(path)):
            self._at(path).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        if self._at(prefix).exists():
            with disk_errors(self._at(prefix)):
                shutil.rmtree(self._at(prefix))

    def ensure_bucket(self) -> None:
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)

    def arrow_filesystem(self) -> tuple[fs.FileSystem, str]:
        from pyarrow import fs

        return fs.LocalFileSystem(), str(self.root)


def _tag(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def ends_early(place: str, got: str) -> UserError:
    """Return the error for an object that is shorter than its index says."""
    return UserError(place, f"ends early: {got}", "the object is damaged or was replaced: verify it, or ingest again")
