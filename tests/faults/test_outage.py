"""A run whose store goes away, whose disk is full for a while, and whose worker is killed: it ends as a quiet one.

RZEN_TEST_OUTAGE_S is how long the store is away.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from jobs.training.runs import LATEST, LOG, Run
from jobs.training.specs import TrainSpec
from pipelines.storage.location import open_store
from tests.data import publish
from tests.faults.s3_proxy import StormyProxy
from tests.paths import ROOT
from tests.specs import stage

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]
OUTAGE_S = float(os.environ.get("RZEN_TEST_OUTAGE_S", "20"))
STEPS = 200
DISK_BYTES = 64 << 20


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system for temporary files that is filled easily."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small tmpfs here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """A disk without a free byte."""
    filler = folder / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 4096):
                with suppress(OSError):
                    while file.write(bytes(size)):
                        pass
        yield
    finally:
        filler.unlink()


def start(spec: Path, endpoint: str, scratch: Path, ray_folder: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"AWS_ENDPOINT_URL": endpoint, "TMPDIR": str(scratch)}
    environment |= {"RZEN_CACHE": str(scratch.parent / "cache"), "RAY_TMPDIR": ray_folder}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "jobs.run", str(spec)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """A folder for the sockets of a Ray: their paths must be short."""
    folder = tempfile.mkdtemp(prefix="rz", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def wait_for(run: Run, job: subprocess.Popen[bytes], num_steps: int) -> None:
    """Wait until a checkpoint of at least so many steps is there."""
    while job.poll() is None and not (run.store.exists(LATEST) and run.step() >= num_steps):
        time.sleep(0.05)
    assert job.poll() is None, job.stdout and job.stdout.read().decode()


def kill_a_worker(job: subprocess.Popen[bytes]) -> None:
    workers = [child for child in psutil.Process(job.pid).children(recursive=True) if "TrainWorker" in child.name()]
    workers = workers or [
        child
        for child in psutil.Process(job.pid).children(recursive=True)
        if any("RayTrainWorker" in part for part in child.cmdline())
    ]
    workers[0].send_signal(signal.SIGKILL)


def test_outage_full_disk_and_kill_end_with_the_bytes_of_a_quiet_run(
    tmp_path: Path, s3_endpoint: str, ray_folder: str
) -> None:
    url = f"s3://outage-{os.getpid()}"
    bucket = open_store(url, s3_endpoint)
    bucket.ensure_bucket()
    publish(bucket.child("data"), {"red": ("a", 24), "blue": ("b", 30)})
    runs = {}
    for name in ("quiet", "stormy"):
        run = {"root": f"{url}/runs", "tracking": {"tensorboard": False}}
        spec = tmp_path / f"{name}.yaml"
        spec.write_text(stage(url, name=name, run=run, steps=STEPS, checkpoint={"every_steps": 10}))
        fields = {"kind": "train", "name": name, "run": {"root": f"{url}/runs", "endpoint": s3_endpoint}}
        fields |= {"data": {"root": "data"}, "model": {"backbone": "some/model"}}
        runs[name] = Run(TrainSpec.model_validate(fields))

    (tmp_path / "scratch").mkdir()
    quiet = start(tmp_path / "quiet.yaml", s3_endpoint, tmp_path / "scratch", ray_folder)
    out, _ = quiet.communicate()
    assert quiet.returncode == 0, out.decode()

    stormy = runs["stormy"]
    with StormyProxy(s3_endpoint) as proxy, small_disk(tmp_path / "small") as disk:
        job = start(tmp_path / "stormy.yaml", proxy.url, disk, ray_folder)
        lines: list[str] = []
        assert job.stdout is not None
        reader = threading.Thread(target=lambda: lines.extend(line.decode() for line in job.stdout), daemon=True)  # type: ignore[union-attr]
        reader.start()
        wait_for(stormy, job, 10)
        with proxy.outage():
            time.sleep(OUTAGE_S)
        wait_for(stormy, job, 30)
        with full(disk):
            while job.poll() is None and b"not written" not in stormy.store.read(LOG):
                time.sleep(0.2)
        wait_for(stormy, job, 60)
        kill_a_worker(job)
        job.wait()
        reader.join()
    told = "".join(lines)
    assert job.returncode == 0, told
    log = stormy.store.read(LOG).decode()
    assert "no proper answer from" in told, told
    assert "answers again after" in told
    assert "not written, trying again after the next step" in log, log
    assert "restart 1 of" in log
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        found, expected = (runs[run].store.read(f"adapter/{name}") for run in ("stormy", "quiet"))
        assert found == expected or name.endswith("json")
