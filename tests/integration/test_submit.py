"""Jobs on a cluster that was started for them: Ray's own command, with and without the hook, tokens, stop and go on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.runtime.local_s3 import free_port
from pipelines.storage.location import open_store
from tests.data import publish
from tests.paths import ROOT
from tests.plug_in import write_plug_in
from tests.specs import stage

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
BIN = Path(sys.executable).parent
HOOK = {"RAY_JOB_SUBMIT_HOOK": "jobs.hook.submit"}
CORPUS = (
    '#!/usr/bin/env -S python -m jobs.run\nkind: corpus\nout: "{0}/corpus"\ncorpus: {{num_images: 4, num_composed: 0, '
)
CORPUS += "num_documents: 0, num_clips: 0, num_texts: 0}}\n"


def train(root: Path, steps: int) -> str:
    """A run that takes no checkpoint by itself."""
    run = {"root": f"{root}/runs", "tracking": {"tensorboard": False}}
    return stage(str(root), name="stopped", run=run, steps=steps, checkpoint={"every_steps": 10_000})


@dataclass
class Cluster:
    """A head with its dashboard, on which every request needs a token."""

    environment: dict[str, str]

    def run(self, *command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=cwd, env=self.environment | variables, capture_output=True, text=True, timeout=300
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """As `python -m infra.local.up` starts it, in the folder of the repository."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    kept["PATH"] = os.pathsep.join([str(BIN), kept["PATH"]])
    ports = {name: free_port() for name in ("port", "dashboard-port", "client-port", "prometheus-port")}
    with tempfile.TemporaryDirectory(prefix="rz", dir="/tmp") as folder:
        options = [f"--{name}={port}" for name, port in ports.items()]
        command = [sys.executable, "-m", "infra.local.up", "--num-cpus=4", f"--temp-dir={folder}", *options]
        process = subprocess.Popen(command, cwd=ROOT, env=kept, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            told = ""
            while "# Ctrl-C" not in told:
                line = process.stdout.readline()
                assert line
                told += line
            exports = dict(re.findall(r"(RAY_\w+)=(\S+)", told))
            exports.pop("RAY_ADDRESS")  # a laptop knows the dashboard alone
            cluster = Cluster(kept | exports)
            deadline = time.monotonic() + 90
            while cluster.run("ray", "job", "list", cwd=ROOT).returncode != 0:
                assert time.monotonic() < deadline
                time.sleep(1)
            yield cluster
        finally:
            process.terminate()
            process.wait(60)


def test_the_literal_command_runs_a_spec_where_the_cluster_was_started(cluster: Cluster, tmp_path: Path) -> None:
    """Without the hook: Ray runs the file itself, in the folder that the head was started in."""
    spec = tmp_path / "corpus.yaml"
    spec.write_text(CORPUS.format(tmp_path))
    spec.chmod(0o755)
    done = cluster.run("ray", "job", "submit", str(spec), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 samples in" in done.stdout
    assert (tmp_path / "corpus").is_dir()


def test_with_the_hook_the_folder_travels_along(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "laptop").mkdir()
    (tmp_path / "laptop/corpus.yaml").write_text(CORPUS.format(tmp_path))
    done = cluster.run(
        "ray", "job", "submit", "--", "corpus.yaml", "--set", "corpus.num_images=5", cwd=tmp_path / "laptop", **HOOK
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for told in ("5 samples in", "dashboard  http://", "ray job stop raysubmit_", "succeeded"):
        assert told in done.stdout


def test_a_job_that_fails_gives_its_exit_status_and_one_message(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(train(tmp_path, 3))  # there are no data
    done = cluster.run("rzen", "submit", "train.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(r"error: .*/data.*manifest", done.stdout)
    assert "Traceback" not in done.stdout
    mistake = cluster.run("ray", "job", "submit", "--", "train.yaml", "--set", "steps=-1", cwd=tmp_path, **HOOK)
    assert mistake.returncode == 1
    assert "error: --set steps=-1: steps=-1: input should be" in mistake.stderr
    assert "submitted" not in mistake.stdout  # a mistake in a spec never gets to the cluster


def test_a_kind_of_another_package_is_submitted(cluster: Cluster, tmp_path: Path) -> None:
    """Its package is in the folder that is sent along."""
    folder = tmp_path / "laptop"
    write_plug_in(folder)
    (folder / "count.yaml").write_text(f'kind: count\nfile: count.yaml\nout: "{tmp_path}/lines.json"\n')
    unknown = cluster.run("rzen", "submit", "count.yaml", cwd=folder)
    assert "kind='count' is not a kind of job" in unknown.stderr
    path = os.pathsep.join([str(folder), cluster.environment["PYTHONPATH"]])
    done = cluster.run("rzen", "submit", "count.yaml", cwd=folder, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "lines.json").read_text()) == {"lines": 3, "runs": 1}


def test_without_the_token_nobody_submits(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "corpus.yaml").write_text(CORPUS.format(tmp_path))
    for wrong in ({"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}):
        done = cluster.run("rzen", "submit", "corpus.yaml", cwd=tmp_path, **wrong)
        assert done.returncode == 1
        assert "asks for a token" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "corpus").exists()


@pytest.mark.long
def test_a_stopped_job_leaves_a_checkpoint_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    publish(open_store(str(tmp_path / "data")), {"red": ("text_image", 24)})
    (tmp_path / "train.yaml").write_text(train(tmp_path, 600))
    started = cluster.run("rzen", "submit", "train.yaml", "--no-wait", cwd=tmp_path)
    assert started.returncode == 0
    (job,) = re.findall(r"submitted (\S+)", started.stdout)
    run = tmp_path / "runs/stopped"
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < deadline, cluster.run("ray", "job", "logs", job, cwd=tmp_path).stdout
        time.sleep(0.2)
    stopped = cluster.run("ray", "job", "stop", job, cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    log = cluster.run("ray", "job", "logs", job, cwd=tmp_path).stdout
    assert "saving; the same command resumes from there" in log
    checkpoint = json.loads((run / "latest.json").read_text())["path"]  # the spec asks for none
    step = json.loads((run / checkpoint / "state.json").read_text())["step"]
    assert 0 < step < 600

    (tmp_path / "train.yaml").write_text(train(tmp_path, 600))
    again = cluster.run("rzen", "submit", "train.yaml", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"resumes from step {step}" in again.stdout
    rows = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(600))
