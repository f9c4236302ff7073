"""The fork server: `python -m tests.ray_workers.server SOCKET`. It ends when its standard input is closed."""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from typing import Any

import numpy

from tests.ray_workers.worker import ray_worker

# Not Ray: its library reads the worker's settings and seeds its random ids when it is imported. Forks of a process with
# Ray would give equal ids to different objects.
PRELOADED = ("deepspeed", "pandas", "pyarrow.dataset", "rzen.training.worker", "pipelines.feed.reader")
INHERITED = [path for path in sys.path if path not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]


def serve(path: str) -> None:
    """Fork a worker for each request that arrives at the socket."""
    for name in PRELOADED:
        __import__(name)
    assert "ray" not in sys.modules
    assert threading.active_count() == 1, "a fork would lose these threads"
    gc.freeze()  # a collection in a worker would write to, and so copy, the memory that it shares
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel takes workers that have ended
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            client, _ = listener.accept()
            with client, contextlib.suppress(OSError):
                request, outputs = receive(client)
                if os.fork() == 0:
                    listener.close()
                    client.sendall(b"1")
                    client.close()
                    become(request, outputs)
                for output in outputs:
                    os.close(output)


def receive(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Read a request and the descriptors of its output."""
    outputs = array.array("i")
    size, ancillary, _, _ = client.recvmsg(4, socket.CMSG_SPACE(2 * outputs.itemsize))
    for _, _, data in ancillary:
        outputs.frombytes(data)
    with client.makefile("rb") as file:
        return json.loads(file.read(int.from_bytes(size, "big"))), list(outputs)


def become(request: dict[str, Any], outputs: list[int]) -> None:
    """Run Ray's `default_worker.py` in this process, which is a new fork, and end the process."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for target, output in enumerate([os.open(os.devnull, os.O_RDONLY), *outputs]):
            os.dup2(output, target)
        for output in outputs:
            os.close(output)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        python_path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:] = [*filter(None, python_path), *INHERITED]
        sys.argv[:] = [str(ray_worker()), *request["argv"]]
        numpy.random.seed()  # else all workers would draw the same numbers; `random` does this itself
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by `sys.exit`: to tear down all that the server has imported would copy its memory and take seconds.
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
