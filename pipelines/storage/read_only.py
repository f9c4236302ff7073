"""Stores that are only read: Google Cloud Storage, Azure and datasets of the Hugging Face hub, through pyarrow.

    gs://bucket/folder      gcs://bucket/folder       gs://anonymous@bucket/folder for a public bucket
    abfs://container@account.dfs.core.windows.net/folder       or abfss://
    hf://datasets/user/name/folder                    needs huggingface_hub, which comes with transformers

Credentials are those that the libraries find: of gcloud or a service account, of `az`, AZURE_* or AZURE_STORAGE_KEY,
and HF_TOKEN.
Outputs need writes that depend on a tag, and file systems of pyarrow have none. So nothing is written here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

from pyarrow import fs

from pipelines.errors import UserError
from pipelines.storage.faults import Attempts, UnavailableError
from pipelines.storage.store import Store, atomic_file, check_relative_path, disk_errors, ends_early, is_partial

T = TypeVar("T")
_CREDENTIALS = {
    "g": "log in with `gcloud auth application-default login`, or write gs://anonymous@bucket for a public bucket",
    "a": "log in with `az login`, or set AZURE_STORAGE_KEY",
    "h": "set HF_TOKEN, and accept the terms of the dataset on its page",
}
_REFUSED = ("401", "403", "permission", "unauthorized", "forbidden", "credential", "authenticat", "gated")
_TRANSIENT = ("429", "500", "502", "503", "504", "too many requests", "unavailable", "timed out", "timeout", "connect")


@dataclass(frozen=True, slots=True)
class ReadOnlyStore(Store):
    """A folder at a URL of one of `READ_ONLY_SCHEMES`: scheme and authority in `root`, and the folder in `prefix`."""

    root: str
    prefix: str

    @property
    def url(self) -> str:
        return f"{self.root}/{self.prefix}".rstrip("/")

    def child(self, path: str) -> ReadOnlyStore:
        return replace(self, prefix=self._key(path))

    def _key(self, path: str) -> str:
        key = (PurePosixPath(self.prefix) / check_relative_path(path)).as_posix()
        return "" if key == "." else key

    def _call(self, path: str, operation: Callable[[fs.FileSystem, str], T]) -> T:
        """Run an operation with the path of an object, again on transient faults."""
        place = f"{self.url}/{path}".rstrip("/")
        attempts = Attempts(self.root)
        while True:
            try:
                system, base = _file_system(self.root, os.getpid())
                result = operation(system, f"{base}{self._key(path)}")
            except (FileNotFoundError, UserError):
                raise
            except Exception as error:
                if not _is_transient(error) or not attempts.wait(UnavailableError(str(error))):
                    raise _explained(place, error) from error
            else:
                attempts.succeed()
                return result

    def _stat(self, path: str) -> tuple[int, str]:
        """Return size and tag of an object, by one request. Raises `FileNotFoundError`."""

        def look(system: fs.FileSystem, key: str) -> tuple[int, str]:
            if (hub := _hub(system)) is not None:
                found = hub.info(key, refresh=True, expand_info=True)  # by one request, and with its hash
                if found["type"] == "file":
                    return int(found["size"]), _hub_tag(found)
            elif (info := system.get_file_info(key)).type == fs.FileType.File:
                return int(info.size), _tag(info)
            raise FileNotFoundError(f"{self.url}/{path}")

        return self._call(path, look)

    def read(self, path: str) -> bytes:
        return self._call(path, _read)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        def get(system: fs.FileSystem, key: str) -> bytes:
            if (hub := _hub(system)) is None:
                with system.open_input_file(key) as file:
                    return bytes(file.read_at(length, offset))
            with hub.open(key, cache_type="none") as file:  # other caches read ahead
                file.seek(offset)
                return bytes(file.read(length))

        data = self._call(path, get) if length else b""
        if len(data) != length:
            raise ends_early(f"{self.url}/{path}", f"{len(data)} of the {length} bytes from offset {offset}")
        return data

    def read_range_if(self, path: str, offset: int, length: int, tag: str) -> bytes | None:
        # Asked after the read, because these stores have no read that depends on a tag.
        try:
            data = self.read_range(path, offset, length)
        except UserError:
            if self.tag(path) != tag:  # another object, which is shorter
                return None
            raise
        return data if self.tag(path) == tag else None

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        tag = self.tag(path)
        return self.read(path), tag

    def download(self, path: str, local_file: Path) -> None:
        def copy(system: fs.FileSystem, key: str) -> None:
            with system.open_input_stream(key) as source, temporary.open("wb") as target:
                shutil.copyfileobj(source, target, 8 << 20)

        with disk_errors(local_file), atomic_file(local_file) as temporary:
            self._call(path, copy)

    def tags(self, prefix: str = "") -> dict[str, str]:
        found = self._call(prefix, _list)
        _, base = _file_system(self.root, os.getpid())
        start = f"{base}{self.prefix}".rstrip("/") + "/"
        named = {path.removeprefix(start.lstrip("/")): tag for path, tag in found.items()}
        return {path: tag for path, tag in sorted(named.items()) if not is_partial(PurePosixPath(path))}

    def tag(self, path: str) -> str:
        return self._stat(path)[1]

    def size(self, path: str) -> int:
        return self._stat(path)[0]

    def exists(self, path: str) -> bool:
        try:
            self._stat(path)
        except FileNotFoundError:
            return False
        return True

    def walk(self, prefix: str = "") -> Iterator[str]:
        yield from self.tags(prefix)

    def arrow_filesystem(self) -> tuple[fs.FileSystem, str]:
        system, base = _file_system(self.root, os.getpid())
        return system, f"{base}{self.prefix}".rstrip("/")

    def write(self, path: str, data: bytes) -> None:
        self._refuse()

    def write_if(self, path: str, data: bytes, tag: str | None) -> bool:
        self._refuse()

    def upload(self, local_file: Path, path: str) -> None:
        self._refuse()

    def delete(self, path: str) -> None:
        self._refuse()

    def delete_tree(self, prefix: str) -> None:
        self._refuse()

    def copy(self, source: str, target: str) -> None:
        self._refuse()

    def ensure_bucket(self) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        scheme = self.root.partition(":")[0]
        raise UserError(self.url, f"{scheme}:// is only read", "write to a folder or to an s3:// URL")


def open_read_only(url: str) -> ReadOnlyStore:
    """Open a URL of one of `READ_ONLY_SCHEMES`. Nothing is contacted. Raises `UserError` for one without a bucket."""
    scheme, _, rest = url.partition("://")
    authority, _, prefix = rest.partition("/")
    if not authority:
        raise UserError(url, "names no bucket", "write gs://bucket/folder, or hf://datasets/user/name")
    return ReadOnlyStore(f"{scheme}://{authority}", prefix.strip("/"))


@cache
def _file_system(root: str, _process: int) -> tuple[fs.FileSystem, str]:
    """Return the file system of this process for a scheme and authority, and the start of all paths in it."""
    try:
        if root.startswith("hf:"):
            from huggingface_hub import HfFileSystem

            return fs.PyFileSystem(fs.FSSpecHandler(HfFileSystem())), f"{root.removeprefix('hf://')}/"
        system, path = fs.FileSystem.from_uri(f"{_with_key(root)}/x")
        if root.startswith("abfs"):
            # Asked first for a file, Azure's library ends the process where there are no credentials.
            system.get_file_info(path)
    except ImportError as error:
        raise UserError(root, str(error), "pip install huggingface_hub") from error
    except Exception as error:
        raise _explained(root, error) from error
    return system, path.removesuffix("x")


def _with_key(root: str) -> str:
    """Return the root with the key of an Azure account, where AZURE_STORAGE_KEY has one."""
    scheme, _, authority = root.partition("://")
    key = os.environ.get("AZURE_STORAGE_KEY")
    if not scheme.startswith("abfs") or not key:
        return root
    user, at, host = authority.rpartition("@")
    return f"{scheme}://{user}:{quote(key, safe='')}{at or '@'}{host}"


def _read(system: fs.FileSystem, key: str) -> bytes:
    with system.open_input_stream(key) as file:
        return bytes(file.read())


def _list(system: fs.FileSystem, key: str) -> dict[str, str]:
    """Return path -> tag of all files below a folder, which may be missing."""
    if (hub := _hub(system)) is not None:
        try:
            return {path: _hub_tag(info) for path, info in hub.find(key.rstrip("/"), detail=True, refresh=True).items()}
        except FileNotFoundError:
            return {}
    infos = system.get_file_info(fs.FileSelector(key.rstrip("/"), recursive=True, allow_not_found=True))
    return {info.path.lstrip("/"): _tag(info) for info in infos if info.type == fs.FileType.File}


def _hub(system: fs.FileSystem) -> Any:
    """Return the file system of the hub itself. None for another one."""
    return system.handler.fs if isinstance(system, fs.PyFileSystem) else None


def _tag(info: fs.FileInfo) -> str:
    return f"{info.size}-{info.mtime_ns}"


def _hub_tag(info: Mapping[str, Any]) -> str:
    """Return size and hash of a file of the hub, which has no times."""
    return f"{info['size']}-{info['blob_id']}"


def _is_transient(error: Exception) -> bool:
    return any(word in str(error).lower() for word in _TRANSIENT) and not _is_refused(error)


def _is_refused(error: Exception) -> bool:
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, PermissionError) or any(word in text for word in _REFUSED)


def _explained(place: str, error: Exception) -> Exception:
    """Return the fault as an error that names place, problem and fix."""
    problem = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "not found" in problem.lower() or "404" in problem:
        return FileNotFoundError(place)
    fix = _CREDENTIALS[place[0]] if _is_refused(error) else "check the URL and the network"
    return UserError(place, problem, fix)
