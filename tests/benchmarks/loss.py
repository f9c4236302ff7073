"""What the loss costs: memory and time of forward and backward, all at once, in tiles, and by sentence-transformers.

    python -m tests.benchmarks.loss --write                         an hour and a half on two cores; writes loss.md
    python -m tests.benchmarks.loss --sizes 512 1024 --turns 1      a glance
    python -m tests.benchmarks.loss --device cuda --write           on a GPU; without Ray and DeepSpeed

What is measured is the way from the vectors of one rank to their gradients: N queries and N targets of width 1536 in
fp32, of length 1, with gradient. No model takes part: that of sentence-transformers' cached loss returns its input, so
that what it does to embed in mini-batches costs a copy. Its mini-batches have as many rows as our tiles.

    recipe    hardness weights, false negatives by content and likeness after the warm-up, a learned temperature
    plain     InfoNCE: the same as sentence-transformers' loss, which has no such rules

Each run is a process of its own that first warms up, on a CPU with few rows and on a GPU with all. The ways take turns,
so that a slow minute hits all of them, and ratios are to `all at once` of the same turn and options. Memory is what the
process (on a GPU: the allocator) holds at most beyond the inputs; the gradients of the inputs are part of it. A process
keeps freed blocks of less than 32 MiB, so that small sizes look larger than they are. Where all at once does not fit,
it is left out. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from rzen.config import FalseNegativeConfig, HardnessConfig, ObjectiveConfig, TemperatureConfig
from rzen.objective.batch import Batch
from rzen.objective.loss import Objective
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import answer, say, seconds_of, show, spread

WIDTH, TILE_ROWS, TAU, SEED = 1536, 512, 0.02, 0
TURNS = {4096: 5, 8192: 5, 16384: 2, 32768: 1}
MATRICES = 7  # of queries x targets in fp32, which `all at once` holds at most
WAYS = {
    # name: (options, what)
    "recipe": ("recipe", "all at once"),
    "recipe tiled": ("recipe", f"tiles of {TILE_ROWS} rows"),
    "plain": ("plain", "all at once"),
    "plain tiled": ("plain", f"tiles of {TILE_ROWS} rows"),
    "cached": ("plain", "sentence-transformers, cached"),
}
Results = dict[tuple[int, str], list[dict[str, float]]]  # (rows, way) -> seconds and GiB of each turn


class Given(nn.Module):
    """A model whose vectors are its input."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["vectors"]}

    def __getitem__(self, _: int) -> Given:
        return self


