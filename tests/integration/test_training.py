"""Whole stages under DeepSpeed: stopped and resumed, on one and two ranks, with adapters and without."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from pipelines.errors import UserError
from pipelines.feed.batch import FeedBlock
from pipelines.samples import DecodedInput, DecodedSample, Input, Rejected, Sample
from rzen.config import LoraConfig, ModelConfig, ObjectiveConfig, OptimConfig, TemperatureConfig
from rzen.export.export import load_encoder
from rzen.inputs.pairs import EncodedPairs, PairEncoder
from rzen.inputs.processor import Processor
from rzen.training.build import build_learner
from rzen.training.held_out import HeldOut, HeldOutShare
from rzen.training.stage import Stage
from rzen.training.telemetry import metrics_of
from rzen.training.worker import train_stage
from tests.gloo import run_processes, run_workers
from tests.tiny import PROMPT, TEXTS, noise, small_pieces, tiny_checkpoint, tiny_model

pytestmark = pytest.mark.slow
GLOBAL_BATCH, STEPS, EVERY = 6, 4, 2
LOW, HIGH = 0.02, 0.3
CHUNK_TOKENS = 120  # three or four chunks a step: ranks differ in how many they have


@dataclass(frozen=True)
class Batch:
    """What the feed gives to one rank."""

    step: int
    blocks: tuple[FeedBlock, ...]
    batch: EncodedPairs
    rejected: list[Rejected] = field(default_factory=list)
    cached_fraction: float = 0.0
    rejected_candidates: tuple[()] = ()


@dataclass
class Folders:
    """A store in a local folder that begins with the checkpoint of another run, or with none."""

    root: Path
    start_from: Path | None = None
    best_step: int | None = None

    def latest(self) -> Path | None:
        return self.start_from

    def best(self) -> Path | None:
        assert dist.get_rank() == 0
        return self.root / f"step-{self.best_step:06d}" if self.best_step else None

    def publish(self, folder: Path, step: int) -> None:
        assert dist.get_rank() == 0
        shutil.move(folder, self.root / f"step-{step:06d}")

    def report(self, event: str) -> None:
        raise AssertionError(event)


def encode(processor: Processor, step: int, index: int) -> EncodedPairs:
    """Sample `index` of a step: the first half of a batch is text alone, the second has images on one side."""
    target = DecodedInput(text=f"{TEXTS[index % 5]} {step}")
    if index >= GLOBAL_BATCH // 2:
        target = DecodedInput(visuals=(noise("image", 1, 61, 97, 10 * step + index),))
    sample = Sample(
        f"{step}-{index}",
        "s",
        "a",
        Input(),
        Input(),
        target_sha256=f"{step:02x}{index:02x}" * 16,
        query_sha256=f"{index:02x}{step:02x}ff" * 16,
    )
    query = DecodedInput(text=f"{TEXTS[(index + step) % 5]} {index}")
    return PairEncoder(processor).sample(DecodedSample(sample, query, target))


def batches(processor: Processor, start: int) -> Iterator[Batch]:
    """The rank's contiguous share of each global batch. Tasks take turns."""
    # A function of its own, since the group may not exist before the run has begun.
    share = GLOBAL_BATCH // dist.get_world_size()
    for step in count(start):
        mine = range(dist.get_rank() * share, (dist.get_rank() + 1) * share)
        pairs = PairEncoder(processor).collate([encode(processor, step, index) for index in mine])
        bad = [Rejected(f"{step}-0", "truncated")] if step == 1 else []
        yield Batch(step, (FeedBlock("scenes", ("a", "b")[step % 2], 0, share),), pairs, bad)


def stage_of(model: ModelConfig, zero_stage: int = 1, **changes: Any) -> Stage:
    optim = OptimConfig.model_validate({"lr": 1e-3, "zero_stage": zero_stage, **changes})
    temperature = TemperatureConfig(initial=0.1, minimum=LOW, maximum=HIGH)
    return Stage(model, ObjectiveConfig(temperature=temperature), optim, STEPS, 11, EVERY, "plan-1")


def stages(model_dir: str) -> dict[str, Stage]:
    full = tiny_model(model_dir).model_copy(update={"tune": "full"})
    lora = tiny_model(model_dir).model_copy(update={"lora": LoraConfig(rank=3, dropout=0.2)})
    low_precision = lora.model_copy(update={"dtype": "bfloat16", "gradient_checkpointing": True})
    return {
        "full": stage_of(full),
        "lora": stage_of(lora, zero_stage=2),
        "bf16": stage_of(low_precision),
        "sharded": replace(stage_of(full, zero_stage=3), chunk_tokens=CHUNK_TOKENS),
        "sharded-bf16": stage_of(low_precision, zero_stage=3),
    }


