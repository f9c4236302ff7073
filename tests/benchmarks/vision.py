"""What the vision tower costs with transformers' kernels, and with those of `rzen.model.vision`.

    python -m tests.benchmarks.vision --write                         some minutes on two cores; writes vision.md
    python -m tests.benchmarks.vision --images 2 --turns 1            a glance
    python -m tests.benchmarks.vision --device cuda --write           on a GPU; writes vision_cuda.md

Forward and backward of the whole tower, with random weights that are all trained, over images of one size: the towers
of the tests' tiny backbone and of Qwen2-VL-2B, of which a CPU gets four blocks instead of 32. The ways take turns in
one process; ratios are to `transformers` of the same turn, and vectors are compared before.

    transformers    a call of attention for each image, patches by a convolution
    attention       one call for all
    patches         patches by a product
    both            what rzen does
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from rzen.model.vision import NAME, PatchProjection, use_fast_vision
from tests.benchmarks import synthetic
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import say, seconds_of, show, spread

WAYS = {
    "transformers": ("sdpa", nn.Conv3d),
    "attention": (NAME, nn.Conv3d),
    "patches": ("sdpa", PatchProjection),
    "both": (NAME, PatchProjection),
}
GRID = 16  # patches along each side of an image: 64 tokens
CPU_DEPTH = 4


def tower(size: str, device: str) -> Any:
    """Of a shape, in bf16 on a GPU."""
    config = synthetic.SHAPES[size].config
    if size == "2b" and device == "cpu":
        config.vision_config.depth = CPU_DEPTH
    config.text_config.num_hidden_layers = config.text_config.vocab_size = 1  # not used
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        backbone: Any = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")
    use_fast_vision(backbone)
    return backbone.visual


def run(visual: Any, way: str, patches: Tensor, grids: Tensor) -> Tensor:
    """The vectors, backward included."""
    visual.config._attn_implementation, visual.patch_embed.proj.__class__ = WAYS[way]
    vectors: Tensor = visual(patches, grid_thw=grids).pooler_output
    vectors.square().mean().backward()
    visual.zero_grad()
    return vectors.detach()


def times(size: str, options: argparse.Namespace) -> list[str]:
    """Rows of the table. Raises `AssertionError` where vectors differ."""
    visual = tower(size, options.device)
    grids = torch.tensor([[1, GRID, GRID]] * options.images, device=options.device)
    width = 3 * synthetic.LAYOUT.temporal_patch_frames * synthetic.LAYOUT.patch_px**2
    patches = torch.randn(options.images * GRID**2, width, device=options.device)
    found = {way: run(visual, way, patches, grids).float() for way in WAYS}
    scale = float(found["transformers"].abs().max())
    apart = max(float((vectors - found["transformers"]).abs().max()) for vectors in found.values()) / scale
    assert apart < (1e-5 if options.device == "cpu" else 0.1), apart  # bf16 has 8 bits
    runs: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(options.turns):
        for way in WAYS:
            runs[way].append(seconds_of(partial(run, visual, way, patches, grids), options.device))
            say(f"{size}, turn {turn + 1}, {way}: {runs[way][-1]:.3g} s")
    rows = []
    for way, own in runs.items():
        ratios = [some / base for some, base in zip(own, runs["transformers"], strict=True)]
        rows.append(f"| {size} | {len(visual.blocks)} | {way} | {spread(ratios, '.2f')} | {spread(own, '.3g')} |")
    return rows


def report(options: argparse.Namespace) -> str:
    """Measures all, in Markdown."""
    return "\n".join(
        [
            "# Vision towers",
            "",
            f"{describe_machine(options.device)}. Median of {options.turns} turns (smallest to largest).",
            f"`python -m tests.benchmarks.vision {' '.join(sys.argv[1:])}`; `vision.py` tells how it is measured.",
            "",
            f"{options.images} images of {GRID**2} patches. {options.note}".strip(),
            "",
            "| tower | blocks | way | time, of transformers | s |",
            "|---|---:|---|---:|---:|",
            *(row for size in ("tiny", "2b") for row in times(size, options)),
            "",
        ]
    )


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(%(default)s)")
    parser.add_argument("--images", type=int, default=16, help="in a batch (%(default)s)")
    parser.add_argument("--turns", type=int, default=7, help="(%(default)s)")
    parser.add_argument("--note", default="", help="a sentence for the report, such as what else ran")
    parser.add_argument("--write", action="store_true", help="keep the report beside this file")
    return parser.parse_args(words)


if __name__ == "__main__":
    chosen = arguments()
    show(report(chosen), __file__, write=chosen.write, on_gpu=chosen.device == "cuda")
