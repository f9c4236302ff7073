"""How much of a mixed batch is padding, and what it costs: all at once, grouped by length, and packed.

    python -m tests.benchmarks.padding --write                        some minutes on two cores; writes padding.md
    python -m tests.benchmarks.padding --pairs 8 --turns 1            a glance
    python -m tests.benchmarks.padding --device cuda --write          on a GPU, Qwen2-VL-2B's shape; padding_cuda.md

Pairs are synthetic: short texts against texts, images, pages and clips in turn (`synthetic.mixed`).

    whole      queries in one padded batch, targets in another
    grouped    neighbors in length together, in chunks of at most so many tokens, padding included
    packed     the same chunks without padding, end to end in one row

Shares of padding are exact: they follow from the lengths of the pairs at their real size, and no model takes part.
Times are those of forward and backward with a random backbone, on a CPU a tiny one with smaller visuals, without
gradient caching, which would compute `grouped` and `packed` twice; the ways take turns, in one process, and ratios are
to `whole` of the same turn. Before, their vectors are compared. Without flash attention `packed` scores all tokens of a
chunk against each other: its time counts with flash attention alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.utils import is_flash_attn_2_available

from rzen.inputs.processor import EncodedBatch
from rzen.model.chunks import Indices, chunks_of, embed, padding_fraction
from rzen.model.embedding_model import EmbeddingModel
from tests.benchmarks import synthetic
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import say, seconds_of, show, spread

WAYS = ("whole", "grouped", "packed")
BUDGETS = (4096, 8192, 16384, 32768)
GLOBAL_PAIRS = 768  # the recipe's batch, for the shares


def chunks(way: str, lengths: np.ndarray[Any, np.dtype[np.int32]], budget: int) -> list[Indices]:
    """Which inputs are embedded together; the first half are the queries."""
    if way == "whole":
        return np.split(np.arange(len(lengths)), 2)
    return chunks_of(lengths, budget, packed=way == "packed")


def shares(num_pairs: int) -> list[str]:
    """Markdown: padding among all tokens, at real size."""
    pairs = synthetic.mixed(num_pairs, shrink=1)
    inputs = [query for query, _ in pairs] + [target for _, target in pairs]
    lengths = np.array([input.num_tokens for input in inputs], np.int32)
    lines = [
        f"{num_pairs} pairs, {lengths.sum():,} tokens; inputs of {lengths.min()} to {lengths.max()}.",
        "",
        "| way | tokens of a chunk | chunks | padding |",
        "|---|---:|---:|---:|",
    ]
    for way in WAYS:
        for budget in BUDGETS if way != "whole" else (0,):
            found = chunks(way, lengths, budget)
            share = padding_fraction(lengths, found, packed=way == "packed")
            lines.append(f"| {way} | {f'{budget:,}' if budget else 'all'} | {len(found)} | {share:.1%} |")
    return lines


def vectors(embedder: EmbeddingModel, inputs: EncodedBatch, way: str, budget: int) -> Tensor:
    """Of all inputs, in their order."""
    embedder.packing = "packed" if way == "packed" else "padded"
    return embed(embedder, inputs.split(), chunks(way, inputs.lengths, budget), twice=False)


def step(embedder: EmbeddingModel, inputs: EncodedBatch, way: str, budget: int) -> None:
    """Forward and backward."""
    queries_BD, targets_BD = vectors(embedder, inputs, way, budget).chunk(2)
    cross_entropy(50 * queries_BD @ targets_BD.T, torch.arange(len(queries_BD), device=queries_BD.device)).backward()


def times(shape: synthetic.Shape, options: argparse.Namespace, attention: str) -> list[str]:
    """Markdown: time of each way. Raises `AssertionError` where vectors differ."""
    budget = options.chunk_tokens // shape.shrink**2
    model: Any = synthetic.build(shape, options.device, attention, checkpointing=options.device == "cuda")
    embedder = EmbeddingModel(model, synthetic.LAYOUT).to(options.device)
    pairs = synthetic.collate(synthetic.encode(synthetic.mixed(options.pairs, shape.shrink), model.config))
    inputs = EncodedBatch.concat([pairs.queries, pairs.targets])
    with torch.no_grad():
        found = {way: vectors(embedder, inputs, way, budget) for way in WAYS}
    apart = max(float((found[way] - found["whole"]).norm(dim=1).max()) for way in WAYS)
    assert apart < (1e-5 if options.device == "cpu" else 0.1), apart  # bf16 has 8 bits
    runs: dict[str, list[float]] = {way: [] for way in WAYS}
    for way in WAYS:
        step(embedder, inputs, way, budget)
    for turn in range(options.turns):
        for way in WAYS:
            runs[way].append(seconds_of(partial(step, embedder, inputs, way, budget), options.device))
            say(f"turn {turn + 1}, {way}: {runs[way][-1]:.3g} s")
    lines = [
        f"{options.pairs} pairs, chunks of {budget:,} tokens, attention {attention}. Vectors, of length 1, lie"
        f" at most {apart:.0e} apart.",
        "",
        "| way | chunks | padding | time, of whole | s |",
        "|---|---:|---:|---:|---:|",
    ]
    for way in WAYS:
        own = chunks(way, inputs.lengths, budget)
        share = padding_fraction(inputs.lengths, own, packed=way == "packed")
        ratios = [run / base for run, base in zip(runs[way], runs["whole"], strict=True)]
        lines.append(f"| {way} | {len(own)} | {share:.1%} | {spread(ratios, '.2f')} | {spread(runs[way], '.3g')} |")
    return lines


def report(options: argparse.Namespace) -> str:
    """Measures all, in Markdown."""
    attention = "flash_attention_2" if options.device == "cuda" and is_flash_attn_2_available() else "sdpa"
    size = "2b" if options.device == "cuda" else "tiny"
    return "\n".join(
        [
            "# Padding of a mixed batch",
            "",
            f"{describe_machine(options.device)}. Median of {options.turns} turns (smallest to largest).",
            f"`python -m tests.benchmarks.padding {' '.join(sys.argv[1:])}`; `padding.py` tells how it is measured.",
            "",
            "## How much, exactly",
            "",
            *shares(GLOBAL_PAIRS),
            "",
            f"## What it costs: forward and backward of a {size} backbone",
            "",
            *times(synthetic.SHAPES[size], options, attention),
            "",
        ]
    )


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.padding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    parser.add_argument("--pairs", type=int, default=48, help="that are timed (48)")
    parser.add_argument("--turns", type=int, default=7, help="of each way (7)")
    parser.add_argument("--chunk-tokens", type=int, default=16384, help="(16384; of a tiny shape a sixteenth)")
    parser.add_argument(
        "--write", action="store_true", help="replace padding.md beside this file; on a GPU padding_cuda.md"
    )
    return parser.parse_args(words)


def main() -> None:
    """The command line."""
    options = arguments()
    found = report(options)
    show(found, __file__, write=options.write, on_gpu=options.device == "cuda")


if __name__ == "__main__":
    main()