def ours(way: str, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss as a function of queries and targets."""
    recipe = way.startswith("recipe")
    config = ObjectiveConfig(
        hardness=HardnessConfig() if recipe else None,
        false_negatives=FalseNegativeConfig(warmup_steps=0) if recipe else None,
        temperature=TemperatureConfig(initial=TAU),
        tile_rows=TILE_ROWS if way.endswith("tiled") else None,
    )
    objective = Objective(config, ["t"]).to(device)

    def loss(queries_ND: Tensor, targets_ND: Tensor) -> Tensor:
        ids_N = torch.arange(len(targets_ND), device=device) // 2 if recipe else None
        return objective(Batch(queries_ND, targets_ND, "t", target_ids=ids_N), step=0)[0]

    return loss


def cached() -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of sentence-transformers as a function of queries and targets."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    theirs = CachedMultipleNegativesRankingLoss(Given(), scale=1 / TAU, mini_batch_size=TILE_ROWS)
    return lambda queries_ND, targets_ND: theirs([{"vectors": queries_ND}, {"vectors": targets_ND}], None)


def measure(way: str, num_rows: int, device: str) -> dict[str, float]:
    """One run, in this process: `s` and `gib` beyond the inputs."""
    loss = cached() if way == "cached" else ours(way, device)
    once(loss, *make_inputs(num_rows if device == "cuda" else 256, device), device)
    inputs = make_inputs(num_rows, device)
    before = start_peak(device)
    seconds = once(loss, *inputs, device)
    return {"s": seconds, "gib": (peak(device) - before) / 2**30}


def make_inputs(num_rows: int, device: str) -> tuple[Tensor, Tensor]:
    """Queries near their targets. One in eight pairs of targets is one nearly twice, which the rule has to find."""
    generator = torch.Generator().manual_seed(SEED)
    targets = normalize(torch.randn(num_rows, WIDTH, generator=generator), dim=1)
    noise = torch.randn(num_rows, WIDTH, generator=generator).div_(WIDTH**0.5)
    targets[1::8] = normalize(targets[::8] + 0.1 * noise[::8], dim=1)
    queries = normalize(noise.add_(targets), dim=1)
    return queries.to(device).requires_grad_(), targets.to(device).requires_grad_()


def once(loss: Callable[[Tensor, Tensor], Tensor], queries: Tensor, targets: Tensor, device: str) -> float:
    """Seconds of forward and backward."""
    seconds = seconds_of(lambda: loss(queries, targets).backward(), device)
    assert queries.grad is not None
    assert targets.grad is not None
    return seconds


def start_peak(device: str) -> int:
    """Bytes in use; `peak` counts from now on."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(device: str) -> int:
    """The most bytes in use since `start_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def resident(name: str) -> int:
    """Bytes, of a line in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def fits(way: str, num_rows: int, device: str) -> bool:
    """Whether there is memory for a run."""
    if WAYS[way][1] != "all at once":
        return True
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return MATRICES * 4 * num_rows**2 < free


def table(results: Results, sizes: Sequence[int]) -> list[str]:
    """Markdown. A way without results was left out."""
    lines = [
        "| rows | options | way | turns | of all at once, time | s | extra memory, GiB |",
        "|---:|---|---|---:|---:|---:|---:|",
    ]
    for num_rows in sizes:
        for way, (options, what) in WAYS.items():
            runs, whole = results.get((num_rows, way), []), results.get((num_rows, options), [])
            if not runs:
                why = "not installed" if way == "cached" else f"needs {MATRICES * 4 * num_rows**2 / 2**30:.0f} GiB"
                lines.append(f"| {num_rows:,} | {options} | {what} | 0 | {why} | | |")
                continue
            ratios = [run["s"] / base["s"] for run, base in zip(runs, whole, strict=False)]
            cells = [
                str(len(runs)),
                spread(ratios, ".2f") if ratios else "",
                spread([run["s"] for run in runs], ".3g"),
                spread([run["gib"] for run in runs], ".2f"),
            ]
            lines.append(f"| {num_rows:,} | {options} | {what} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[*TURNS], help="rows (4096 to 32768)")
    parser.add_argument("--turns", type=int, help="of each size (5, 5, 2 and 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    parser.add_argument("--write", action="store_true", help="replace loss.md beside this file; on a GPU loss_cuda.md")
    parser.add_argument("--run", nargs=2, metavar=("WAY", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        way, num_rows = options.run
        print(json.dumps(measure(way, int(num_rows), options.device)))
        return
    installed = importlib.util.find_spec("sentence_transformers") is not None
    results: Results = {}
    for num_rows in options.sizes:
        for turn in range(options.turns or TURNS.get(num_rows, 5)):
            for way in WAYS:
                if (way == "cached" and not installed) or not fits(way, num_rows, options.device):
                    continue
                run = answer(__spec__.name, "--device", options.device, "--run", way, str(num_rows))
                results.setdefault((num_rows, way), []).append(run)
                say(f"{num_rows} rows, turn {turn + 1}, {way}: {run['s']:.3g} s, {run['gib']:.2f} GiB")
    report = "\n".join(
        [
            f"# What the loss costs: N queries and N targets of width {WIDTH}, fp32, forward and backward",
            "",
            f"{describe_machine(options.device)}. Median (smallest to largest).",
            f"`{' '.join(['python -m tests.benchmarks.loss', *sys.argv[1:]])}`; `loss.py` tells how it is measured.",
            "",
            *table(results, options.sizes),
            "",
        ]
    )
    show(report, __file__, write=options.write, on_gpu=options.device == "cuda")


if __name__ == "__main__":
    main()
