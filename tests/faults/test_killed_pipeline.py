"""The pipeline of U-MARVEL, killed as a whole machine is: at the end, it has the files of a run that nothing killed.

Each run has a session of its own with a local Ray. SIGKILL ends all processes of the session at once: the driver, Ray
and its workers. The same command then goes on. Both pipelines are written to the same folder, one after the other, so
that the paths in their files are equal.
"""

from __future__ import annotations

import fnmatch
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.runtime.local_s3 import free_port
from pipelines.storage.publish import LEASE, MARK
from tests.paths import ROOT
from tests.umarvel import STAGES, options

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(3000)]
STEPS, CHECKPOINT_STEPS = 24, 3
SEED = int(os.environ.get("RZEN_TEST_KILL_SEED", "11"))
TRAINED = (*STAGES, "reranker")
ALWAYS = ("hard", "mine", "judge", "distil")
"""Jobs in which the pipeline is killed with every seed: training, mining, judging, distillation."""
OUTPUTS = {"mine": "negatives", "candidates": "candidates", "judge": "judged"}
MORE = 2
"""Other jobs in which it is killed, which the seed chooses."""
DIFFERS = (
    "store/runs/*/log.txt",  # these two tell people when a run started, was killed and ended
    "store/runs/*/index.html",
    "store/runs/*/tensorboard/*",  # names and events have times
    "store/runs/*/ray/*",  # marks of Ray Train, with random names
    "store/data/ingest/*",  # ids of groups are made of the times at which the corpus was written
    "*/.rzen-partial-*",  # what a killed process was writing
)
"""Files that differ between two runs. All others are equal, but for the next two."""
VARYING = {"elapsed_s", "feed_wait_s", "feed_wait_fraction", "step_s", "samples_per_s", "tokens_per_s"}
VARYING |= {"cached_fraction"}  # a killed job takes its cache with it
VARYING |= {"key", "id"}  # of a job, with the times at which its inputs were written; random, of a run
"""Keys in JSON whose values differ between two runs."""
_NONCE = re.compile(r"(checkpoints/\d{6})-[0-9a-f]{8}")
"""Folders of checkpoints have random names, as several processes may write one."""


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray puts its sockets: their paths must be short."""
    folder = Path(tempfile.mkdtemp(prefix="rk", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Pipeline:
    """`rzen run` of the pipeline, as often as it is started, with its output in one log."""

    def __init__(self, out: Path, ray_folder: Path) -> None:
        self.out = out
        self._log, self._ray_folder = ray_folder / "log", ray_folder

    def start(self) -> subprocess.Popen[bytes]:
        """Start it in a session of its own, on a Ray of its own."""
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {f"{name}_METRIC_PORT": str(free_port()) for name in ("AUTOSCALER", "DASHBOARD")}
        environment |= {"RAY_TMPDIR": str(self._ray_folder), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "jobs.run", *options(self.out, steps=STEPS, checkpoint_steps=CHECKPOINT_STEPS)]
        with self._log.open("wb") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)

    def finish(self) -> None:
        """Run it to its end."""
        process = self.start()
        try:
            assert process.wait() == 0, self.log
        finally:
            kill_session(process)

    def kill_when(self, is_due: Callable[[], bool]) -> None:
        """Start it, and kill it as soon as something is the case."""
        process = self.start()
        try:
            while not is_due():
                assert process.poll() is None, self.log
                time.sleep(0.002)
        finally:
            kill_session(process)

    @property
    def log(self) -> str:
        """What the last command has printed."""
        return self._log.read_text(errors="replace")

    def num_stored(self, job: str) -> int:
        """Return how many files a job has stored in its output."""
        files = (path for path in (self.out / "store" / OUTPUTS[job]).rglob("*") if path.is_file())
        return sum(path.name not in (MARK, LEASE) for path in files)

    def is_done(self, job: str) -> bool:
        """Return whether a job is recorded as finished."""
        return (self.out / f"store/jobs/{job}.json").exists()

    def jobs(self) -> list[str]:
        """Return the jobs that the last command named, in order."""
        return re.findall(r"^\[\d+/\d+\] (\w+) ", self.log, re.MULTILINE)

    def checkpoint_step(self, job: str) -> int:
        """Return the step of the last checkpoint of a training run. 0 without one."""
        with suppress(FileNotFoundError):
            path = json.loads((self.out / f"store/runs/{job}/latest.json").read_text())["path"]
            return int(Path(path).name.split("-")[0])
        return 0


def kill_session(leader: subprocess.Popen[bytes]) -> None:
    """Kill all processes of a session, which Ray divides into several groups, until none is left."""
    deadline = time.monotonic() + 60
    while members := [pid for pid in psutil.pids() if session_of(pid) == leader.pid]:
        assert time.monotonic() < deadline, members
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        leader.poll()
        time.sleep(0.01)
    leader.wait()


def session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def files_of(folder: Path) -> dict[str, bytes]:
    """Return all files that must be equal, without the times and random names in them."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(fnmatch.fnmatch(name, pattern) for pattern in DIFFERS):
            found[_NONCE.sub(r"\1", name)] = as_compared(path)
    return found


def as_compared(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix not in (".json", ".jsonl") or not any(f'"{key}"'.encode() in data for key in (*VARYING, "path")):
        return data
    lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
    return _NONCE.sub(r"\1", json.dumps([_unvaried(json.loads(line)) for line in lines])).encode()


def _unvaried(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unvaried(inner) for key, inner in value.items() if key not in VARYING}
    return [_unvaried(inner) for inner in value] if isinstance(value, list) else value


def test_a_pipeline_that_is_killed_in_many_jobs_ends_with_the_same_bytes(tmp_path: Path, ray_folder: Path) -> None:
    pipeline = Pipeline(tmp_path / "work", ray_folder)
    pipeline.finish()
    jobs = pipeline.jobs()
    pipeline.out.rename(tmp_path / "whole")

    rng = random.Random(SEED)
    others = [job for job in jobs if job in {*TRAINED, *OUTPUTS} - {*ALWAYS}]
    chosen = {*ALWAYS, *rng.sample(others, MORE)}
    cut_short = []
    for job in (job for job in jobs if job in chosen):
        if job in TRAINED:
            step = rng.randrange(CHECKPOINT_STEPS, STEPS // 2, CHECKPOINT_STEPS)
            pipeline.kill_when(lambda job=job, step=step: pipeline.checkpoint_step(job) >= step)
            is_cut = not (pipeline.out / f"store/runs/{job}/done.json").exists()
            print(f"killed {job} after the checkpoint of step {pipeline.checkpoint_step(job)}: {is_cut}")
        else:
            count = rng.randint(1, 2)
            pipeline.kill_when(lambda job=job, count=count: pipeline.num_stored(job) >= count)
            is_cut = not pipeline.is_done(job)
            print(f"killed {job} with {pipeline.num_stored(job)} files: {is_cut}")
        cut_short += [job] * is_cut
    assert len(cut_short) >= len(ALWAYS), "the other kills came when the job had just ended"
    pipeline.finish()

    whole, killed = files_of(tmp_path / "whole"), files_of(pipeline.out)
    only = sorted(whole.keys() ^ killed.keys())
    differing = sorted(name for name in whole.keys() & killed.keys() if whole[name] != killed[name])
    assert (only, differing) == ([], [])
    print(f"{len(whole)} files are equal")
    adapters = {f"store/runs/{stage}/adapter/adapter_model.safetensors" for stage in STAGES[2:]}
    tables = {"store/judged/candidates.json", "store/teacher/candidates.json", "scores_distil/results.json"}
    assert adapters | tables <= whole.keys()
