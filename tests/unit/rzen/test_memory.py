"""What the planner says of memory, against what torch allocates for tiny models on the CPU."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from pipelines.samples import DecodedInput, Visual
from rzen.config import (
    BackboneFamily,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PairPromptConfig,
    PromptConfig,
    RerankObjectiveConfig,
    TinyBackbone,
)
from rzen.inputs.processor import EncodedBatch, Processor, VisionLayout
from rzen.model.activations import AllocationTracker, ChunkInputs, count_pass, meta_backbone, read_config
from rzen.model.backbone import load_backbone
from rzen.model.embedding_model import EmbeddingModel
from rzen.model.lora import add_lora
from rzen.objective.batch import Batch
from rzen.objective.loss import Objective
from rzen.reranking.encoder import JointEncoder
from rzen.reranking.lists import EncodedList, ListEncoder, RerankBatch
from rzen.training import memory
from rzen.training.build import build_learner
from rzen.training.memory import MemoryModel, WorkerShare, loss_bytes
from rzen.training.worker import build_engine
from tests.benchmarks import synthetic
from tests.gloo import run_workers
from tests.parity.test_deepspeed import TASKS, share_of, stage_of
from tests.tiny import small_pieces, tiny_checkpoint

FAMILIES: tuple[BackboneFamily, ...] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")


def encoded(folder: str, count: int, tokens: int) -> EncodedBatch:
    """Equal inputs: a word, and an image of `tokens` tokens in one row of patches. 0: words only."""
    edge = VisionLayout.read(folder).factor_px
    pixels = np.zeros((1, edge, edge * tokens, 3), np.uint8)
    visuals = (Visual("image", pixels),) if tokens else ()
    processor = Processor(folder, PromptConfig(min_visual_tokens=1, max_visual_tokens=max(1, tokens)))
    return processor.encode([DecodedInput("a red circle " * 20, visuals)] * count)


def build(folder: str, model: ModelConfig) -> EmbeddingModel:
    """The real model, as training builds it."""
    backbone: Any = load_backbone(folder, model)
    if model.tune == "lora":
        backbone = add_lora(backbone, model.lora, seed=0)
    return EmbeddingModel(backbone, VisionLayout.read(folder)).train()


def saved_storages(
    model: torch.nn.Module,
) -> tuple[dict[int, torch.UntypedStorage], torch.autograd.graph.saved_tensors_hooks]:
    """Return the memory that autograd keeps, each storage once and without parameters, and the hooks that fill it."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    return kept, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


