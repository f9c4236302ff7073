"""Start the fork server and let a local Ray take its workers from it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from ray._private.parameter import RayParams

from tests.paths import ROOT
from tests.ray_workers.worker import SOCKET


@contextmanager
def forked_ray_workers(folder: str) -> Iterator[None]:
    """Run a fork server with its socket in `folder`. A Ray that starts meanwhile in this process uses it."""
    path = str(Path(folder, "fork.sock"))
    command = [sys.executable, "-m", "tests.ray_workers.server", path]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        while (line := server.stdout.readline()) != "ready\n":  # DeepSpeed prints a warning first
            assert line, "the fork server has ended"
        os.environ[SOCKET] = path
        update = RayParams.update_if_absent

        def with_our_script(self: RayParams, **settings: object) -> None:
            if "worker_path" in settings:
                settings["worker_path"] = str(Path(__file__).with_name("worker.py"))
            update(self, **settings)

        with mock.patch.object(RayParams, "update_if_absent", with_our_script):
            yield
        server.stdin.close()
