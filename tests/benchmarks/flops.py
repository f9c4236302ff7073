"""How many operations a step takes, by formula from the layers of a Qwen2-VL with adapters.

A linear layer of n inputs and m outputs takes 2nm for each row forward, 2nm for the gradient of its input, and 2nm more
for that of its weights where they are trained: adapters. Attention over L tokens of width D takes 4LLD forward (scores,
and the sum they weigh), half of it where it is causal, and twice that backward. A vision tower attends within frames.
Norms, activations, rotations, embeddings, loss and optimizer are left out: less than a hundredth.

tests/benchmarks/test_benchmarks.py compares with what torch counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from rzen.inputs.processor import EncodedBatch


@dataclass(frozen=True)
class Operations:
    """Forward once, of that in the blocks, which gradient checkpointing repeats, and backward alone."""

    forward: float
    blocks: float
    backward: float

    def step(self, *, cached: bool = False, checkpointing: bool = False) -> float:
        """Of a step. By itself what a step needs; with gradient caching and checkpointing what is repeated too."""
        return (1 + cached) * self.forward + checkpointing * self.blocks + self.backward


def needed(backbone: Any, inputs: EncodedBatch, *, causal: bool = True) -> Operations:
    """For these inputs, without padding."""
    return _count(backbone, inputs, inputs.lengths, causal)


def computed(
    backbone: Any, inputs: EncodedBatch, chunks: Sequence[npt.NDArray[np.int64]], *, packed: bool, causal: bool = True
) -> Operations:
    """For these inputs in chunks, each padded to its longest input unless `packed`."""
    lengths = inputs.lengths.copy()
    for chunk in chunks:
        lengths[chunk] = lengths[chunk] if packed else lengths[chunk].max()
    return _count(backbone, inputs, lengths, causal)


def _count(backbone: Any, inputs: EncodedBatch, lengths: npt.NDArray[np.int32], causal: bool) -> Operations:
    text, vision = backbone.config.text_config, backbone.config.vision_config
    num_patches = int(inputs.grids.prod(axis=1).sum())
    forward = blocks = backward = 0.0
    for name, layer in backbone.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv3d):
            continue
        rows = int(lengths.sum())
        if "visual" in name:
            rows = num_patches // vision.spatial_merge_size**2 if "merger" in name else num_patches
        once = 2.0 * rows * layer.weight.numel()
        forward += once
        blocks += once if "layers." in name or "blocks." in name else 0.0
        # Nothing asks for the gradient of pixels. That of the first layers' inputs PEFT asks for with checkpointing.
        backward += once * (layer.weight.requires_grad + ("patch_embed" not in name))
    squares = float(np.square(lengths, dtype=np.float64).sum()) / (2 if causal else 1)
    attention = 4 * squares * text.hidden_size * text.num_hidden_layers
    frames = inputs.grids[:, 0] * (inputs.grids[:, 1] * inputs.grids[:, 2]).astype(np.float64) ** 2
    attention += 4 * float(frames.sum()) * vision.embed_dim * vision.depth
    return Operations(forward + attention, blocks + attention, backward + 2 * attention)