def held_out(processor: Processor) -> HeldOut:
    """Five samples of one source and one of another: a rank of two has none of the second."""

    def share(source: str, size: int) -> HeldOutShare:
        mine = range(size)[dist.get_rank() :: dist.get_world_size()]
        encoder = PairEncoder(processor)
        pairs = encoder.collate([encode(processor, 99, index) for index in mine]) if mine else None
        return HeldOutShare(tuple(mine), pairs)

    return HeldOut(2, lambda: {"scenes": share("scenes", 5), "pages": share("pages", 1)})


def train(
    stage: Stage, folder: Path, checkpoints: Folders | None = None, *, scored: bool = False
) -> list[dict[str, Any]]:
    """Train into `folder`; the rows of rank 0. Held-out scores go to `folder/held_out.json`."""
    rows: list[dict[str, Any]] = []
    scores: list[Any] = []
    small_pieces()
    backbone_dir = str(stage.model.backbone)
    processor = Processor(backbone_dir, PROMPT)
    folder.mkdir(parents=True, exist_ok=True)
    train_stage(
        stage,
        backbone_dir=backbone_dir,
        init_adapter=None,
        tasks=["a", "b"],
        batches=lambda start: batches(processor, start),
        checkpoints=checkpoints or Folders(folder),
        output=folder / "model" / os.environ.get("LOCAL_RANK", "0"),
        on_metrics=rows.append,
        held_out=held_out(processor) if scored else None,
        on_scores=scores.append,
        num_threads=1,
    )
    if scores:
        (folder / "held_out.json").write_text(json.dumps(scores))
    return rows


def straight(_rank: int, _world_size: int, root: Path, model_dir: str) -> dict[str, Any]:
    """Every stage from start to end, and one in which the temperatures race for their upper bound."""
    rows = {
        name: train(stage, root / name, Folders(root / name, best_step=2), scored=True)
        for name, stage in stages(model_dir).items()
    }
    temperature = TemperatureConfig(initial=0.1, minimum=LOW, maximum=HIGH, lr_scale=1e5)
    racing = replace(stages(model_dir)["full"], objective=ObjectiveConfig(temperature=temperature), num_steps=3)
    rows["racing"] = train(racing, root / "racing")
    return rows


def resumed(_rank: int, _world_size: int, root: Path, model_dir: str) -> dict[str, Any]:
    """Every stage from its checkpoint after two steps, most without held-out scores, and one with another seed."""
    chosen = stages(model_dir)
    chosen["lora-reseeded"] = replace(chosen["lora"], seed=12)
    resume(chosen["full"], root, "full-alone", "full-one-to-two")
    resume(chosen["sharded"], root, "full-alone", "sharded-one-to-two")
    resume(chosen["sharded"], root, "full", "full-to-sharded")
    return {
        name: resume(stage, root, name, f"{name}-resumed", scored=name in ("full", "sharded-bf16"))
        for name, stage in chosen.items()
    }


def alone(_rank: int, root: Path, model_dir: str) -> None:
    """Without a process group: the whole model from start to end."""
    torch.set_num_threads(1)
    train(stages(model_dir)["full"], root / "full-alone", scored=True)


def alone_resumed(_rank: int, root: Path, model_dir: str) -> None:
    """Without a process group: the whole model from the checkpoints of two ranks."""
    torch.set_num_threads(1)
    chosen = stages(model_dir)
    resume(chosen["full"], root, "full", "full-two-to-one")
    resume(chosen["sharded"], root, "sharded", "sharded-two-to-one")
    resume(chosen["full"], root, "sharded", "sharded-to-full")


def resume(stage: Stage, root: Path, name: str, out: str, *, scored: bool = False) -> list[dict[str, Any]]:
    start_from = root / name.removesuffix("-reseeded") / "step-000002"
    return train(stage, root / out, Folders(root / out, start_from=start_from), scored=scored)


