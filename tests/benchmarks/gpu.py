"""How much of a GPU a training step uses, and how fast a plain loop of transformers and PEFT is beside it.

    python -m tests.benchmarks.gpu --device cuda --write          on one GPU, about a quarter of an hour; writes gpu.md
    python -m tests.benchmarks.gpu --turns 1 --size 0.1           a glance on a CPU, whose numbers mean nothing

Needs torch, transformers, peft, and neither Ray nor DeepSpeed. The model has the shape of Qwen2-VL-2B and random
weights: bf16, an adapter of rank 64 on every linear layer, gradient checkpointing, AdamW. Batches are synthetic and
encoded beforehand: short texts against images of 256, 576 and 1280 tokens, and texts, images, pages and clips mixed.

    cached    our step: the recipe's objective over all pairs at once, gradient caching in chunks of tokens
    direct    our step without caching, in the largest batches that fit, found by halving
    plain     transformers' model and processor output, padded, InfoNCE by cross-entropy, in the largest that fit

All train one model with one optimizer, in one process, and take turns; ratios are to `plain` of the same turn. `plain`
has the vision tower of transformers: a call of attention for each image, patches by a convolution. Only `cached`
contrasts all pairs with each other.

Ceiling: bf16 products of square matrices on the same device, median. Operations are counted by formula (`flops.py`):
`needed` is forward and backward without padding and without anything repeated, as in the usual MFU; `computed` adds
padding, gradient checkpointing and the first pass of gradient caching, but counts causal attention as half where a
mask makes the kernel compute it whole (`plain`, where inputs differ in length). Memory is the allocator's peak in the
step, weights and optimizer included. Kernels are those of one step of `cached`, by their own time on the device.

Aims: at 1280 tokens `cached` computes at 45% of the ceiling or more (of what is needed at most half can be reached, as
there are three passes forward), and at least 1.5 times as many samples per second as `plain`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.utils import is_flash_attn_2_available

from rzen.config import ObjectiveConfig, OptimConfig
from rzen.inputs.pairs import EncodedPairs
from rzen.inputs.processor import EncodedBatch
from rzen.model.chunks import chunks_of
from rzen.model.embedding_model import EmbeddingModel
from rzen.model.vision import use_fast_vision
from rzen.objective.loss import Objective
from rzen.training.optim import build_optimizer
from rzen.training.step import EmbeddingLearner
from tests.benchmarks import flops, plain, synthetic
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import say, seconds_of, show, spread

CASES = {"256": 128, "576": 96, "1280": 48, "mixed": 96}  # pairs of a step: some seconds
WAYS = {
    "cached": "ours, gradient caching",
    "direct": "ours, largest batch that fits",
    "plain": "transformers + PEFT, largest batch that fits",
}
LATER = 1000  # a step after the warm-up of the false-negative rule
MEANINGLESS = "**These numbers mean nothing: they show that the benchmark runs. Only those of a GPU count.**"


@dataclass
class Run:
    """One step of one way."""

    s: float
    gib: float


class Bench:
    """The model, and a step of each way."""

    def __init__(self, shape: synthetic.Shape, device: str, attention: str, chunk_tokens: int) -> None:
        self.shape, self.device, self.attention, self.chunk_tokens = shape, device, attention, chunk_tokens
        self.model: Any = synthetic.build(shape, device, attention)
        embedder = EmbeddingModel(self.model, synthetic.LAYOUT)
        self.learner = EmbeddingLearner(embedder, Objective(ObjectiveConfig(), ["t"])).to(device).train()
        self.optimizer = build_optimizer(self.learner, OptimConfig())

    def batch(self, case: str, num_pairs: int) -> list[EncodedPairs]:
        """Pairs of a case, each for itself."""
        shrink = self.shape.shrink
        pairs = (
            synthetic.mixed(num_pairs, shrink) if case == "mixed" else synthetic.images_of(int(case), num_pairs, shrink)
        )
        return synthetic.encode(pairs, self.model.config)

    def step(self, way: str, pairs: list[EncodedPairs], size: int) -> Callable[[], None]:
        """A function that trains on all pairs once, `size` of them at a time. What it is given is ready by now."""
        parts = [synthetic.collate(pairs[start : start + size]) for start in range(0, len(pairs), size)]
        if way == "plain":
            config = self.model.config
            given = [
                (plain.library_inputs(part.queries, config), plain.library_inputs(part.targets, config))
                for part in parts
            ]
            losses = [lambda inputs=inputs: plain.loss(self.model, *inputs) for inputs in given]
        else:
            losses = [lambda part=part: self.learner(part, [("t", len(part))], LATER)[0] for part in parts]

        def step() -> None:
            plain.use_plain_vision(self.model, self.attention)
            if way != "plain":
                use_fast_vision(self.model)
            self.learner.chunk_tokens = self.chunk_tokens if way == "cached" else None
            for loss in losses:
                loss().backward()
                nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()

        return step

    def fitting(self, way: str, pairs: list[EncodedPairs]) -> tuple[int, Callable[[], None]]:
        """The largest size of `step` by halving that fits, and the step, once done. Raises where one pair does not."""
        size = len(pairs)
        while True:
            step = self.step(way, pairs, size)
            try:
                step()
                return size, step
            except torch.OutOfMemoryError:
                if size == 1 or way == "cached":
                    raise
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()
            size = -(-size // 2)

    def measure(self, step: Callable[[], None]) -> Run:
        """One step, its time and peak of memory."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(step, self.device)
        return Run(seconds, torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else 0.0)

    def operations(self, way: str, pairs: list[EncodedPairs], size: int) -> tuple[float, float]:
        """Needed and computed, of a step."""
        packed = way != "plain" and self.learner.embedder.packs
        needed = computed = 0.0
        for start in range(0, len(pairs), size):
            part = synthetic.collate(pairs[start : start + size])
            inputs = EncodedBatch.concat([part.queries, part.targets])
            chunks = np.split(np.arange(len(inputs)), 2)
            if way == "cached":
                chunks = chunks_of(inputs.lengths, self.chunk_tokens, packed=packed)
            needed += flops.needed(self.model, inputs).step()
            all_computed = flops.computed(self.model, inputs, chunks, packed=packed)
            computed += all_computed.step(cached=way == "cached" and len(chunks) > 1, checkpointing=True)
        return needed, computed

    def ceiling(self) -> float:
        """Operations a second of a product of square matrices: 8192 wide in bf16 on a GPU."""
        width, dtype = (8192, torch.bfloat16) if self.device == "cuda" else (512, torch.float32)
        a, b = torch.randn(2, width, width, device=self.device, dtype=dtype)
        seconds = [seconds_of(lambda: a @ b, self.device) for _ in range(30)]
        return 2 * width**3 / statistics.median(seconds[10:])

    def costs(self, step: Callable[[], None]) -> list[str]:
        """Markdown: the ten kernels (on a CPU: operators) that take longest."""
        on_gpu = self.device == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            seconds = seconds_of(step, self.device)
        found = [(event, _own_s(event, on_gpu)) for event in profiler.key_averages()]
        total_s = sum(own_s for _, own_s in found)
        lines = [f"Busy {min(1, total_s / seconds):.0%} of the step.", "", "| kernel | share | s | calls |"]
        lines.append("|---|---:|---:|---:|")
        for event, own_s in sorted(found, key=lambda some: -some[1])[:10]:
            name = event.key.replace("|", "/")[:90]
            lines.append(f"| `{name}` | {own_s / total_s:.1%} | {own_s:.3f} | {event.count} |")
        return lines


