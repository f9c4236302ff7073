"""What a soup of three adapters of Qwen2-VL-2B costs: seconds and memory, ours, by PEFT, and the plain mean of tensors.

    python -m tests.benchmarks.soup --write                     some minutes on two cores; writes soup.md
    python -m tests.benchmarks.soup --blocks 1 --turns 1        a glance

Adapters are random, of rank 64 on every linear layer (shapes of Qwen2-VL-2B's `config.json`), fp32. Four ways from
their directories to that of the soup:

    exact      ours, ranks concatenated to 192: module by module from file to file
    svd        ours, cut to rank 64; random adapters share nothing, so that what it leaves out is the most there can be
    cat        PEFT: `load_adapter` of each (`low_cpu_mem_usage`, which starts no random numbers),
               `add_weighted_adapter(combination_type="cat")`, `save_pretrained`. It needs the modules of a backbone:
               these are there, made before time and memory count, with weights of one number each
    plain      safetensors: load all, mean of each tensor by name, save. Fast, and wrong: the mean of A times the mean
               of B is not that of the products

Each run is a process of its own with one thread, since tensors are small. The ways take turns; ratios are to `exact` of
the same turn. Time begins after the imports. Ours checks every number and hashes every parent for the lineage, which
the others do not: `of it hashing` is measured alone, after the run. Memory is what the process holds at most beyond
what it held after the imports, mapped pages of files included. Files are in the page cache, and are not waited for when
written. The error is that of three modules, the largest and the smallest among them, relative to the fp64 mean of
products. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from rzen.config import MeanSoup
from rzen.model.lora import CONFIG, WEIGHTS
from rzen.soup.make import make_soup
from rzen.soup.parents import open_parents
from tests.benchmarks import synthetic
from tests.benchmarks.loss import peak, start_peak
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import answer, say, show, spread

NAMES = ("a", "b", "c")
WAYS = {
    "exact": "rzen, exact",
    "svd": "rzen, SVD to rank 64",
    "cat": "PEFT, `cat`",
    "plain": "plain mean of tensors (wrong)",
}
MODULES = (
    "language_model.layers.0.mlp.down_proj",
    "language_model.layers.0.self_attn.k_proj",
    "visual.blocks.0.attn.qkv",
)
PARTS = ("load", "merge", "write")
RANK = 64  # of `synthetic.build`
Measure = Callable[[str, Path, int | None], dict[str, float]]
Results = dict[str, list[dict[str, float]]]  # way -> seconds, GiB and error of each turn


def shape(blocks: int | None) -> synthetic.Shape:
    """Qwen2-VL-2B, or one of fewer blocks of vision tower and language model."""
    full = synthetic.SHAPES["2b"]
    if blocks is None:
        return full
    text = full.settings["text_config"] | {"num_hidden_layers": blocks}
    vision = full.settings["vision_config"] | {"depth": blocks}
    return synthetic.Shape(full.settings | {"text_config": text, "vision_config": vision}, full.shrink)


def write_parents(folder: Path, blocks: int | None) -> int:
    """Three adapters, all numbers random; returns how many numbers one has."""
    model = synthetic.build(shape(blocks), "meta", "sdpa", checkpointing=False)
    shapes = {
        name: value.shape for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        model.peft_config["default"].save_pretrained(str(folder / name))
        tensors = {key: torch.randn(size, generator=generator) for key, size in shapes.items()}
        save_file(tensors, folder / name / WEIGHTS, metadata={"format": "pt"})
    return sum(size.numel() for size in shapes.values())


def ours(parents: Sequence[Path], out: Path, rank: int | None) -> dict[str, float]:
    """Reads, merges and writes module by module."""
    begun_s = time.perf_counter()
    make_soup({path.name: path for path in parents}, out, MeanSoup(rank=rank))
    return {"s": time.perf_counter() - begun_s}


def by_peft(parents: Sequence[Path], out: Path, backbone: Any) -> dict[str, float]:
    """PEFT's way to the same, `load` with the time to put empty adapters into the backbone."""
    begun_s = time.perf_counter()
    first, *others = parents
    model = peft.PeftModel.from_pretrained(backbone, str(first), adapter_name=first.name, low_cpu_mem_usage=True)
    for path in others:
        model.load_adapter(str(path), path.name, low_cpu_mem_usage=True)
    loaded_s = time.perf_counter()
    model.add_weighted_adapter([path.name for path in parents], [1 / len(parents)] * len(parents), "soup", "cat")
    merged_s = time.perf_counter()
    model.save_pretrained(str(out.parent), selected_adapters=["soup"], save_embedding_layers=False)
    done_s = time.perf_counter()
    (out.parent / "soup").rename(out)
    return {
        "s": done_s - begun_s,
        "load": loaded_s - begun_s,
        "merge": merged_s - loaded_s,
        "write": done_s - merged_s,
    }