@dataclass(frozen=True)
class Runs:
    root: Path
    model_dir: str
    straight: dict[str, list[dict[str, Any]]]
    resumed: dict[str, list[dict[str, Any]]]

    def tensors(self, run: str, file: str) -> dict[str, Tensor]:
        return load_file(self.root / run / file)

    def scores(self, run: str) -> list[dict[str, Any]]:
        """Its held-out scores, but for the time that they took."""
        rows: list[dict[str, Any]] = json.loads((self.root / run / "held_out.json").read_text())
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    model_dir = tiny_checkpoint(root / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(root / "extensions"))
        first = run_workers(straight, 2, root, model_dir)
        run_processes(alone, 1, root, model_dir)
        second = run_workers(resumed, 2, root, model_dir)
        run_processes(alone_resumed, 1, root, model_dir)
    assert first[1] == {name: [] for name in first[0]}  # rows are for rank 0 alone
    return Runs(root, model_dir, first[0], second[0])


WEIGHTS = dict.fromkeys(["full", "sharded"], "model.safetensors")
WEIGHTS |= dict.fromkeys(["lora", "bf16", "sharded-bf16"], "adapter_model.safetensors")


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_resumed_run_ends_with_the_same_bits(runs: Runs, name: str) -> None:
    for file in (
        f"model/0/{WEIGHTS[name]}",
        "step-000004/parameters.safetensors",
        "step-000004/moments.safetensors",
    ):
        assert (runs.root / f"{name}-resumed" / file).read_bytes() == (runs.root / name / file).read_bytes(), file
    assert [row["step"] for row in runs.resumed[name]] == [2, 3]
    losses = [[row["loss"] for row in rows] for rows in (runs.straight[name], runs.resumed[name])]
    assert losses[0][2:] == losses[1]
    early, late = (runs.tensors(name, f"step-{step:06d}/parameters.safetensors") for step in (2, 4))
    assert all(not torch.equal(early[parameter], late[parameter]) for parameter in early)


def test_held_out_scores_change_no_weights(runs: Runs) -> None:
    """All straight runs are scored. Most resumed ones are not, and the test above shows that they end the same."""
    assert {name for name in WEIGHTS if (runs.root / f"{name}-resumed" / "held_out.json").exists()} == {
        "full",
        "sharded-bf16",
    }
    for name in WEIGHTS:
        assert [row["step"] for row in runs.scores(name)] == [0, 2, 4]
    for name in ("full", "sharded-bf16"):
        assert runs.scores(f"{name}-resumed") == runs.scores(name)[2:]


def test_held_out_scores_are_those_of_a_search(runs: Runs) -> None:
    """The model of the last step, searched again without the code of training; one rank finds the same as two."""
    _, embedder = load_encoder(str(runs.root / "full" / "model" / "0"))
    processor = Processor(runs.model_dir, PROMPT)
    pairs = PairEncoder(processor).collate([encode(processor, 99, index) for index in range(5)])
    with torch.no_grad():
        similarity = embedder(pairs.queries) @ embedder(pairs.targets).T
    order = similarity.argsort(dim=1, descending=True)
    ranks = [int((order[row] == row).nonzero()) + 1 for row in range(5)]
    last = runs.scores("full")[-1]
    scenes = last["sources"]["scenes"]
    assert dict(zip(scenes["queries"], scenes["ranks"], strict=True)) == dict(enumerate(ranks))
    assert dict(zip(scenes["queries"], scenes["found"], strict=True)) == dict(enumerate(order[:, 0].tolist()))
    assert scenes["hit"] == pytest.approx(ranks.count(1) / 5)
    assert last["sources"]["pages"] == {"hit": 1.0, "candidates": 1, "queries": [0], "ranks": [1], "found": [0]}
    assert last["hit"] == pytest.approx((scenes["hit"] + 1) / 2)
    assert runs.scores("full-alone")[-1] == last


def test_another_seed_draws_other_dropout(runs: Runs) -> None:
    losses = [runs.resumed[name][0]["loss"] for name in ("lora", "lora-reseeded")]
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize(
    ("straight", "run"),
    [
        ("full", "full-two-to-one"),
        ("full-alone", "full-one-to-two"),
        ("full", "full-to-sharded"),
        ("sharded", "sharded-two-to-one"),
        ("sharded", "sharded-to-full"),
        ("full-alone", "sharded-one-to-two"),
    ],
)
def test_other_numbers_of_workers_and_zero_stages_end_with_the_same_weights(
    runs: Runs, straight: str, run: str
) -> None:
    expected, found = (runs.tensors(name, "step-000004/parameters.safetensors") for name in (straight, run))
    assert list(found) == list(expected)
    for name, value in expected.items():
        # Biases of keys have no effect on a softmax: their gradients are rounding alone, which Adam enlarges.
        tolerance = 1e-4 if name.endswith(("k_proj.bias", "attn.qkv.bias")) else 1e-6
        torch.testing.assert_close(found[name], value, atol=tolerance, rtol=0, msg=name)
    expected, found = (runs.tensors(name, "step-000004/moments.safetensors") for name in (straight, run))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0, msg=name)


