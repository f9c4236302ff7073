"""A node that announces its end: a checkpoint at once, and the run goes on elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.training import train
from jobs.training.fit import FAILURE
from jobs.training.runs import LATEST, Run
from pipelines.storage.location import open_store
from tests.data import publish
from tests.faults.test_restart import make_spec, steps_done

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]
STEPS = 120
DRAIN_S = 30


@pytest.fixture
def spot_node(ray_cluster: None) -> Iterator[subprocess.Popen[bytes]]:
    """A second node of three CPUs, which is drained when it gets SIGTERM, as a pod or a spot machine does."""
    import ray

    address = ray.get_runtime_context().gcs_address
    command = [str(Path(sys.executable).with_name("ray")), "start", f"--address={address}", "--num-cpus=3", "--block"]
    environment = os.environ | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S)}
    node = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: ray.cluster_resources().get("CPU", 0) == 7)
        yield node
    finally:
        node.terminate()  # a second time changes nothing
        node.wait(2 * DRAIN_S)
        until(lambda: ray.cluster_resources().get("CPU", 0) == 4)


def until(condition: Any, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.timeout(400)
def test_a_preempted_run_checkpoints_at_once_and_goes_on_elsewhere(
    tmp_path: Path, spot_node: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")  # jobs of other tests on a local Ray turn it off
    done = steps_done(monkeypatch)
    head = ray.get_runtime_context().get_node_id()
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(head, soft=False)
    # The first node is full, so that the feed runs where the workers do: drained, that node takes no more of its tasks.
    holder = ray.remote(num_cpus=4, scheduling_strategy=here)(Holder).remote()
    ray.get(holder.ready.remote())

    publish(open_store(str(tmp_path / "data")), {"red": ("a", 24), "blue": ("b", 30)})
    data = {"root": str(tmp_path / "data")}
    spec = make_spec(tmp_path, "spot", data=data, steps=STEPS, checkpoint={"every_steps": 10**6})
    store = Run(spec).store
    seen: list[int] = []

    def preempt() -> None:
        until(lambda: done and done[-1] >= 3)
        spot_node.send_signal(signal.SIGTERM)
        until(lambda: store.exists(LATEST), DRAIN_S)
        seen.append(Run(spec).step())
        ray.kill(holder)  # room for the run where it was full

    watcher = threading.Thread(target=preempt, daemon=True)
    watcher.start()
    train.run(spec)
    watcher.join()
    assert 3 <= seen[0] < STEPS
    rows = [json.loads(line) for line in store.read("metrics.jsonl").splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert not store.exists(FAILURE)  # Ray Train restarts it by itself, and does not count it as a failure


class Holder:
    """Takes room."""

    def ready(self) -> None:
        pass