def _own_s(event: Any, on_gpu: bool) -> float:
    """Time of a kernel, or of an operator without those that it calls. Operators have no time of their own on a GPU."""
    if not on_gpu:
        return event.self_cpu_time_total / 1e6
    is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
    return event.self_device_time_total / 1e6 if is_kernel else 0.0


def measure_case(bench: Bench, case: str, num_pairs: int, turns: int) -> tuple[list[str], list[str]]:
    """Rows of the table and the costs of a case."""
    pairs = bench.batch(case, num_pairs)
    ceiling = bench.ceiling()
    sizes, steps, runs = {}, {}, {way: [] for way in WAYS}
    for way in WAYS:
        sizes[way], steps[way] = bench.fitting(way, pairs)
    for turn in range(turns):
        for way, step in steps.items():
            run = bench.measure(step)
            runs[way].append(run)
            say(f"{case}, turn {turn + 1}, {way}: {num_pairs / run.s:.3g} samples/s, {run.gib:.1f} GiB")
    rows = []
    for way, title in WAYS.items():
        needed, computed = bench.operations(way, pairs, sizes[way])
        cells = [
            case,
            title,
            f"{num_pairs} in {-(-num_pairs // sizes[way])}",
            spread([base.s / run.s for run, base in zip(runs[way], runs["plain"], strict=True)], ".2f"),
            spread([num_pairs / run.s for run in runs[way]], ".3g"),
            spread([needed / run.s / ceiling for run in runs[way]], ".1%"),
            spread([computed / run.s / ceiling for run in runs[way]], ".1%"),
            f"{max(run.gib for run in runs[way]):.1f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    title = f"## {case}: where the time goes"
    ceiling_told = f"Ceiling measured with this batch: {ceiling / 1e12:.3g} TFLOP/s."
    return rows, [title, "", ceiling_told, *bench.costs(steps["cached"]), ""]


def report(options: argparse.Namespace) -> str:
    """Measures all, in Markdown."""
    shape = synthetic.SHAPES[options.shape]
    attention = "flash_attention_2" if options.device == "cuda" and is_flash_attn_2_available() else "sdpa"
    chunk_tokens = options.chunk_tokens // shape.shrink**2
    bench = Bench(shape, options.device, attention, chunk_tokens)
    rows, costs = [], []
    for case in options.cases:
        some_rows, some_costs = measure_case(bench, case, max(2, round(CASES[case] * options.size)), options.turns)
        rows += some_rows
        costs += some_costs
    meaningful = options.device == "cuda" and options.shape == "2b"
    return "\n".join(
        [
            "# How much of a GPU a training step uses",
            "",
            *([] if meaningful else [MEANINGLESS, ""]),
            f"{describe_machine(options.device)}, attention {attention}, chunks of {chunk_tokens} tokens.",
            f"Median of {options.turns} turns (smallest to largest); `gpu.py` tells how it is measured.",
            f"`python -m tests.benchmarks.gpu {' '.join(sys.argv[1:])}`",
            "",
            "| tokens of an image | way | pairs, in batches | of plain | samples/s | of the ceiling, needed"
            " | of the ceiling, computed | peak, GiB |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
            *rows,
            "",
            *costs,
        ]
    )


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    parser.add_argument("--shape", choices=synthetic.SHAPES, help="of the backbone (2b; on a CPU tiny)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES], help="tokens of an image (all)")
    parser.add_argument("--turns", type=int, default=5, help="of each way (5)")
    parser.add_argument("--size", type=float, default=1.0, help="pairs of a step, relative to some seconds' (1.0)")
    parser.add_argument(
        "--chunk-tokens", type=int, default=16384, help="of gradient caching (16384; of a tiny shape a sixteenth)"
    )
    parser.add_argument("--write", action="store_true", help="replace gpu.md beside this file")
    options = parser.parse_args(words)
    options.shape = options.shape or ("2b" if options.device == "cuda" else "tiny")
    if options.write and (options.device, options.shape) != ("cuda", "2b"):
        parser.error("--write needs --device cuda and --shape 2b: other numbers mean nothing")
    return options


def main() -> None:
    """The command line."""
    options = arguments()
    found = report(options)
    show(found, __file__, write=options.write)


if __name__ == "__main__":
    main()
