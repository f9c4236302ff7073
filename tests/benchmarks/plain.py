"""The peer: what one writes with transformers and PEFT alone. Padded batches, in-batch InfoNCE, no gradient caching."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils.rnn import pad_sequence

from rzen.inputs.processor import EncodedBatch
from rzen.model.embedding_model import frames_of_patches
from tests.benchmarks.synthetic import LAYOUT

TAU = 0.02


def use_plain_vision(model: Any, attention: str) -> None:
    """Take `use_fast_vision` back, in place."""
    model.visual.config._attn_implementation = attention
    model.visual.patch_embed.proj.__class__ = nn.Conv3d


def library_inputs(inputs: EncodedBatch, config: Any) -> dict[str, Tensor]:
    """Return what transformers' processor gives for these inputs, on the CPU."""
    ids = [torch.tensor(input.input_ids, dtype=torch.int64) for input in inputs.split()]
    padded_BL = pad_sequence(ids, batch_first=True)
    kinds = {1: config.image_token_id, 2: config.video_token_id}
    found = {
        "input_ids": padded_BL,
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "mm_token_type_ids": sum(kind * (padded_BL == pad) for kind, pad in kinds.items()),
    }
    mean, std = (torch.tensor(values)[:, None] for values in (LAYOUT.image_mean, LAYOUT.image_std))
    frames = torch.tensor(inputs.patches).unflatten(1, (3, -1))
    pixels = frames[torch.tensor(frames_of_patches(inputs, LAYOUT.temporal_patch_frames))].transpose(1, 2).flatten(2)
    pixels = pixels.float().div_(255).sub_(mean).div_(std).flatten(1)
    grids, visual_kinds = torch.tensor(inputs.grids, dtype=torch.int64), torch.tensor(inputs.grid_kinds)
    patch_kinds = visual_kinds.repeat_interleave(grids.prod(1))
    for kind, name, grid in ((1, "pixel_values", "image_grid_thw"), (2, "pixel_values_videos", "video_grid_thw")):
        if kind in inputs.grid_kinds:
            found |= {name: pixels[patch_kinds == kind], grid: grids[visual_kinds == kind]}
    return found


def vectors(model: Any, given: dict[str, Tensor]) -> Tensor:
    """Unit vectors [B, D] of the last tokens."""
    device = next(model.parameters()).device
    given = {name: value.to(device) for name, value in given.items()}
    hidden = model(**given, use_cache=False).last_hidden_state
    last_B = given["attention_mask"].sum(1) - 1
    return normalize(hidden[torch.arange(len(last_B), device=device), last_B].float(), dim=-1)


def loss(model: Any, queries: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """InfoNCE of a batch."""
    logits_BB = vectors(model, queries) @ vectors(model, targets).T / TAU
    return cross_entropy(logits_BB, torch.arange(len(logits_BB), device=logits_BB.device))