def test_temperatures_stop_at_their_bounds(runs: Runs) -> None:
    """In the master copy, and not only where the objective reads them."""
    theta = runs.tensors("racing", "step-000003/parameters.safetensors")["objective.theta_T"]
    torch.testing.assert_close(theta, torch.tensor([HIGH, HIGH]).log(), atol=1e-6, rtol=0)
    assert runs.straight["racing"][2]["temperature"] == pytest.approx(HIGH)


def test_rows_name_every_metric_and_count_over_ranks(runs: Runs) -> None:
    for rows in runs.straight.values():
        assert all(set(row) == {"step", "source", "task", *metrics_of(ObjectiveConfig())} for row in rows)
        assert [row["bad_samples"] for row in rows[:3]] == [0, 2, 0]  # one on each rank
        assert [row["task"] for row in rows[:3]] == ["a", "b", "a"]
        assert all(row["samples_per_s"] == pytest.approx(GLOBAL_BATCH / row["step_s"]) for row in rows)
        assert all(0 < row["feed_wait_s"] < row["step_s"] for row in rows)
    assert [row["lr"] for row in runs.straight["full"]] == pytest.approx([1e-3, 7.5e-4, 2.5e-4, 0])
    assert all(row["grad_norm"] > 1 for row in runs.straight["full"])


def test_the_model_is_written_once_in_the_form_of_its_kind(runs: Runs) -> None:
    for run in ("full", "sharded"):
        trained = runs.tensors(run, "step-000004/parameters.safetensors")
        _, embedder = load_encoder(str(runs.root / run / "model" / "0"))
        for name, parameter in embedder.backbone.named_parameters():
            assert torch.equal(parameter, trained[f"embedder.backbone.{name}"]), name
        identity = json.loads((runs.root / run / "model" / "0" / "rzen.json").read_text())
        assert identity["lineage"]["base"] == runs.model_dir
    for name in ("lora", "bf16", "sharded-bf16"):
        adapter = runs.tensors(name, "model/0/adapter_model.safetensors")
        masters = runs.tensors(name, "step-000004/parameters.safetensors")
        assert len(adapter) == 48 == len(masters) - 1
        for tensor, value in adapter.items():  # the fp32 master copy, even where bf16 computes
            assert torch.equal(value, masters[f"embedder.backbone.{tensor.replace('.weight', '.default.weight')}"])
    rounded = [torch.equal(value, value.bfloat16().float()) for value in adapter.values()]
    assert not any(rounded)
    assert not list(runs.root.glob("*/model/1"))


@pytest.mark.parametrize("run", ["full", "sharded"])
def test_the_best_checkpoint_becomes_a_model_too(runs: Runs, run: str) -> None:
    trained = runs.tensors(run, "step-000002/parameters.safetensors")
    _, embedder = load_encoder(str(runs.root / run / "model" / "best"))
    for name, parameter in embedder.backbone.named_parameters():
        assert torch.equal(parameter, trained[f"embedder.backbone.{name}"]), name
    assert not (runs.root / f"{run}-resumed" / "model" / "best").exists()


def test_training_goes_on_from_an_adapter(runs: Runs) -> None:
    lora, full = (stages(runs.model_dir)[name] for name in ("lora", "full"))
    learner = build_learner(lora, runs.model_dir, runs.root / "lora" / "model" / "0", ["a"])
    trained = {name: value for name, value in learner.named_parameters() if value.requires_grad}
    expected = runs.tensors("lora", "step-000004/parameters.safetensors")
    assert set(trained) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in trained.items() if name != "objective.theta_T")
    with pytest.raises(
        UserError, match=r"^init_adapter: needs tune=lora; export base and adapter, and train the result$"
    ):
        build_learner(full, runs.model_dir, runs.root / "lora" / "model" / "0", ["a"])


def test_deepspeed_compiles_nothing(runs: Runs) -> None:
    assert not (runs.root / "extensions").exists()
