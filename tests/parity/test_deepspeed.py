"""Steps of DeepSpeed's engine, for numbers of workers, ZeRO stages and chunks, against a plain loop of torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rzen.config import HardnessConfig, LoraConfig, ObjectiveConfig, OptimConfig, TemperatureConfig, TinyBackbone
from rzen.inputs.pairs import EncodedPairs, PairEncoder
from rzen.inputs.processor import Processor
from rzen.training import checkpoint
from rzen.training.build import build_learner
from rzen.training.optim import build_optimizer, lr_at, set_lr
from rzen.training.stage import Stage
from rzen.training.worker import build_engine, update
from tests.gloo import run_workers
from tests.parity.test_training_step import pairs_by_rank
from tests.tiny import PROMPT, small_pieces, tiny_checkpoint, tiny_model

pytestmark = pytest.mark.slow
STEPS, TASKS = 3, ("a", "b")
CHUNKS = {"whole": None, "chunks": 150}


def stage_of(model_dir: str, zero_stage: int = 1, chunk_tokens: int | None = None) -> Stage:
    model = tiny_model(model_dir).model_copy(update={"lora": LoraConfig(rank=3)})
    objective = ObjectiveConfig(
        hardness=HardnessConfig(alpha=9.0), temperature=TemperatureConfig(initial=0.1), symmetric=0.3
    )
    optim = OptimConfig.model_validate({"lr": 1e-3, "max_grad_norm": 0.5, "zero_stage": zero_stage})
    return Stage(model, objective, optim, STEPS, 0, STEPS, "plan-1", chunk_tokens)


def share_of(model_dir: str, rank: int, world_size: int, step: int) -> EncodedPairs:
    """A rank's share of six pairs, which change places from step to step."""
    pairs = [pair for share in pairs_by_rank(model_dir) for pair in share]
    order = np.roll(np.arange(len(pairs)), step)
    mine = np.split(order, world_size)[rank]
    return PairEncoder(Processor(model_dir, PROMPT)).collate([pairs[index] for index in mine])


def engines(rank: int, world_size: int, model_dir: str) -> dict[str, tuple[float, dict[str, Tensor]]]:
    """Gradient norm of the first step, and parameters after the last, by stage and chunks."""
    small_pieces()
    found = {}
    for zero_stage in (1, 2, 3):
        for name, chunk_tokens in CHUNKS.items():
            stage = stage_of(model_dir, zero_stage, chunk_tokens)
            engine, optimizer = build_engine(build_learner(stage, model_dir, None, TASKS), stage)
            engine.train()
            norms = []
            for step in range(STEPS):
                set_lr(optimizer, lr_at(step, STEPS, stage.optim))
                pairs = share_of(model_dir, rank, world_size, step)
                loss, _ = engine(pairs, [(TASKS[step % 2], len(pairs))], step)
                update(engine, [loss])
                norms.append(float(engine.get_global_grad_norm()))
            if zero_stage == 3:  # between steps a rank holds its pieces alone
                assert not any(parameter.numel() for parameter in engine.module.parameters())
            found[f"zero {zero_stage}, {name}"] = norms[0], checkpoint.full_parameters(engine)
    assert dist.get_world_size() == world_size
    return found


def plain(model_dir: str) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """The same without DeepSpeed, in one process; the parameters before it, too."""
    stage = stage_of(model_dir)
    learner = build_learner(stage, model_dir, None, TASKS).train()
    optimizer = build_optimizer(learner, stage.optim)
    trained = {name: value for name, value in learner.named_parameters() if value.requires_grad}
    before = {name: value.detach().clone() for name, value in trained.items()}
    norms = []
    for step in range(STEPS):
        set_lr(optimizer, lr_at(step, STEPS, stage.optim))
        pairs = share_of(model_dir, 0, 1, step)
        loss, _ = learner(pairs, [(TASKS[step % 2], len(pairs))], step)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), stage.optim.max_grad_norm)))
        optimizer.step()
    return norms[0], {name: value.detach() for name, value in trained.items()}, before


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), TinyBackbone(vocabulary=640, vision_depth=1))


@pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 3]
)
def test_engines_step_as_one_process_does(
    model_dir: str, world_size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    norm, expected, before = plain(model_dir)
    found: dict[str, Any] = run_workers(engines, world_size, model_dir)[0]
    assert len(found) == 3 * len(CHUNKS)
    for setting, (grad_norm, parameters) in found.items():
        assert grad_norm == pytest.approx(norm, rel=1e-5), setting
        assert set(parameters) == set(expected)
        for name, value in expected.items():
            moved = float((value - before[name]).norm())
            assert moved > 0, name
            assert float((parameters[name] - value).norm()) < 1e-3 * moved, (setting, name)  # Adam enlarges rounding
