"""What transformers' vision towers compute, in fewer and better kernels. Weights and configuration stay as they are.

Attention: without flash attention, the towers call attention once for every image (frame, window), one after the other.
With an implementation whose name contains `flash` they call it once for all patches, and say where each image begins.
`grouped_sdpa` is registered under such a name. It hands adjacent images of one size to torch as one batch.

Patches: the first layer is a convolution whose kernel is as large as its input. That is a product of matrices. Kernels
for convolutions take longer, which matters in small towers (tests/benchmarks/vision.md).
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, PreTrainedModel

from pipelines.errors import UserError
from rzen.families import family_of, part_of

NAME = "flash_free_grouped_sdpa"
_RUNS: Any = WeakTensorKeyDictionary()


def use_fast_vision(backbone: PreTrainedModel) -> None:
    """Give the vision tower of a backbone both, in place; the attention only where it has torch's.

    Raises `UserError` for a family whose tower is built differently.
    """
    visual, projection = part_of(backbone, "visual"), part_of(backbone, "visual.patch_embed.proj")
    if type(projection) is not nn.Conv3d or projection.kernel_size != projection.stride:
        problem = f"has a visual.patch_embed.proj of another kind: {projection}"
        raise UserError(f"backbone {family_of(backbone).title}", problem, "give the family a hook of its own")
    projection.__class__ = PatchProjection
    if visual.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, grouped_sdpa)
        visual.config._attn_implementation = NAME


class PatchProjection(nn.Conv3d):
    """A convolution over input of the size of its kernel: `[N, channels, time, height, width]` to `[N, D, 1, 1, 1]`."""

    def forward(self, input: Tensor) -> Tensor:
        """Raises `RuntimeError` (of the product) for input of another size."""
        return linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


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
    """Return attention within each run `[cu_seq_lens_q[i], cu_seq_lens_q[i + 1])` of `[1, heads, patches, width]`.

    The result is `[1, patches, heads, width]`, as transformers needs it. Only adjacent runs are batched: gathering the
    others costs more than it saves.
    """
    runs = _runs(cu_seq_lens_q)
    sizes = [length * count for length, count in runs]
    splits = (torch.split(states[0], sizes, dim=1) for states in (query, key, value))
    parts = []
    for (length, count), *states in zip(runs, *splits, strict=True):
        q, k, v = (state.unflatten(1, (count, length)).transpose(0, 1) for state in states)
        attended = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        parts.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None], None


def _runs(starts: Tensor) -> list[tuple[int, int]]:
    """Return adjacent runs of one length, as (length, number).

    A tower gives all its layers the same tensor, so that the program waits for the GPU once.
    """
    if starts not in _RUNS:
        _RUNS[starts] = [(length, len(list(run))) for length, run in groupby(starts.diff().tolist())]
    runs: list[tuple[int, int]] = _RUNS[starts]
    return runs
