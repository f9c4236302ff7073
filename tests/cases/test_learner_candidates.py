"""Training with a candidate table on two ranks: a run that pauses and resumes ends with the bytes of one that does not.

The batches come from the reader without Ray, encoded and contrasted as in a run.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import DataConfig, MixtureConfig
from pipelines.feed.batch import FeedBatch
from pipelines.feed.reader import Reader
from pipelines.plan.build import build_plan
from pipelines.storage.location import open_store
from rzen.config import LoraConfig, MinedConfig, ObjectiveConfig, OptimConfig
from rzen.inputs.pairs import PairEncoder
from rzen.inputs.processor import Processor
from rzen.training.telemetry import Row
from rzen.training.worker import Stage, train_stage
from tests.data import publish, publish_candidates
from tests.gloo import run_workers
from tests.integration.test_training import Folders
from tests.tiny import PROMPT, tiny_checkpoint, tiny_model

pytestmark = pytest.mark.slow
STEPS, PAUSE = 4, 2


def train(rank: int, world_size: int, root: Path, shared: bool) -> list[tuple[list[Row], bytes]]:
    """Train without a pause, and with one, each in a new reader."""
    model_dir = str(root / "base")
    found = []
    for name, stops in (("whole", [None]), ("paused", [PAUSE, None])):
        rows: list[Row] = []
        (root / name).mkdir(exist_ok=True)
        for stop in stops:
            data = DataConfig(
                root=str(root / "data"),
                candidates=str(root / "table"),
                negatives_per_sample=4,
                negatives_draw="random",
                mixture=MixtureConfig(run_length=2),
            )
            reader = Reader(data, PairEncoder(Processor(model_dir, PROMPT)))
            plan = build_plan(reader.tables(), data.mixture, global_batch=6, steps=STEPS)
            worker = pickle.loads(pickle.dumps(reader))

            def batches(start: int, plan: Any = plan, worker: Any = worker) -> Iterator[FeedBatch]:
                return (worker.batch(plan, step, rank, world_size) for step in range(start, STEPS))

            before = root / name / f"step-{PAUSE:06d}"
            model = tiny_model(model_dir).model_copy(update={"lora": LoraConfig(rank=2)})
            objective = ObjectiveConfig(mined=MinedConfig(shared=shared))
            train_stage(
                Stage(model, objective, OptimConfig(), STEPS, 0, PAUSE, plan.fingerprint(), stop=stop),
                backbone_dir=model_dir,
                init_adapter=None,
                tasks=["a"],
                batches=batches,
                checkpoints=Folders(root / name, before if stop is None and len(stops) > 1 else None),
                output=root / name / "adapter",
                on_metrics=rows.append,
            )
        weights = root / name / "adapter" / "adapter_model.safetensors"
        found.append((rows, weights.read_bytes() if rank == 0 else b""))
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
    (whole, weights), (paused, again) = run_workers(train, 2, tmp_path, shared)[0]
    assert [row["loss"] for row in whole] == [row["loss"] for row in paused]
    assert sum(int(row["bad_candidates"]) for row in whole) > 0
    assert weights == again != b""
