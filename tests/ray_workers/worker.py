"""Stand in for Ray's `default_worker.py`: ask the fork server for a worker, and run Ray's own file when it is gone."""

import array
import json
import os
import socket
import sys
from pathlib import Path

SOCKET = "RZEN_TEST_FORK_SERVER"


def ask(path: str) -> None:
    """Send arguments, environment, folder and output to the server, and wait until it has forked."""
    request = json.dumps({"argv": sys.argv[1:], "environment": dict(os.environ), "folder": str(Path.cwd())}).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.connect(path)
        outputs = array.array("i", [1, 2])
        server.sendmsg([len(request).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, outputs)])
        server.sendall(request)
        if not server.recv(1):
            raise ConnectionError("the server has refused")


def ray_worker() -> Path:
    """Return Ray's own file."""
    import ray

    return Path(ray.__file__).parent / "_private" / "workers" / "default_worker.py"


if __name__ == "__main__":
    try:
        ask(os.environ[SOCKET])
    except OSError:
        os.execv(sys.executable, [sys.executable, str(ray_worker()), *sys.argv[1:]])
