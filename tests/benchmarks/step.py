"""What Ray Train and DeepSpeed cost: their step against the same step in a bare loop, on one worker.

    python -m tests.benchmarks.step --write                           about ten minutes on two cores; writes step.md
    python -m tests.benchmarks.step --turns 1 --steps 4 --pairs 4     a glance

    bare     the learner and the optimizer of the project in a loop: no Ray, no DeepSpeed, no metrics
    stage    the training loop of the project, with DeepSpeed, metrics and telemetry, in a plain process
    ray      the same as the worker of a TorchTrainer

Batches are made beforehand and held in memory, so that the feed does not count. A tiny backbone with an adapter, fp32,
one thread. Each run is a process of its own; a step is what lies between two ends of steps, and a run counts as its
median, without the first steps. The ways take turns, and ratios are to `bare` of the same turn. All ways must end with
the same loss. Nothing else should run on the machine.

Aim: `ray` within 10% of `bare`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from pipelines.feed.batch import FeedBlock
from rzen.config import ModelConfig, ObjectiveConfig, OptimConfig, TinyBackbone
from rzen.inputs.pairs import EncodedPairs
from rzen.model.backbone import build_tiny
from rzen.training.build import build_learner
from rzen.training.optim import build_optimizer, lr_at, set_lr
from rzen.training.stage import Stage
from rzen.training.worker import seed_step, train_stage
from tests.benchmarks import synthetic
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import answer, say, show, spread
from tests.tiny import TEXTS

WAYS = {"bare": "bare loop", "stage": "DeepSpeed", "ray": "Ray Train and DeepSpeed"}
BACKBONE = TinyBackbone(hidden=128, layers=4, vision_width=96, vocabulary=640)
NUM_BATCHES, UNCOUNTED, TASK = 4, 3, "t"


@dataclass(frozen=True)
class Setting:
    """Of all runs. JSON."""

    backbone_dir: str
    num_pairs: int
    num_steps: int


@dataclass(frozen=True)
class Result:
    """Seconds of each counted step, and the loss of the last."""

    step_s: list[float]
    loss: float


@dataclass(frozen=True)
class Batch:
    """What the feed gives to a rank."""

    step: int
    blocks: tuple[FeedBlock, ...]
    batch: EncodedPairs
    rejected: tuple[()] = ()
    cached_fraction: float = 0.0
    rejected_candidates: tuple[()] = ()


@dataclass
class NoCheckpoints:
    """A store that keeps nothing."""

    def latest(self) -> None:
        """There is none."""

    def best(self) -> None:
        """There is none."""

    def publish(self, folder: Path, step: int) -> None:
        """Drops it."""

    def report(self, event: str) -> None:
        """Cannot be: nothing is written."""


@dataclass
class Clock:
    """When steps ended."""

    ends_s: list[float] = field(default_factory=list)
    loss: float = 0.0

    def tick(self, loss: float) -> None:
        """A step has ended."""
        self.ends_s.append(time.perf_counter())
        self.loss = loss

    def result(self) -> Result:
        """Of all steps but the first."""
        return Result([end - begin for begin, end in pairwise(self.ends_s[UNCOUNTED - 1 :])], self.loss)


def stage_of(setting: Setting) -> Stage:
    """One checkpoint, after the last step."""
    model = ModelConfig(backbone=setting.backbone_dir, dtype="float32", gradient_checkpointing=False)
    steps = setting.num_steps
    return Stage(
        model, ObjectiveConfig(), OptimConfig(), steps, 0, checkpoint_every_steps=steps, plan_fingerprint="none"
    )


def batches_of(setting: Setting) -> list[EncodedPairs]:
    """A few batches, which are used again and again."""
    config = AutoConfig.from_pretrained(setting.backbone_dir)
    pairs = synthetic.encode(synthetic.mixed(NUM_BATCHES * setting.num_pairs, shrink=4), config)
    size = setting.num_pairs
    return [synthetic.collate(pairs[start : start + size]) for start in range(0, len(pairs), size)]


def bare(setting: Setting) -> Result:
    """The step as one would write it in a notebook."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    stage, given, clock = stage_of(setting), batches_of(setting), Clock()
    learner = build_learner(stage, setting.backbone_dir, None, [TASK]).train()
    optimizer = build_optimizer(learner, stage.optim)
    for step in range(stage.num_steps):
        seed_step(stage.seed, step)
        set_lr(optimizer, lr_at(step, stage.num_steps, stage.optim))
        loss, _ = learner(given[step % NUM_BATCHES], [(TASK, setting.num_pairs)], step)
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), stage.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick(loss.item())
    return clock.result()


