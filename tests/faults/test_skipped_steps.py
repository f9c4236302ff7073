"""Samples whose vectors are not finite: their steps are skipped and counted, and too many in a row end the run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipelines.errors import UserError
from rzen.config import LoraConfig, ObjectiveConfig, OptimConfig, TinyBackbone
from rzen.inputs.processor import EncodedBatch, Processor
from rzen.model.embedding_model import EmbeddingModel
from rzen.training.stage import Stage
from rzen.training.worker import train_stage
from tests.gloo import run_workers
from tests.integration.test_training import GLOBAL_BATCH, Batch, Folders, batches
from tests.tiny import PROMPT, small_pieces, tiny_checkpoint, tiny_model

pytestmark = pytest.mark.slow
POISON = 7  # as the first token of an input
STEPS = 6
BACKBONE = TinyBackbone(vocabulary=640, layers=1, vision_depth=1)  # stage 3 calls Python for each module

Poisoned = Mapping[int, tuple[int, ...]]  # step -> samples of its global batch


def stage_of(model_dir: str, zero_stage: int) -> Stage:
    model = tiny_model(model_dir).model_copy(update={"lora": LoraConfig(rank=2)})
    optim = OptimConfig.model_validate({"lr": 1e-3, "max_skipped_steps": 1, "zero_stage": zero_stage})
    return Stage(model, ObjectiveConfig(), optim, STEPS, 0, 2, "plan-1")


def poisoned_batches(processor: Processor, start: int, rank: int, poisoned: Poisoned) -> Iterator[Batch]:
    for fed in batches(processor, start):
        share = len(fed.batch)
        for index in poisoned.get(fed.step, ()):
            if index // share == rank:
                queries = fed.batch.queries
                ids = queries.input_ids.copy()
                ids[int(queries.lengths[: index % share].sum())] = POISON
                fed = replace(fed, batch=replace(fed.batch, queries=replace(queries, input_ids=ids)))
        yield fed


def poison_embedder() -> None:
    forward = EmbeddingModel.forward

    def poisoned(self: EmbeddingModel, batch: EncodedBatch) -> Tensor:
        first = batch.input_ids[np.cumsum(batch.lengths) - batch.lengths]
        factor_B = torch.where(torch.from_numpy(first == POISON), torch.nan, 1.0)
        return forward(self, batch) * factor_B[:, None]

    EmbeddingModel.forward = poisoned  # type: ignore[method-assign]


def run_all(rank: int, _world_size: int, root: Path, model_dir: str, zero_stage: int) -> dict[str, Any]:
    small_pieces()
    poison_embedder()
    processor = Processor(model_dir, PROMPT)

    def run(name: str, poisoned: Poisoned, start_from: Path | None = None) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        (root / name).mkdir(exist_ok=True)
        train_stage(
            stage_of(model_dir, zero_stage),
            backbone_dir=model_dir,
            init_adapter=None,
            tasks=["a", "b"],
            batches=lambda start: poisoned_batches(processor, start, rank, poisoned),
            checkpoints=Folders(root / name, start_from),
            output=root / name / "model" / str(rank),
            on_metrics=rows.append,
        )
        return rows

    single = {2: (1,)}  # of rank 0 alone
    found: dict[str, Any] = {"rows": run("single", single)}
    run("resumed", single, root / "single" / "step-000004")
    try:
        run("row", {2: (0,), 3: (1, 4)})
    except UserError as error:
        found["error"] = str(error)
    return found


@pytest.fixture(scope="module", params=[1, 3], ids=lambda stage: f"zero-{stage}")
def zero_stage(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, zero_stage: int) -> Path:
    return tmp_path_factory.mktemp(f"runs-{zero_stage}")


@pytest.fixture(scope="module")
def outcome(root: Path, zero_stage: int) -> list[dict[str, Any]]:
    return run_workers(run_all, 2, root, tiny_checkpoint(root / "tiny", BACKBONE), zero_stage)


def test_a_step_that_is_not_finite_is_skipped_and_counted(outcome: list[dict[str, Any]], root: Path) -> None:
    rows = outcome[0]["rows"]
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0, 0, 0]
    assert [np.isfinite(row["loss"]) for row in rows] == [True, True, False, True, True, True]
    parameters = load_file(root / "single" / "step-000006" / "parameters.safetensors")
    assert all(value.isfinite().all() for value in parameters.values())
    updates = [json.loads((root / "single" / f"step-{step:06d}/state.json").read_text())["updates"] for step in (4, 6)]
    assert updates == [3, 5]


def test_a_run_resumed_after_a_skipped_step_ends_with_the_same_bits(outcome: list[dict[str, Any]], root: Path) -> None:
    for file in ("parameters.safetensors", "moments.safetensors"):
        found, expected = ((root / run / "step-000006" / file).read_bytes() for run in ("resumed", "single"))
        assert found == expected, file


def test_too_many_in_a_row_end_the_run_and_name_the_samples(outcome: list[dict[str, Any]], root: Path) -> None:
    expected = (
        "step 3, source scenes, task b: loss is nan, grad_norm inf, the last of 2 skipped steps; s/3-1, s/3-4 have no"
        " finite vector; look at these samples, lower optim.lr or raise optim.warmup_fraction, and resume"
    )
    assert [found["error"] for found in outcome] == [expected, expected]
    assert GLOBAL_BATCH == 6
    assert [path.name for path in (root / "row").iterdir()] == ["step-000002"]
