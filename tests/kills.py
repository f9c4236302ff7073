"""Jobs that are killed: as soon as they have done something, or at each change that they make to a store."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import ray
from botocore.client import BaseClient

from pipelines.storage import publish
from pipelines.storage.store import LocalStore, Store
from tests.paths import ROOT


def run_until_a_part_is_stored(spec: Path, folder: Path, pattern: str) -> None:
    """Run a spec on the connected Ray, and kill the job with SIGKILL when `folder` has a file of this pattern."""
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    job = subprocess.Popen([sys.executable, "-m", "jobs.run", str(spec)], cwd=ROOT, env=environment)
    try:
        while not list(folder.glob(pattern)) and job.poll() is None:
            time.sleep(0.005)
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    time.sleep(3)  # its actors end with it, some time later


_KILLED, _FAILED = 9, 1
_CALLS: tuple[tuple[Any, str], ...] = (
    *((os, name) for name in ("rename", "replace", "link", "unlink", "mkdir", "rmdir", "fsync")),
    (shutil, "copyfile"),
    (publish, "_exchange"),
)


class KilledError(Exception):
    """A process that asks an object store for nothing more."""


def is_killed(function: Callable[[], object], store: Store, number: int) -> bool:
    """Run a function that dies before its `number`-th call to the store, from 0 on.

    Return False if the function made fewer calls and ended. On a disk, the system calls that change something count.
    The function then runs in a fork, which leaves everything as it is. For an object store, requests count.
    """
    if not isinstance(store, LocalStore):
        return _stops_asking(function, number)
    process = os.fork()
    if process == 0:
        status = _FAILED
        try:
            calls, lock = count(), threading.Lock()
            for place, name in _CALLS:
                setattr(place, name, _counted(getattr(place, name), calls, lock, number, lambda: os._exit(_KILLED)))
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status in (0, _KILLED), "the function failed"
    return status == _KILLED


def _stops_asking(function: Callable[[], object], number: int) -> bool:
    def die() -> None:
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        call = _counted(BaseClient._make_api_call, count(), threading.Lock(), number, die)
        patch.setattr(BaseClient, "_make_api_call", call)
        try:
            function()
        except KilledError:
            return True
    return False


def _counted(
    call: Callable[..., Any], calls: Iterator[int], lock: threading.Lock, number: int, die: Callable[[], None]
) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        with lock:
            if next(calls) >= number:
                die()
        return call(*arguments, **options)

    return run
