"""Stage 2 on a cluster that starts without a CPU, grows to two nodes, loses one of them, and goes back to none."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.training.runs import LATEST, LOG, METRICS
from pipelines.storage.location import open_store
from tests.data import publish
from tests.faults.autoscaling import autoscaling_cluster, short_folder, until
from tests.paths import ROOT
from tests.specs import BACKBONE

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.nightly]
STEPS, EVERY_STEPS = 40, 4
NODE_CPUS, WORKER_CPUS, TASK_CPUS = 2.0, 1.5, 0.5  # a node holds one worker and one task of the feed
IDLE_S = 12.0
WAIT_S = 300  # at most, on a machine that is busy with other things
UNTRACKED = {"RAY_TRAIN_ENABLE_STATE_TRACKING": "0"}  # the cluster has no dashboard that would show it


def write_spec(folder: Path, name: str, cluster: dict[str, Any]) -> Path:
    """`jobs/stage2.yaml` as it is shipped, with sizes of this machine."""
    fields = {
        "base": str(ROOT / "jobs/stage2.yaml"),
        "name": name,
        "run": {"root": str(folder / "runs")},
        "data": {"root": str(folder / "data")},
        "feed": {"samples_per_task": 16, "cpus_per_task": TASK_CPUS},
        "model": {
            "backbone": BACKBONE | {"vocabulary": 400},
            "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
            "prompt": {"max_visual_tokens": 4},
            "dtype": "float32",
            "gradient_checkpointing": False,
        },
        "init_adapter": None,
        "objective": {"false_negatives": {"warmup_steps": 5}},
        "global_batch": 4,
        "steps": STEPS,
        "checkpoint": {"every_steps": EVERY_STEPS},
        "cluster": {"workers": 2, "gpus_per_worker": 0} | cluster,
    }
    spec = folder / f"{name}.yaml"
    spec.write_text(yaml.safe_dump(fields))
    return spec


@contextmanager
def job(spec: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """`rzen run SPEC`; what it says is in the file that `said` reads."""
    with spec.with_suffix(".out").open("wb") as out:
        command = [sys.executable, "-m", "jobs.run", str(spec)]
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.terminate()  # nothing, where it has ended
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def said(spec: Path) -> str:
    return spec.with_suffix(".out").read_text(errors="replace")


def outcome(run: Path) -> tuple[list[float], bytes]:
    """Losses of all steps, and the adapter they led to."""
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS))
    return [row["loss"] for row in rows], (run / "adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.timeout(600)
def test_a_cluster_grows_for_stage_2_replaces_a_killed_node_and_goes_back_to_nothing(tmp_path: Path) -> None:
    publish(open_store(str(tmp_path / "data")), {"red": ("a", 24), "blue": ("b", 30)})
    quiet = write_spec(tmp_path, "quiet", {"cpus_per_worker": 0.5})
    stormy = write_spec(tmp_path, "stormy", {"cpus_per_worker": WORKER_CPUS, "autoscaling": True})
    run = tmp_path / "runs/stormy"

    with autoscaling_cluster(num_nodes=2, cpus=NODE_CPUS, idle_s=IDLE_S) as cluster:
        assert cluster.has_autoscaler_v2()
        assert cluster.nodes() == {}
        with job(stormy, RAY_ADDRESS=cluster.address, **UNTRACKED) as process:

            def wait_for(what: str, condition: Any) -> None:
                def holds() -> bool:
                    ended = process.poll() is not None
                    result = bool(condition())
                    assert result or not ended, f"the job ended before {what}\n{said(stormy)}"
                    return result

                until(what, holds, WAIT_S, lambda: f"{said(stormy)}\n{cluster.log()}")

            wait_for("two nodes", lambda: len(cluster.living()) == 2)
            wait_for("a checkpoint", (run / LATEST).exists)
            before = cluster.living()
            assert len(before) == 2
            cluster.kill(before[0])
            wait_for("the node is missed", lambda: not cluster.nodes()[before[0]])
            wait_for("another in its place", lambda: set(cluster.living()) - set(before))
            wait_for("the job is done", lambda: process.poll() == 0)
        until("no node is left", lambda: not cluster.living(), WAIT_S, cluster.log)

    restarts = re.findall(r"lost a worker \(\S.*restart (\d) of 3 from step (\d+)", (run / LOG).read_text())
    assert [number for number, _ in restarts] == ["1"]
    assert EVERY_STEPS <= int(restarts[0][1]) < STEPS
    assert f"restart 1 of 3 from step {restarts[0][1]}" in said(stormy)
    with short_folder() as short, job(quiet, RAY_TMPDIR=short) as process:
        assert process.wait(WAIT_S) == 0, said(quiet)
    assert outcome(tmp_path / "runs/quiet") == outcome(run)