def plain(parents: Sequence[Path], out: Path) -> dict[str, float]:
    """What one writes first, and what is wrong."""
    begun_s = time.perf_counter()
    states = [load_file(path / WEIGHTS) for path in parents]
    loaded_s = time.perf_counter()
    tensors = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
    merged_s = time.perf_counter()
    out.mkdir()
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    done_s = time.perf_counter()
    (out / CONFIG).write_text((parents[0] / CONFIG).read_text())
    return {
        "s": done_s - begun_s,
        "load": loaded_s - begun_s,
        "merge": merged_s - loaded_s,
        "write": done_s - merged_s,
    }


def measure(way: str, folder: Path, blocks: int | None) -> dict[str, float]:
    """One run, in this process: seconds, `gib` beyond what it holds now, and the `error`."""
    parents = [folder / name for name in NAMES]
    backbone = hollow(blocks) if way == "cat" else None
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out = Path(scratch, "out")
        before = start_peak("cpu")
        if way == "cat":
            found = by_peft(parents, out, backbone)
        else:
            found = plain(parents, out) if way == "plain" else ours(parents, out, RANK if way == "svd" else None)
        found["gib"] = (peak("cpu") - before) / 2**30
        found["error"] = error(out, parents)
    if way in ("exact", "svd"):
        begun_s = time.perf_counter()
        for parent in open_parents({path.name: path for path in parents}):
            assert parent.sha256
        found["hash"] = time.perf_counter() - begun_s
    return found


def hollow(blocks: int | None) -> Any:
    """A backbone without memory: each weight is one zero, expanded. It is on the CPU, where PEFT then puts adapters."""
    with torch.device("meta"):
        backbone = AutoModel.from_config(shape(blocks).config)
    for module in backbone.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zero = torch.zeros(()).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(zero, requires_grad=False))
    return backbone


def error(soup: Path, parents: Sequence[Path]) -> float:
    """The largest of a module, relative to the norm of the mean of products, fp64."""
    found = 0.0
    for module in MODULES:
        exact = sum(delta(path, module) for path in parents) / len(parents)
        found = max(found, float((delta(soup, module) - exact).norm() / exact.norm()))
    return found


def delta(folder: Path, module: str) -> Tensor:
    """scale * B.A of one module, fp64."""
    config = json.loads((folder / CONFIG).read_text())
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        a_RI, b_OR = (file.get_tensor(f"base_model.model.{module}.lora_{input}.weight").double() for input in "AB")
    return config["lora_alpha"] / config["r"] * b_OR @ a_RI


def table(results: Results) -> list[str]:
    """Markdown."""
    lines = [
        "| way | of `exact`, time | s | load, merge, write | of it hashing | memory, GiB | error |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for way, runs in results.items():
        ratios = [run["s"] / base["s"] for run, base in zip(runs, results["exact"], strict=True)]
        parts = [f"{statistics.median(run[part] for run in runs):.2g}" for part in PARTS if part in runs[0]]
        cells = [
            spread(ratios, ".2f"),
            spread([run["s"] for run in runs], ".3g"),
            ", ".join(parts) or "all at once",
            f"{statistics.median(run['hash'] for run in runs):.2g}" if "hash" in runs[0] else "",
            spread([run["gib"] for run in runs], ".2f"),
            f"{max(run['error'] for run in runs):.0e}",
        ]
        lines.append(f"| {WAYS[way]} | {' | '.join(cells)} |")
    return lines


def measure_in_new_process(way: str, folder: Path, blocks: int | None) -> dict[str, float]:
    """Return what `measure` returns, with the memory of a process that has done nothing else."""
    options = [] if blocks is None else ["--blocks", str(blocks)]
    found = answer("tests.benchmarks.soup", *options, "--run", way, str(folder), OMP_NUM_THREADS="1")
    return cast(dict[str, float], found)


def report(options: argparse.Namespace, measure_way: Measure = measure_in_new_process) -> str:
    """Measure all ways and return the report in Markdown."""
    results: Results = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="rzen-soup-") as scratch:
        numbers = write_parents(Path(scratch), options.blocks)
        for turn in range(options.turns):
            for way in WAYS:
                run = measure_way(way, Path(scratch), options.blocks)
                results[way].append(run)
                say(f"turn {turn + 1}, {way}: {run['s']:.3g} s, {run['gib']:.2f} GiB")
    where = f"{describe_machine()}, one thread, torch {torch.__version__}"
    return "\n".join(
        [
            f"# A soup of {len(NAMES)} adapters of rank {RANK}",
            "",
            f"{where}. Median of {options.turns} turns (smallest to largest).",
            f"`{' '.join(['python -m tests.benchmarks.soup', *sys.argv[1:]])}`; `soup.py` tells how it is measured.",
            "",
            f"An adapter has {numbers / 1e6:.1f}M numbers, {4 * numbers / 2**30:.2f} GiB; PEFT {peft.__version__}.",
            "",
            *table(results),
            "",
        ]
    )


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.soup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, help="of vision tower and language model (32 and 28)")
    parser.add_argument("--turns", type=int, default=5, help="of each way (5)")
    parser.add_argument("--write", action="store_true", help="replace soup.md beside this file")
    parser.add_argument("--run", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    """The command line."""
    options = arguments()
    if options.run:
        way, folder = options.run
        print(json.dumps(measure(way, Path(folder), options.blocks)))
        return
    show(report(options), __file__, write=options.write)


if __name__ == "__main__":
    main()