@pytest.mark.parametrize(("tune", "checkpointing"), [("lora", True), ("full", False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_those_that_torch_allocates(
    family: BackboneFamily, tune: str, checkpointing: bool, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path, TinyBackbone(family=family, vocabulary=640, layers=3))
    model = ModelConfig.model_validate(
        {"backbone": folder, "dtype": "float32", "tune": tune, "gradient_checkpointing": checkpointing}
    )
    real, planned = build(folder, model), meta_backbone(read_config(folder), model)
    for count, visual_tokens in ((2, 0), (1, 30), (5, 17)):
        batch = encoded(folder, count, visual_tokens)
        found = count_pass(planned, ChunkInputs(count, int(batch.lengths[0]), visual_tokens))
        saved, hooks = saved_storages(real)
        with hooks:
            real(batch)
        with AllocationTracker(real) as tracker:
            real(batch).sum().backward()
        real.zero_grad()
        assert found.peak == pytest.approx(tracker.peak, rel=0.08), (count, visual_tokens)
        if not checkpointing:  # whose inputs torch keeps in another place
            num_bytes = sum(storage.nbytes() for storage in saved.values())
            assert found.kept == pytest.approx(num_bytes, rel=0.03), (count, visual_tokens)


def lists_of(folder: str, query_tokens: int, target_tokens: int) -> RerankBatch:
    """Three queries with four targets each. All have a text, and an image of so many tokens: 0 is none."""
    prompt = PairPromptConfig(template="lamra", min_visual_tokens=1, max_visual_tokens=60)
    encoder, edge = ListEncoder(JointEncoder(folder, prompt)), VisionLayout.read(folder).factor_px

    def side(tokens: int, color: int) -> Any:
        pixels = np.full((1, edge, edge * tokens, 3), color, np.uint8)
        return encoder.joint.side(DecodedInput("a red circle " * 5, (Visual("image", pixels),) if tokens else ()))

    return encoder.collate(
        [
            EncodedList(
                f"s/{number}",
                side(query_tokens, number),
                (str(number), ""),
                tuple(side(target_tokens, 50 + 10 * number + target) for target in range(4)),
                tuple(f"{number} {target}" for target in range(4)),
            )
            for number in range(3)
        ]
    )


@pytest.mark.parametrize(("query_tokens", "target_tokens"), [(0, 0), (0, 30), (30, 0), (30, 20)])
@pytest.mark.parametrize(
    ("tune", "scope", "checkpointing", "loss"),
    [
        ("full", "all", False, "bce"),
        ("lora", "all", True, "listwise"),
        ("lora", "language_model", False, "listwise"),
        ("lora", "language_model", True, "bce"),
    ],
)
def test_activations_of_a_re_ranker_are_those_of_its_parts(
    tune: str, scope: str, checkpointing: bool, loss: str, query_tokens: int, target_tokens: int, tmp_path: Path
) -> None:
    """Pairs of a list share the image of their query, and a tower that is not trained keeps nothing."""
    folder = tiny_checkpoint(tmp_path, TinyBackbone(vocabulary=640, layers=2))
    config = AutoConfig.from_pretrained(folder)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    settings = {"backbone": folder, "dtype": "float32", "tune": tune, "gradient_checkpointing": checkpointing}
    model = ModelConfig.model_validate(settings | {"lora": {"rank": 4, "scope": scope}})
    objective = RerankObjectiveConfig.model_validate({"kind": "rerank", "loss": loss, "prompt": {"template": "lamra"}})
    batch, planner = lists_of(folder, query_tokens, target_tokens), MemoryModel(read_config(folder), model)
    tokens = int(batch.joint.sequences.lengths.max())
    visual_tokens = query_tokens + target_tokens
    inputs = ChunkInputs(12, tokens, visual_tokens, 4, query_tokens, whole_lists=loss == "listwise")
    for chunk_tokens in (None, 4 * tokens):
        stage = replace(stage_of(folder), model=model, objective=objective, chunk_tokens=chunk_tokens)
        learner = build_learner(stage, folder, None, TASKS).train()
        with AllocationTracker(learner) as tracker:
            outputs = []  # as training keeps them
            for part in learner.parts(batch):
                value, output = learner(part, [("t", 3)], 0)
                value.backward()
                outputs.append(output)
        assert planner.activations([inputs], chunk_tokens) == pytest.approx(tracker.peak, rel=0.05), chunk_tokens


def test_chunks_of_whole_lists_hold_at_least_one() -> None:
    pairs = ChunkInputs(12, 100, 30, list_pairs=4, query_visual_tokens=10)
    lists = replace(pairs, whole_lists=True)
    assert [pairs.within(tokens).count for tokens in (1, 100, 950)] == [1, 1, 9]
    assert [lists.within(tokens).count for tokens in (1, 400, 950)] == [4, 4, 8]
    assert pairs.within(500).media_tokens == [10, 10, 20, 20, 20, 20, 20]
    assert pairs.within(500).shown == [0, 2, 0, 3, 0, 4, 0, 5, 1, 6]
    assert loss_bytes(WorkerShare(1, 3, (pairs,), 3, 1), RerankObjectiveConfig(kind="rerank"), 64) == 0


def test_checkpointing_and_chunks_bound_the_activations(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, TinyBackbone(vocabulary=640, layers=4, vision_depth=4))
    settings = {"backbone": folder, "dtype": "float32"}
    config = read_config(folder)
    plain, saving = (
        MemoryModel(config, ModelConfig.model_validate(settings | {"gradient_checkpointing": on}))
        for on in (False, True)
    )
    inputs = [ChunkInputs(64, 100, 0), ChunkInputs(64, 164, 100)]
    whole = plain.activations(inputs, None)
    assert saving.activations(inputs, None) < 0.5 * whole
    assert plain.activations(inputs, 1640) < 0.2 * whole
    assert plain.activations(inputs, 10**6) == whole  # one chunk holds all
    assert plain.activations(inputs, 1) == pytest.approx(whole / 64, rel=0.5)  # one input at a time


def held_by_deepspeed(rank: int, world_size: int, model_dir: str, tune: str, dtype: str) -> dict[int, dict[str, int]]:
    """Bytes that a rank holds, by ZeRO stage."""
    small_pieces()
    found = {}
    for zero_stage in (1, 2, 3):
        stage = stage_of(model_dir, zero_stage)
        changes = {"dtype": dtype, "tune": tune}
        stage = replace(stage, model=stage.model.model_copy(update=changes))
        engine, _ = build_engine(build_learner(stage, model_dir, None, TASKS), stage)
        engine.train()
        optimizer, parameters = engine.optimizer, list(engine.module.parameters())
        moments = sum(v.nbytes for state in optimizer.optimizer.state.values() for v in state.values() if v.ndim)
        if zero_stage == 3:
            masters, weights = optimizer.fp32_partitioned_groups_flat, [one.ds_tensor for one in parameters]
        else:
            masters = optimizer.single_partition_of_fp32_groups
            weights = {one.untyped_storage()._cdata: one.untyped_storage() for one in parameters}.values()
        pairs = share_of(model_dir, rank, world_size, 0)
        loss, _ = engine(pairs, [(TASKS[0], len(pairs))], 0)
        with engine.coalesce_grad_reduction():
            engine.backward(loss)
            gradients = sum(one.grad.nbytes for one in parameters if one.grad is not None)
        found[zero_stage] = {
            "weights": sum(one.nbytes() if callable(one.nbytes) else one.nbytes for one in weights),
            "optimizer": moments + sum(one.nbytes for one in masters),
            "gradients": gradients,
        }
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tune", "dtype"), [pytest.param("lora", "float32", marks=pytest.mark.long), ("full", "bfloat16")]
)
def test_weights_gradients_and_optimizer_are_what_deepspeed_holds(
    tune: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "WHOLE_ELEMENTS", 0)
    model_dir = tiny_checkpoint(tmp_path, TinyBackbone(vocabulary=640, layers=1, vision_depth=1))
    model = stage_of(model_dir).model.model_copy(update={"dtype": dtype, "tune": tune})
    planner = MemoryModel(read_config(model_dir), model)
    ranks = run_workers(held_by_deepspeed, 3, model_dir, tune, dtype)
    share = WorkerShare(3, 2, [ChunkInputs(2, 64, 0)], 0, len(TASKS))
    for zero_stage, held in ranks[0].items():
        optim = OptimConfig.model_validate({"zero_stage": zero_stage})
        found = asdict(planner.worker(share, ObjectiveConfig(), optim, None))
        assert {part: found[part] for part in held} == held, zero_stage


@pytest.mark.parametrize(
    ("pairs", "workers", "width", "settings"),
    [
        (48, 16, 64, {}),
        (512, 8, 32, {}),
        (512, 8, 32, {"hardness": None, "false_negatives": None, "tile_rows": 128}),
        (512, 4, 32, {"matryoshka": [8, 16]}),
        (512, 4, 32, {"same_side": ["queries", "targets"]}),
        (64, 8, 1536, {}),
    ],
)
def test_the_loss_takes_what_its_formula_says(pairs: int, workers: int, width: int, settings: dict[str, Any]) -> None:
    objective = Objective(ObjectiveConfig.model_validate(settings), ["t"])
    num_rows = pairs * workers
    queries, targets = (
        torch.nn.functional.normalize(torch.randn(num_rows, width), dim=1).requires_grad_() for _ in range(2)
    )
    ids = torch.arange(num_rows)
    batch = Batch(
        queries[:pairs].detach().requires_grad_(),
        targets,
        "t",
        0,
        all_queries=queries,
        target_ids=ids,
        query_ids=-1 - ids,
        instruction_ids=torch.zeros_like(ids),
    )
    with AllocationTracker(objective) as tracker:
        objective(batch, 1000)[0].backward()
    share = WorkerShare(workers, pairs, [], 0, 1)
    gathered = 2 * targets.nbytes  # and what the sum over ranks takes, which this process does not have
    assert loss_bytes(share, objective.config, width) == pytest.approx(tracker.peak + gathered, rel=0.15)


def test_a_2b_backbone_has_its_published_size() -> None:
    """Qwen2-VL-2B has 2.21e9 parameters, tied; an adapter of rank 64 on all 326 linear layers has 117e6."""
    model = MemoryModel(synthetic.SHAPES["2b"].config, ModelConfig(backbone="-"))
    share = WorkerShare(16, 48, [ChunkInputs(48, 64, 0)], 0, 7)
    found = model.worker(share, ObjectiveConfig(), OptimConfig(), None)
    assert found.gradients / 2 == pytest.approx(117e6, rel=0.01)
    assert (found.weights - found.gradients) / 2 == pytest.approx(2.21e9, rel=0.01)
    assert found.optimizer == pytest.approx(12 * found.gradients / 2 / 16, rel=1e-4)
