"""Vectors of a pool as files of a node, memory-mapped by all processes that search there.

    {scratch}/rzen-mine-{job}/lock         held, shared, by every process that uses the folder
    {scratch}/rzen-mine-{job}/{name}.npy   fp32 [U, D]

A killed process gives its lock back. The next job on a node deletes the folders that nobody holds.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipelines.storage.store import PARTIAL, disk_errors
from rzen.neighbors.exact import FloatArray

_PREFIX = "rzen-mine-"


class Scratch:
    """The folder of one job on this node."""

    def __init__(self, parent: str | None, job: str) -> None:
        self._parent = Path(parent or tempfile.gettempdir())
        self._folder = self._parent / f"{_PREFIX}{job}"
        self._lock: BinaryIO | None = None

    def array(self, name: str, make: Callable[[Path], object]) -> FloatArray:
        """Return a memory-mapped array. `make` writes its file if no process of this node has made it yet."""
        path = self._folder / f"{name}.npy"
        with disk_errors(self._folder):
            self._hold()
            with (self._folder / f"{name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    partial = path.with_name(f"{PARTIAL}{name}.npy")
                    make(partial)
                    partial.rename(path)
        found: FloatArray = np.load(path, mmap_mode="r")
        return found

    def _hold(self) -> None:
        if self._lock is not None:
            return
        delete_unused(self._parent)
        path = self._folder / "lock"
        while self._lock is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = path.open("ab")
            fcntl.flock(lock, fcntl.LOCK_SH)
            if path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                self._lock = lock
            else:  # another process deleted the folder between the two calls
                lock.close()

    def release(self) -> None:
        """Give the folder back, and delete it if no other process uses it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        delete_unused(self._parent)


def delete_unused(parent: Path) -> None:
    """Delete the folders of jobs that nobody holds."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            with (folder / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # another process holds it, has deleted it, or is about to make its lock
            continue
