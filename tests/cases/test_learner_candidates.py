"""Training with side tables on several ranks: a run that pauses and resumes ends with the bytes of one that does not.

The batches come from the reader without Ray, encoded and contrasted as in a run.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.candidates.types import NO_CLUSTER, CandidateManifest, PlanRows, TableData
from pipelines.candidates.write import publish_table
from pipelines.config import DataConfig, MixtureConfig
from pipelines.feed.batch import FeedBatch
from pipelines.feed.reader import Reader
from pipelines.plan.build import build_plan
from pipelines.storage.location import open_store
from rzen.config import LoraConfig, MinedConfig, ObjectiveConfig, OptimConfig
from rzen.inputs.pairs import PairEncoder
from rzen.inputs.processor import Processor
from rzen.training.stage import Stage
from rzen.training.telemetry import Row
from rzen.training.worker import train_stage
from tests.data import publish, publish_candidates
from tests.gloo import run_workers
from tests.integration.test_training import Folders
from tests.tiny import PROMPT, tiny_checkpoint, tiny_model

pytestmark = pytest.mark.slow


@dataclass
class Trained:
    """What a rank has seen: metrics on rank 0, and the samples of each step."""

    rows: list[Row] = field(default_factory=list)
    keys: list[tuple[str, ...]] = field(default_factory=list)
    weights: bytes = b""


def train(
    rank: int, world_size: int, root: Path, data: DataConfig, objective: ObjectiveConfig, steps: int, pause: int
) -> list[Trained]:
    """Train without a pause, and with one after `pause` steps, each part in a new reader. 0: without one only."""
    model_dir = str(root / "base")
    found = []
    for name, stops in (("whole", [None]), ("paused", [pause, None]))[: 2 if pause else 1]:
        trained = Trained()
        folder = root / f"{name} {world_size}"
        folder.mkdir(exist_ok=True)
        for stop in stops:
            reader = Reader(data, PairEncoder(Processor(model_dir, PROMPT)))
            plan = build_plan(reader.tables(), data.mixture, global_batch=6, steps=steps)
            worker = pickle.loads(pickle.dumps(reader))

            def batches(start: int, plan: Any = plan, worker: Any = worker) -> Iterator[FeedBatch]:
                for step in range(start, steps):
                    fed = worker.batch(plan, step, rank, world_size)
                    trained.keys.append(fed.batch.keys)  # noqa: B023
                    yield fed

            before = folder / f"step-{pause:06d}"
            model = tiny_model(model_dir).model_copy(update={"lora": LoraConfig(rank=2)})
            train_stage(
                Stage(model, objective, OptimConfig(), steps, 0, pause or steps, plan.fingerprint(), stop=stop),
                backbone_dir=model_dir,
                init_adapter=None,
                tasks=["a"],
                batches=batches,
                checkpoints=Folders(folder, before if stop is None and len(stops) > 1 else None),
                output=folder / "adapter",
                on_metrics=trained.rows.append,
            )
        if rank == 0:
            trained.weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        found.append(trained)
    return found


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_a_run_with_a_table_resumes_with_the_same_bytes(tmp_path: Path, shared: bool) -> None:
    tiny_checkpoint(tmp_path / "base")
    stored = open_store(str(tmp_path / "data"))
    manifest = publish(stored, {"red": ("a", 24)}, bad={"red": [7]})
    publish_candidates(
        open_store(str(tmp_path / "table")),
        stored,
        manifest,
        {"red": {n: [(n + 1 + some) % 24 for some in range(1 + n % 5)] for n in range(24)}},  # unequal numbers
        dropped={"red": [5]},
        clusters={"red": {n: n % 4 for n in range(8)}},
    )
    data = DataConfig(
        root=str(tmp_path / "data"),
        candidates=str(tmp_path / "table"),
        negatives_per_sample=4,
        negatives_draw="random",
        mixture=MixtureConfig(run_length=2),
    )
    objective = ObjectiveConfig(mined=MinedConfig(shared=shared))
    whole, paused = run_workers(train, 2, tmp_path, data, objective, 4, 2)[0]
    assert [row["loss"] for row in whole.rows] == [row["loss"] for row in paused.rows]
    assert sum(int(row["bad_candidates"]) for row in whole.rows) > 0
    assert whole.weights == paused.weights != b""


def test_ranks_train_on_the_samples_that_one_process_draws_by_weights_and_resume(tmp_path: Path) -> None:
    """Of 24 samples, 3 are dropped, and an epoch takes 6 of 12 with a weight: two batches of 6, and 3 samples over."""
    tiny_checkpoint(tmp_path / "base")
    manifest = publish(open_store(str(tmp_path / "data")), {"red": ("a", 24)})
    sources = {"red": manifest.sources["red"].fingerprint}
    keep, weight = np.ones(24, np.bool_), np.ones(24, np.float32)
    keep[[5, 17, 20]] = False
    weight[:12] = 0.5
    weight[5] = 1.0
    weight[12] = 0.5
    rows = PlanRows.of(keep, np.full(24, NO_CLUSTER), weight=weight)
    table = CandidateManifest("curate", TableData(str(tmp_path / "data"), "train", sources))
    publish_table(open_store(str(tmp_path / "drops")), table, {"red": rows})
    data = DataConfig(
        root=str(tmp_path / "data"), curation=[str(tmp_path / "drops")], mixture=MixtureConfig(run_length=2)
    )
    steps, pause = 6, 3  # in the middle of the second epoch
    ((one,),) = run_workers(train, 1, tmp_path, data, ObjectiveConfig(), steps, 0)
    (whole, paused), (whole_1, paused_1) = run_workers(train, 2, tmp_path, data, ObjectiveConfig(), steps, pause)

    assert [first + second for first, second in zip(whole.keys, whole_1.keys, strict=True)] == one.keys
    assert (paused.keys, paused_1.keys) == (whole.keys, whole_1.keys)
    epochs = [{*one.keys[step], *one.keys[step + 1]} for step in range(0, steps, 2)]
    weighted = {f"red/{number:08d}" for number in (*range(5), *range(6, 13))}
    dropped = {f"red/{number:08d}" for number in (5, 17, 20)}
    for epoch in epochs:
        assert len(epoch) == 12
        assert not epoch & dropped
        assert len(epoch & weighted) <= 6
    assert len({frozenset(epoch & weighted) for epoch in epochs}) == 3

    losses = [[float(row["loss"]) for row in some.rows] for some in (one, whole, paused)]
    assert losses[1] == losses[2]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert whole.weights == paused.weights != b""
