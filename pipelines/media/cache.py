"""Decoded pixels, kept on the node for later epochs and other runs: `feed.cache`. Off unless a spec asks for it.

    cache = PixelCache(folder, max_bytes)
    frames, times_s = cache.get(key) or decode()

A file for each medium, under the hash of its content and of all that decides its pixels. What is in the cache is bit
for bit what the decoder gave. Nothing depends on what it holds, except time: a medium that is missing is decoded.

**Bound.** A file with the number of bytes is counted under a lock before anything is written. When the cache is full,
it keeps what it has. Epochs come round in another order each time, so that dropping the oldest would make room for
something that is not needed sooner.

**Processes.** Any number of processes of a node write and read at once. A file appears complete, by a hard link. Its
folder belongs to one user and one job, and is deleted by the job (`remove`) or, if that was killed, by the next one on
the node (`remove_abandoned`). Each process holds a shared lock while it uses the folder.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np

from pipelines.config import MediaConfig
from pipelines.errors import UserError
from pipelines.media.libraries import library_versions
from pipelines.samples import MediaKind, UInt8Array

Pixels = tuple[UInt8Array, list[float]]
"""RGB frames `[T, H, W, 3]`, and when each is shown (s)."""
SHARED_MEMORY = "/dev/shm"
_PREFIX = "rzen-pixels"
_HOLDERS, _BYTES = "holders", "bytes"
_HEAD = struct.Struct("<4q")  # frames, height, width, number of times
_log = logging.getLogger(__name__)


def cache_folder(parent: str | None, job: str) -> Path:
    """Return the folder of a job's cache on this node, below `parent`: by default the node's shared memory."""
    below = parent or (SHARED_MEMORY if Path(SHARED_MEMORY).is_dir() else tempfile.gettempdir())
    return Path(below, f"{_PREFIX}-{os.getuid()}-{job}")


class PixelCache:
    """Decoded pixels in `folder`, at most `max_bytes` of them. Not thread-safe; any number of processes may share it.

    `num_hits` and `num_misses` count the media of this process. Raises `UserError` for a folder of another user.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._is_full = False
        self.num_hits = self.num_misses = 0
        remove_abandoned(folder)
        self._lock = _hold(folder)

    def get(self, key: str) -> Pixels | None:
        """Return the pixels of this key, which are read-only. None where there are none."""
        try:
            data = self._path(key).read_bytes()
        except FileNotFoundError:
            self.num_misses += 1
            return None
        self.num_hits += 1
        num_frames, height, width, num_times = _HEAD.unpack_from(data)
        times_s = np.frombuffer(data, np.float64, num_times, _HEAD.size).tolist()
        frames = np.frombuffer(data, np.uint8, offset=_HEAD.size + 8 * num_times)
        return frames.reshape(num_frames, height, width, 3), times_s

    def put(self, key: str, pixels: Pixels) -> None:
        """Keep pixels, if there is room and nobody has. An error of the disk fills the cache for this process."""
        frames, times_s = pixels
        size = _HEAD.size + 8 * len(times_s) + frames.nbytes
        if self._is_full:
            return
        try:
            self._is_full = not self._reserve(size)
            if not self._is_full and not self._write(key, _head(pixels), frames):
                self._reserve(-size)
        except OSError as error:  # no room, or deleted; what was counted stays counted
            _log.warning("%s: keeps no more pixels: %s", self._folder, error)
            self._is_full = True

    def _write(self, key: str, head: bytes, frames: UInt8Array) -> bool:
        """Write a file that appears complete. Return False if another process was first."""
        path = self._path(key)
        descriptor, part = tempfile.mkstemp(dir=self._folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(head)
                file.write(np.ascontiguousarray(frames).data)
            os.link(part, path)
        except FileExistsError:
            return False
        finally:
            Path(part).unlink()
        return True

    def _reserve(self, size: int) -> bool:
        """Count bytes before they are written. Return False where they would exceed the limit."""
        with _locked(self._folder / _BYTES, fcntl.LOCK_EX) as descriptor:
            used = int(os.pread(descriptor, 32, 0) or b"0") + size
            if used > self._max_bytes:
                return False
            os.pwrite(descriptor, b"%-32d" % used, 0)
        return True

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.rgb"


def _head(pixels: Pixels) -> bytes:
    frames, times_s = pixels
    num_frames, height, width, _ = frames.shape
    return _HEAD.pack(num_frames, height, width, len(times_s)) + np.array(times_s, np.float64).tobytes()


class CachedDecoder:
    """Decodes as the function that it is given, with a cache in front. Its key has all that decides the pixels."""

    def __init__(self, cache: PixelCache, config: MediaConfig) -> None:
        self._cache = cache
        # The limits are in it, too: what they reject must not be found. So are the versions of the libraries.
        settings = f"{config.model_dump_json()} {sorted(library_versions(config).items())}"
        self._settings = hashlib.sha256(settings.encode()).digest()

    def decode(self, kind: MediaKind, data: bytes, page: int | None, decode: Callable[[], Pixels]) -> Pixels:
        """Return the pixels of a medium, decoded or kept. Errors of `decode` pass, and are not kept."""
        digest = hashlib.sha256(self._settings)
        digest.update(f"{kind} {page} ".encode())
        digest.update(data)
        key = digest.hexdigest()
        pixels = self._cache.get(key)
        if pixels is None:
            pixels = decode()
            self._cache.put(key, pixels)
        return pixels


@cache
def own(folder: Path) -> None:
    """Hold a cache for the life of this process, and delete it at the end. The process of a job calls this."""
    remove_abandoned(folder)
    _hold(folder)
    atexit.register(remove, folder)


def remove(folder: Path) -> None:
    """Delete a cache. Processes that still use it decode again, and keep nothing more."""
    shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Delete the caches next to `folder` that no process holds: those of jobs that were killed."""
    for other in folder.parent.glob(f"{_PREFIX}-{os.getuid()}-*"):
        if other == folder or not _is_ours(other):
            continue
        with suppress(OSError), _locked(other / _HOLDERS, fcntl.LOCK_EX | fcntl.LOCK_NB):
            remove(other)


def _hold(folder: Path) -> int:
    """Make the folder of this user, and return a descriptor that holds it until the process ends."""
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(folder):
            raise UserError(str(folder), "belongs to another user, or is a link", "name another feed.cache.folder")
        try:
            descriptor = os.open(folder / _HOLDERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # deleted as abandoned since it was made
            continue
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), (folder / _HOLDERS).stat()):
                return descriptor
        os.close(descriptor)


def _is_ours(folder: Path) -> bool:
    info = folder.lstat()
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid()


@contextmanager
def _locked(path: Path, mode: int) -> Iterator[int]:
    """Give the descriptor of a file that is locked. Raises `OSError` where the folder is gone or the lock is taken."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, mode)
        yield descriptor
    finally:
        os.close(descriptor)
