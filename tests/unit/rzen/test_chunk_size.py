"""The largest chunk that fits: the search, a planted limit of memory, and what all ranks agree on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipelines.errors import UserError
from rzen.config import ModelConfig, ObjectiveConfig, OptimConfig, TinyBackbone
from rzen.inputs.processor import VisionLayout
from rzen.model.activations import AllocationTracker, ChunkInputs, read_config
from rzen.model.backbone import load_backbone
from rzen.model.embedding_model import EmbeddingModel
from rzen.model.lora import add_lora
from rzen.objective.loss import Objective
from rzen.training.chunk_size import (
    AutoChunk,
    fits_by_estimate,
    fits_by_trial,
    largest_count,
    run_example,
    settle_chunk,
)
from rzen.training.example import example_batch
from rzen.training.memory import MemoryModel, WorkerShare
from rzen.training.step import EmbeddingLearner
from tests.gloo import run_workers
from tests.tiny import tiny_checkpoint

SHARE = WorkerShare(1, 40, (ChunkInputs(40, 100, 0), ChunkInputs(40, 84, 20)), 0, 1)


@pytest.mark.parametrize("most", [1, 2, 7, 8, 9, 100])
def test_the_search_finds_the_largest_that_fits(most: int) -> None:
    for limit in range(most + 3):
        asked: list[int] = []

        def fits(count: int, limit: int = limit, asked: list[int] = asked) -> bool:
            asked.append(count)
            return count <= limit

        assert largest_count(fits, most) == min(limit, most)
        assert max(asked) <= most
        assert len(asked) == len(set(asked)) <= 2 * most.bit_length()


def learner_of(folder: str) -> EmbeddingLearner:
    model = model_of(folder)
    backbone: Any = add_lora(load_backbone(folder, model), model.lora, seed=0)
    embedder = EmbeddingModel(backbone, VisionLayout.read(folder))
    return EmbeddingLearner(embedder, Objective(ObjectiveConfig(), ["a"])).train()


def model_of(folder: str) -> ModelConfig:
    return ModelConfig.model_validate({"backbone": folder, "dtype": "float32", "lora": {"rank": 4}})


def test_real_passes_stop_at_a_planted_limit_of_memory(tmp_path: Path) -> None:
    """The limit stands for a GPU's. Passes are real, and the one that is too large runs out of memory."""
    folder = tiny_checkpoint(tmp_path, TinyBackbone(vocabulary=640))
    learner, auto, objective = learner_of(folder), AutoChunk([SHARE], None), ObjectiveConfig()
    limit = 20 << 20
    peaks: dict[ChunkInputs, int] = {}

    def peak_bytes(inputs: ChunkInputs) -> int:
        with AllocationTracker(learner) as tracker:
            run_example(learner, inputs)
        peaks[inputs] = tracker.peak
        if tracker.peak > limit:
            raise torch.OutOfMemoryError
        return tracker.peak

    count = largest_count(fits_by_trial(auto, objective, 64, peak_bytes, limit), auto.most)
    fitting = [some.within(count * auto.longest) for some in SHARE.inputs]
    larger = [some.within((count + 1) * auto.longest) for some in SHARE.inputs]
    assert 1 < count < auto.most
    assert max(peaks[some] for some in fitting) <= 0.9 * limit
    assert max(peaks.get(some, 0) for some in larger) > 0.9 * limit  # the larger of both shapes is tried first
    assert any(peak > limit for peak in peaks.values())
    assert all(parameter.grad is None for parameter in learner.parameters())
    memory = MemoryModel(read_config(folder), model_of(folder))
    estimate = fits_by_estimate(
        AutoChunk([SHARE], limit + memory_without_activations(memory)), memory, objective, OptimConfig()
    )
    assert largest_count(estimate, auto.most) == pytest.approx(count, abs=1)


def memory_without_activations(memory: MemoryModel) -> int:
    found = memory.worker(SHARE, ObjectiveConfig(), OptimConfig(), 1)
    return found.total - found.activations


def test_examples_have_the_shape_that_is_asked_for(tmp_path: Path) -> None:
    config = read_config(tiny_checkpoint(tmp_path, TinyBackbone(vocabulary=640)))
    batch = example_batch(config, ChunkInputs(3, 50, 12))
    assert batch.lengths.tolist() == [50] * 3
    assert np.count_nonzero(batch.input_ids == config.image_token_id) == 3 * 12
    assert len(batch.patches) == 3 * 12 * config.vision_config.spatial_merge_size**2
    assert not len(example_batch(config, ChunkInputs(2, 9, 0)).grids)


SHALLOW = TinyBackbone(vocabulary=640, layers=1, vision_depth=1)


def settled(rank: int, world_size: int, folder: str) -> tuple[int, int]:
    """What a rank finds by itself, and what all settle on. Ranks have different memory."""
    memory = MemoryModel(read_config(folder), model_of(folder))
    objective, optim = ObjectiveConfig(), OptimConfig()
    auto = AutoChunk([SHARE], ((20 << 20) >> rank) + memory_without_activations(memory))
    own = largest_count(fits_by_estimate(auto, memory, objective, optim), auto.most) * auto.longest
    assert dist.get_world_size() == world_size
    return own, settle_chunk(auto, learner_of(folder), folder, model_of(folder), objective, optim)


@pytest.mark.slow
def test_all_ranks_take_the_smallest_chunk(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, SHALLOW)
    (large, first), (small, second) = run_workers(settled, 2, folder)
    assert 0 < small < large
    assert first == second == small


def test_where_not_even_one_input_fits_the_run_ends(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, TinyBackbone(vocabulary=640))
    auto = AutoChunk([SHARE], 1000)
    with pytest.raises(UserError, match=r"not even one input of 100 tokens fits; lower model\.prompt"):
        settle_chunk(auto, learner_of(folder), folder, model_of(folder), ObjectiveConfig(), OptimConfig())
