"""`python -m infra.local.up` for tests: a Ray of their own with a dashboard and a token, on ports of their own."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jobs.runtime.local_s3 import free_port
from tests.paths import ROOT

_PATIENCE_S = 60


@dataclass(frozen=True)
class LocalCluster:
    """A cluster whose dashboard answers."""

    folder: Path
    """Of its logs."""
    environment: dict[str, str]
    """Of a shell that has taken over what the cluster said."""
    prometheus: str
    grafana: str
    """URLs, whether these programs are installed or not."""
    head: int
    """The process that started the programs."""


@contextmanager
def local_cluster(*options: str, programs: Path | None = None) -> Iterator[LocalCluster]:
    """Ends with the block, and leaves nothing behind. `programs`: a folder that comes first in PATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    first = [str(programs)] if programs else []
    kept["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # or one would be kept in the home folder
    kept["PATH"] = os.pathsep.join([*first, str(Path(sys.executable).parent), kept["PATH"]])
    folder = Path(tempfile.mkdtemp(prefix="rzi", dir="/tmp"))  # short: sockets of Ray lie in it
    ports = {name: free_port() for name in ("port", "dashboard-port", "client-port", "prometheus-port", "grafana-port")}
    command = [sys.executable, "-m", "infra.local.up", f"--temp-dir={folder}", *options]
    command += [f"--{name}={port}" for name, port in ports.items()]
    process = subprocess.Popen(command, cwd=ROOT, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        told = ""
        while "# Ctrl-C" not in told:
            line = process.stdout.readline()
            assert line, f"it has ended: {told}"
            told += line
        exports = dict(re.findall(r"export (RAY_\w+)=(\S+)", told))
        assert exports["RAY_AUTH_MODE"] == "token"
        urls = [f"http://127.0.0.1:{ports[name]}" for name in ("prometheus-port", "grafana-port")]
        yield LocalCluster(folder, kept | exports, *urls, process.pid)
    finally:
        end(process)
        _remove(folder)


def end(process: "subprocess.Popen[str]") -> None:
    """As Ctrl-C does."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _remove(folder: Path) -> None:
    """Ray's dashboard goes on writing for a moment after its head has ended."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while folder.exists() and time.monotonic() < deadline_s:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.2)
