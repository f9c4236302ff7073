"""Lost workers, data that cannot be used, clusters that are too small: what `rzen run` makes of them."""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.runtime.lease import HeldLeases
from jobs.runtime.progress import Progress, RunTable
from jobs.training import train
from jobs.training.fit import FAILURE, prepare
from jobs.training.runs import LOG, PAGE, Run, read_held_out
from jobs.training.specs import TrainSpec
from pipelines.errors import UserError
from pipelines.storage.location import open_store
from tests.data import publish, publish_candidates

pytestmark = [pytest.mark.ray, pytest.mark.slow]
KILLS = int(os.environ.get("RZEN_TEST_KILLS", "2"))  # five at most; each takes half a minute


def make_spec(tmp_path: Path, name: str, **changes: Any) -> TrainSpec:
    fields: dict[str, Any] = {
        "kind": "train",
        "name": name,
        "run": {"root": str(tmp_path / "runs")},
        "data": {"root": str(tmp_path / "data"), "mixture": {"resample": {"every_steps": 20}}},
        "feed": {"samples_per_task": 16, "cpus_per_task": 0.5},
        "model": {
            "backbone": {"vocabulary": 400},
            "lora": {"rank": 4, "dropout": 0.1},
            "prompt": {"max_visual_tokens": 4},
            "dtype": "float32",
            "gradient_checkpointing": False,
        },
        "objective": {"false_negatives": {"warmup_steps": 5}},
        "global_batch": 4,
        "steps": 40,
        "checkpoint": {"every_steps": 4},
        "cluster": {"workers": 2, "cpus_per_worker": 0.5, "max_restarts": 5},
    }
    return TrainSpec.model_validate(fields | changes)


def outcome(spec: TrainSpec) -> tuple[list[float], bytes]:
    """Losses of all steps, and the weights they led to."""
    store = Run(spec).store
    rows = [json.loads(line) for line in store.read("metrics.jsonl").splitlines()]
    assert [row["step"] for row in rows] == list(range(40))
    return [row["loss"] for row in rows], store.read("adapter/adapter_model.safetensors")


def held_out_scores(spec: TrainSpec) -> dict[int, Any]:
    """Step -> scores of all sources. Each step is there once."""
    rows = read_held_out(Run(spec).store)
    found = {row["step"]: row["sources"] for row in rows}
    assert len(found) == len(rows)
    return found


def steps_done(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the table of the only run has shown so far."""
    done: list[int] = []
    update = RunTable.update

    def record(table: RunTable, name: str, news: Progress, every: int) -> None:
        done.append(news.done)
        update(table, name, news, every)

    monkeypatch.setattr(RunTable, "update", record)
    return done


def kill_workers(steps: list[int], done: list[int], killed: list[int]) -> None:
    """SIGKILL to one of the workers as soon as the run has come to each of these steps."""
    for number, step in enumerate(steps):
        workers: list[int] = []
        while len(workers) < 2 or not done or done[-1] < step or workers[number % 2] in killed:
            time.sleep(0.01)
            ours = psutil.Process().children(recursive=True)
            workers = [process.pid for process in ours if "TrainWorker" in name_of(process)]
        os.kill(workers[number % 2], signal.SIGKILL)
        killed += workers
        done.clear()


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_run_that_loses_workers_ends_with_the_same_bytes(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = open_store(str(tmp_path / "data"))
    manifest = publish(stored, {"red": ("a", 24), "blue": ("b", 30)}, bad={"blue": [3]})
    publish(stored, {"red": ("a", 7), "blue": ("b", 5)}, split="held_out")
    publish_candidates(
        open_store(str(tmp_path / "table")),
        stored,
        manifest,
        {"red": {n: [30 + (n + some) % 24 for some in range(1, 9)] for n in range(24)}, "blue": {4: [3, 9, 40]}},
        dropped={"red": [5]},
        clusters={"red": {n: n % 6 for n in range(12)}},
    )
    data = {
        "root": str(tmp_path / "data"),
        "mixture": {"resample": {"every_steps": 20}},
        "candidates": str(tmp_path / "table"),
        "negatives_per_sample": 4,
        "negatives_draw": "random",
        "max_bad_fraction": 0.5,
    }
    quiet = make_spec(tmp_path, "quiet", data=data, eval={"every_steps": 10})
    stormy = make_spec(tmp_path, "stormy", data=data)
    train.run(quiet)

    steps = sorted(random.Random(4).sample(range(1, 36), KILLS))
    done, killed = steps_done(monkeypatch), []
    killer = threading.Thread(target=kill_workers, args=(steps, done, killed), daemon=True)
    killer.start()
    train.run(stormy)
    killer.join(timeout=1)

    assert not killer.is_alive()
    assert len(killed) == 2 * KILLS  # each time before the end
    assert Run(stormy).store.exists(FAILURE)
    assert outcome(quiet) == outcome(stormy)
    seldom, often = held_out_scores(quiet), held_out_scores(stormy)  # how often changes nothing
    assert (list(seldom), list(often)) == (list(range(0, 41, 10)), list(range(0, 41, 4)))
    assert all(often[step] == seldom[step] for step in (0, 20, 40))
    assert b"that is finished" in Run(stormy).store.read(PAGE)
    phases = Run(quiet).phases()
    assert [phase.first_step for phase in phases] == [20]
    assert phases[0].weights["red"] != phases[0].weights["blue"]
    assert Run(stormy).phases() == phases

    tags = Run(stormy).store.tags()
    train.run(stormy)  # finished: nothing happens
    assert Run(stormy).store.tags() == tags


@pytest.mark.long
def test_the_largest_chunk_that_fits_is_found_once_and_kept(tmp_path: Path, ray_cluster: None) -> None:
    publish(open_store(str(tmp_path / "data")), {"red": ("a", 24)})
    limited = {"workers": 2, "cpus_per_worker": 0.5, "chunk_tokens": "auto", "memory_gib": 0.007}
    spec = make_spec(tmp_path, "auto", data={"root": str(tmp_path / "data")}, steps=2, cluster=limited)
    train.run(spec)
    assert Run(spec).chunk_tokens() == 256  # two of a worker's four inputs
    assert Run(spec).store.read(LOG).count(b"reads chunks of 256 tokens") == 1


@pytest.mark.long
def test_source_without_a_usable_sample_stops_the_run_with_one_message(tmp_path: Path, ray_cluster: None) -> None:
    publish(open_store(str(tmp_path / "data")), {"red": ("a", 24)}, bad={"red": range(24)})
    with pytest.raises(UserError, match="red: has no sample left to replace a bad one in step 0"):
        train.run(make_spec(tmp_path, "bad"))


def test_cluster_without_cpus_for_the_feed_is_refused_at_once(tmp_path: Path, ray_cluster: None) -> None:
    publish(open_store(str(tmp_path / "data")), {"red": ("a", 24)})
    spec = make_spec(tmp_path, "large", cluster={"workers": 4, "cpus_per_worker": 1.0})
    with pytest.raises(UserError, match=r"has 4 CPUs: 4 workers x 1 \+ 0.5 for the data loader need 4.5"):
        train.run(spec)


def test_batch_that_workers_cannot_share_is_refused(tmp_path: Path) -> None:
    publish(open_store(str(tmp_path / "data")), {"red": ("a", 24)})
    with pytest.raises(UserError, match="batches of source 'red' have 4 samples, which 3 workers cannot share evenly"):
        prepare(make_spec(tmp_path, "odd", cluster={"workers": 3}), HeldLeases())