def with_deepspeed(setting: Setting) -> Result:
    """The project's loop, in this process."""
    given, clock = batches_of(setting), Clock()

    def batches(start: int) -> Iterator[Batch]:
        for step in count(start):
            yield Batch(step, (FeedBlock("synthetic", TASK, 0, setting.num_pairs),), given[step % NUM_BATCHES])

    with tempfile.TemporaryDirectory() as folder:
        train_stage(
            stage_of(setting),
            backbone_dir=setting.backbone_dir,
            init_adapter=None,
            tasks=[TASK],
            batches=batches,
            checkpoints=NoCheckpoints(),
            output=Path(folder, "model"),
            on_metrics=lambda row: clock.tick(float(row["loss"])),
            num_threads=1,
        )
    return clock.result()


def under_ray(setting: Setting) -> Result:
    """The project's loop, in a worker of Ray Train on a Ray of this process."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    with tempfile.TemporaryDirectory(prefix="rz", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: sockets
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        found = Path(folder, "result.json")
        TorchTrainer(
            ray_worker,
            train_loop_config={"setting": vars(setting), "found": str(found)},
            scaling_config=ScalingConfig(num_workers=1),
            torch_config=TorchConfig(backend="gloo"),
            run_config=RunConfig(storage_path=folder),
        ).fit()
        result = Result(**json.loads(found.read_text()))
        ray.shutdown()
    return result


def ray_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs."""
    Path(config["found"]).write_text(json.dumps(vars(with_deepspeed(Setting(**config["setting"])))))


RUNS = {"bare": bare, "stage": with_deepspeed, "ray": under_ray}


def measure(setting: Setting, turns: int) -> dict[str, list[float]]:
    """Every way in turn: median seconds of a step. Raises `AssertionError` where losses differ."""
    medians: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(turns):
        losses = {}
        for way in WAYS:
            words = ("--run", way, json.dumps(vars(setting)))
            found = Result(**answer("tests.benchmarks.step", *words, OMP_NUM_THREADS="1", RAY_AUTH_MODE="disabled"))
            medians[way].append(statistics.median(found.step_s))
            losses[way] = found.loss
            say(f"turn {turn + 1}, {way}: {spread(found.step_s, '.3g')} s, loss {found.loss:.6f}")
        assert max(losses.values()) - min(losses.values()) < 1e-6 + 1e-3 * max(losses.values()), losses
    return medians


def table(medians: dict[str, list[float]]) -> list[str]:
    """Markdown: ratios first."""
    lines = ["| way | of bare | s |", "|---|---:|---:|"]
    for way, title in WAYS.items():
        ratios = [run / base for run, base in zip(medians[way], medians["bare"], strict=True)]
        lines.append(f"| {title} | {spread(ratios, '.3f')} | {spread(medians[way], '.3g')} |")
    return lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=7, help="of each way (7)")
    parser.add_argument("--steps", type=int, default=20, help=f"of a run, the first {UNCOUNTED} not counted (20)")
    parser.add_argument("--pairs", type=int, default=32, help="of a step (32)")
    parser.add_argument("--write", action="store_true", help="replace step.md beside this file")
    parser.add_argument("--run", nargs=2, metavar=("WAY", "SETTING"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        way, setting = options.run
        print(json.dumps(vars(RUNS[way](Setting(**json.loads(setting))))))
        return
    with tempfile.TemporaryDirectory() as folder:
        build_tiny(Path(folder), BACKBONE, TEXTS)
        medians = measure(Setting(folder, options.pairs, options.steps), options.turns)
    report = "\n".join(
        [
            "# What Ray Train and DeepSpeed cost",
            "",
            f"{describe_machine('cpu')}. Median of {options.turns} turns (smallest to largest).",
            f"`{' '.join(['python -m tests.benchmarks.step', *sys.argv[1:]])}`; `step.py` tells how it is measured.",
            "",
            f"Steps of {options.pairs} pairs; each run is the median of {options.steps - UNCOUNTED} steps.",
            "",
            *table(medians),
            "",
        ]
    )
    show(report, __file__, write=options.write)


if __name__ == "__main__":
    main()
