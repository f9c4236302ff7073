"""Attention of the vision towers over images of equal size at once, with torch's own kernels.

Without flash attention, transformers' vision towers call attention once for every image (frame, window), one after the
other. With an implementation whose name contains `flash` they call it once for all patches, and say where each image
begins. `grouped_sdpa` is registered under such a name, and hands neighbours of one size to torch as one batch.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

NAME = "flash_free_grouped_sdpa"


def use_grouped_attention(backbone: PreTrainedModel) -> None:
    """Give the vision tower of a backbone this attention, in place. Its configuration is stored without."""
    AttentionInterface.register(NAME, grouped_sdpa)
    backbone.visual.config._attn_implementation = NAME


def grouped_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each stretch `[cu_seq_lens_q[i], cu_seq_lens_q[i + 1])` of `[1, heads, patches, width]`.

    Returns `[1, patches, heads, width]`, as transformers wants it. Only neighbours are put together: gathering the
    others costs more than it saves.
    """
    runs = [(length, len(list(run))) for length, run in groupby(cu_seq_lens_q.diff().tolist())]
    sizes = [length * count for length, count in runs]
    splits = (torch.split(states[0], sizes, dim=1) for states in (query, key, value))
    parts = []
    for (length, count), *states in zip(runs, *splits, strict=True):
        q, k, v = (state.unflatten(1, (count, length)).transpose(0, 1) for state in states)
        attended = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        parts.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None], None
