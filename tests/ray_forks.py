"""Workers of the session's Ray as forks of one process, which has imported the large libraries.

Ray starts each worker as two new interpreters, one after the other, which import Ray. A worker with a model imports
torch and transformers too. That takes 2.9 and 9.0 s of CPU on a busy machine. Here, Ray's command for a worker is
`ray_worker.py`. It gets a fork, which runs Ray's own main program of a worker for 1.1 and 1.4 s. The fork imports this
project itself, so that a missing import shows. Clusters that tests and commands start have Ray's own workers.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from pipelines.imports import importing_models
from tests import ray_worker
from tests.paths import ROOT

_LIBRARIES = (
    "ray._private.workers.default_worker",
    "ray.data",
    "ray.train.torch",
    "transformers",
    "peft",
    "deepspeed",
)
_OURS = ("pipelines", "rzen", "jobs", "tests")
_NO_JOB = "ffffffff"
_RESTARTED = "jemalloc_bg_thd"  # pyarrow's allocator starts its thread again in a fork


@contextmanager
def fork_server() -> Iterator[str | None]:
    """Run the process that forks. The address is for `forked_workers`. It ends with the block, as does its Ray.

    None with `RZEN_TEST_RAY_WORKERS=own`: Ray then starts its workers itself.
    """
    if is_off():
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="rzf", dir="/tmp") as folder:
        address = f"{folder}/socket"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)
            server = subprocess.Popen(
                [sys.executable, "-m", __name__, str(listener.fileno())],
                cwd=ROOT,
                stdin=subprocess.PIPE,  # it ends when this does, even if the tests are killed
                stdout=subprocess.DEVNULL,  # what libraries print when they are imported
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        try:
            yield address
        finally:
            server.communicate()


def is_off() -> bool:
    """Whether Ray starts its workers itself."""
    return os.environ.get("RZEN_TEST_RAY_WORKERS") == "own"


@contextmanager
def forked_workers(address: str | None) -> Iterator[None]:
    """Let a Ray that is started in the block have forks for workers, and no process that looks for log lines."""
    from ray._private.parameter import RayParams

    if address is None:
        yield
        return
    # Its statistics of workers, every 5 s by default, are for a dashboard.
    environment = {ray_worker.SOCKET: address, "REPORTER_UPDATE_INTERVAL_MS": "60000"}
    chosen = functools.partialmethod(
        RayParams.__init__, setup_worker_path=ray_worker.__file__, include_log_monitor=False
    )
    with patch.object(RayParams, "__init__", chosen), patch.dict(os.environ, environment):
        yield


@dataclass(frozen=True)
class _Request:
    """A process that Ray has started for a worker, which waits until its fork is there."""

    connection: socket.socket
    files: list[int]
    arguments: list[str]
    environment: dict[str, str]
    folder: str

    @classmethod
    def receive(cls, listener: socket.socket) -> _Request | None:
        """Wait for the next one. None if the tests have ended."""
        if listener not in select.select([listener, sys.stdin], [], [])[0]:
            return None
        connection, _ = listener.accept()
        _, files, _, _ = socket.recv_fds(connection, 1, 3)
        with connection.makefile("rb") as stream:
            return cls(connection, files, **json.load(stream))

    def close(self) -> None:
        self.connection.close()
        for file in self.files:
            os.close(file)


def _serve(listener: socket.socket) -> None:
    request = _Request.receive(listener)
    if request:
        # Ray's C++ library reads these two when it is imported. Ray starts workers of no job in advance.
        os.environ |= {"RAY_RAYLET_PID": request.environment["RAY_RAYLET_PID"], "RAY_JOB_ID": _NO_JOB}
        _import_libraries()
        _check_threads()
        gc.freeze()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    while request:
        if os.fork() == 0:
            listener.close()
            _become_worker(request)
        request.close()
        request = _Request.receive(listener)


def _import_libraries() -> None:
    import ray.actor
    from ray._raylet import ActorClassID

    # Ray's generator of ids would be seeded here, and all forks would draw the same ones, if a library drew an id.
    source = SimpleNamespace(from_random=lambda: ActorClassID(os.urandom(ActorClassID.size())))
    with importing_models(), patch.object(ray.actor, "ActorClassID", source):
        for name in _LIBRARIES:
            importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] in _OURS]:
        del sys.modules[name]


def _check_threads() -> None:
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    others = [name for name in threads if name != _RESTARTED]
    assert len(others) == 1, f"a library has started threads, which forks would lack: {others}"


def _become_worker(request: _Request) -> None:
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setpgid(0, 0)  # Ray ends the group of a worker that is gone
        for number, file in enumerate(request.files):
            os.dup2(file, number)
        os.chdir(request.folder)
        os.environ.clear()
        os.environ.update(request.environment)
        request.connection.sendall(b"\n")
        request.close()
        sys.argv = request.arguments
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
