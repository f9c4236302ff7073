"""What every store can do, and the store on a local disk.

Whatever only the user can mend (full disk, unreachable endpoint, refused access) becomes a `UserError` within seconds;
something that is merely not there is a `FileNotFoundError`. Writes are atomic: a reader sees all of an object or none.
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
from pathlib import Path, PurePosixPath

from pyarrow import fs

from pipelines.errors import UserError

PARTIAL = ".rzen-partial-"
_FIXES = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "the quota is used up: free some space, or choose another place",
    errno.EFBIG: "the file size limit is reached: raise `ulimit -f`, or write smaller shards",
    errno.EACCES: "check the owner and the permissions",
    errno.EPERM: "check the owner and the permissions",
    errno.EROFS: "the file system is read-only: choose another place",
}


class Store(ABC):
    """A folder, local or in an object store. Picklable; clients are made lazily, one per process and endpoint.

    Every `path` is relative to the folder, with `/`, and never leaves it.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def url(self) -> str:
        """What `open_store` takes to open this folder again."""

    @abstractmethod
    def child(self, path: str) -> Store:
        """The folder `path` inside this one. Nothing is created."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """All bytes of an object. Raises `FileNotFoundError`."""

    @abstractmethod
    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`. Raises `FileNotFoundError`; `UserError` if the object ends earlier."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Creates or replaces an object, atomically."""

    @abstractmethod
    def read_tagged(self, path: str) -> tuple[bytes, str]:
        """All bytes of an object, and the tag of this content for `write_if`. Raises `FileNotFoundError`."""

    @abstractmethod
    def write_if(self, path: str, data: bytes, tag: str | None) -> bool:
        """Replaces the object while it has `tag`, or creates it while it is absent (`None`), atomically; False if it is
        otherwise by now. Of several writers, on any machine, at most one gets True.

        Whoever writes an object in this way, always does. Each writer must bring data of its own: by these an object
        store tells whose object it is when an answer was lost and the request is repeated.
        """

    @abstractmethod
    def upload(self, local_file: Path, path: str) -> None:
        """Copies a local file here, atomically."""

    @abstractmethod
    def download(self, path: str, local_file: Path) -> None:
        """Copies an object to a local file, atomically. Raises `FileNotFoundError`."""

    @abstractmethod
    def tags(self, prefix: str = "") -> dict[str, str]:
        """Path (relative to this store, sorted) of each object below the folder `prefix` -> a tag of its content."""

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether there is an object (not a folder) at `path`."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Removes one object, if it is there."""

    @abstractmethod
    def delete_tree(self, prefix: str) -> None:
        """Removes everything below the folder `prefix`."""

    @abstractmethod
    def ensure_bucket(self) -> None:
        """Creates the bucket, or the local folder, if it is missing."""

    @abstractmethod
    def arrow_filesystem(self) -> tuple[fs.FileSystem, str]:
        """The same folder for libraries that read through pyarrow: file system and path in it."""

    def list(self, prefix: str = "") -> list[str]:
        """Sorted paths, relative to this store, of all objects below the folder `prefix`."""
        return [*self.tags(prefix)]

    def upload_tree(self, local_dir: Path, path: str = "") -> None:
        """Uploads all files below `local_dir`, in sorted order."""
        for file in sorted(file for file in local_dir.rglob("*") if file.is_file()):
            self.upload(file, str(PurePosixPath(path) / file.relative_to(local_dir).as_posix()))

    def download_tree(self, path: str, local_dir: Path) -> None:
        """Downloads all objects below `path`. Raises `FileNotFoundError` if there is none."""
        names = self.list(path)
        if not names:
            raise FileNotFoundError(f"{self.url}/{path}".rstrip("/"))
        for name in names:
            self.download(name, local_dir / PurePosixPath(name).relative_to(path))


@contextmanager
def disk_errors(place: str | Path) -> Iterator[None]:
    """Turns what the user must mend on a local disk into a `UserError`; `FileNotFoundError` passes."""
    try:
        yield
    except OSError as error:
        if error.errno in (None, errno.ENOENT):  # without a number: an error of the network, not of the disk
            raise
        raise UserError(str(place), error.strerror or str(error), _FIXES.get(error.errno, "")) from error


def check_relative_path(path: str) -> PurePosixPath:
    """`path`, if it is relative and stays in its store. Raises `UserError`: a manifest may come from strangers."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise UserError(path, "leaves its store", "use a relative path without `..`")
    return pure


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A temporary name beside `target`; what is left under it is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A temporary file that is moved onto `target`, durably, when the block ends well."""
    with _beside(target) as temporary:
        yield temporary
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)


def _sync(path: Path) -> None:
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

    def write(self, path: str, data: bytes) -> None:
        with disk_errors(self._at(path)), atomic_file(self._at(path)) as temporary:
            temporary.write_bytes(data)

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        data = self.read(path)
        return data, hashlib.sha256(data).hexdigest()

    def write_if(self, path: str, data: bytes, tag: str | None) -> bool:
        target = self._at(path)
        with disk_errors(target), _beside(target) as temporary:
            temporary.write_bytes(data)
            _sync(temporary)
            try:
                if tag is None:
                    os.link(temporary, target)  # fails if the target exists, unlike a rename
                else:
                    with target.with_name(f"{PARTIAL}lock").open("w") as lock:
                        fcntl.flock(lock, fcntl.LOCK_EX)
                        if self.read_tagged(path)[1] != tag:
                            return False
                        temporary.replace(target)
            except (FileExistsError, FileNotFoundError):
                return False
            _sync(target.parent)
            return True

    def upload(self, local_file: Path, path: str) -> None:
        with disk_errors(self._at(path)), atomic_file(self._at(path)) as temporary:
            shutil.copyfile(local_file, temporary)

    def download(self, path: str, local_file: Path) -> None:
        with disk_errors(local_file), atomic_file(local_file) as temporary:
            shutil.copyfile(self._at(path), temporary)

    def tags(self, prefix: str = "") -> dict[str, str]:
        with disk_errors(self._at(prefix)):
            files = (file for file in self._at(prefix).rglob("*") if not file.name.startswith(PARTIAL))
            stats = {file.relative_to(self.root).as_posix(): file.stat() for file in files if file.is_file()}
        return {path: f"{stat.st_size}-{stat.st_mtime_ns}" for path, stat in sorted(stats.items())}

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
        return fs.LocalFileSystem(), str(self.root)


def ends_early(place: str, got: str) -> UserError:
    """The error of an object that is shorter than its index says."""
    return UserError(place, f"ends early: {got}", "the object is damaged or was replaced: verify it, or ingest again")
