"""The Ray that we start listens on 127.0.0.1 only: its workers, its agents and its metrics."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.infra.local_cluster import local_cluster
from tests.paths import ROOT

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the sockets of processes are read from /proc"),
]
LOCAL = """
import os, time
from jobs.runtime.cluster import ray_cluster, set_environment
set_environment()
import ray
from tests.cases.test_safety_ports import addresses, below
with ray_cluster():
    ray.get(ray.remote(lambda: 1).remote())
    time.sleep(1)
    print(*sorted(addresses(below(os.getpid()))))
"""


def below(pid: int) -> list[int]:
    """Return a process and all that it started."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def addresses(pids: list[int]) -> set[str]:
    """Return the addresses, in hexadecimal, on which processes listen for TCP."""
    listening = {}
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                listening[f"socket:[{fields[9]}]"] = fields[1].partition(":")[0]
    found = set()
    for pid in pids:
        try:
            links = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        found |= {listening[link] for link in links if link in listening}
    return found


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_a_local_ray_listens_on_loopback(tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", LOCAL]
    answer = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=200, check=True
    )
    found = set(answer.stdout.split())
    assert found
    assert found <= LOOPBACK


def test_a_ray_with_monitoring_listens_on_loopback_and_takes_jobs():
    with local_cluster("--num-cpus=1") as cluster:
        script = "import ray; ray.init(log_to_driver=False); print(ray.get(ray.remote(lambda: 7).remote()))"
        command = [sys.executable, "-c", script]
        answer = ""
        for _ in range(30):  # the head takes a while to answer
            run = subprocess.run(
                command, capture_output=True, text=True, env=cluster.environment, timeout=120, check=False
            )
            answer = run.stdout
            if run.returncode == 0:
                break
        assert answer.strip().endswith("7")
        heads = [
            int(entry.parent.name)
            for entry in Path("/proc").glob("[0-9]*/cmdline")
            if f"--temp-dir={cluster.folder}".encode() in _read(entry)
        ]
        found = addresses([pid for head in heads for pid in below(head)])
        assert found
        assert found <= LOOPBACK


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
