"""Runs one command with a local S3 server: `python -m jobs.runtime.local_s3 rzen run ...`.

Uses the endpoint that AWS_ENDPOINT_URL names. Without one, it starts moto's server, which needs no account and no
Docker. That server keeps nothing after the command.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
_START_S = 60
_PORTS = range(20_000, 32_768)  # workers of Ray take those below


@contextmanager
def s3_server() -> Iterator[str]:
    """Yield the URL of an empty S3 server, which ends with the block. Raise `RuntimeError` if it does not start."""
    port = free_port()
    command = [sys.executable, "-m", "jobs.runtime.moto_server", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait_for(port, server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on.

    Systems give other ports, from 32768 on, to outgoing connections and to programs that ask for any port. So nothing
    takes this one before the program for which it is meant. Raise `RuntimeError` if all are taken.
    """
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no port from {_PORTS.start} to {_PORTS.stop - 1} is free")


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s:
        if server.poll() is not None:
            raise RuntimeError("moto's server ended: is moto[server] installed?")
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"moto's server did not start in {_START_S} s")


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Ctrl-C reaches the command by itself, being in our process group; it is the command that decides what to do."""
    process = subprocess.Popen(command, env=os.environ | environment)
    while True:
        with suppress(KeyboardInterrupt):
            return process.wait()


if __name__ == "__main__":
    if os.environ.get("AWS_ENDPOINT_URL"):
        sys.exit(_run(sys.argv[1:], {}))
    with s3_server() as endpoint:
        sys.exit(_run(sys.argv[1:], CREDENTIALS | {"AWS_ENDPOINT_URL": endpoint}))
