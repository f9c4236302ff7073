"""Collect the rows of all ranks. The gradient of every rank's loss flows back to the rank that owns the row.

Each rank scores its own queries against all targets, and data parallelism averages gradients over ranks. The backward
pass sums over ranks. So the average is exactly the gradient of one process on the concatenated batch, for vectors and
temperatures (tests/parity/test_gather.py). A gradient that is cut here is invisible in the loss curve.

Without a process group all functions return their input. Any number of dimensions may follow that of the rows.
Shapes: W ranks, B rows of a rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_with_gradient(x_BD: Tensor) -> Tensor:
    """Return the rows of all ranks in rank order, `[W*B, D]`.

    The gradient of a row is the sum of what all ranks send it, in the type of `x_BD`: pass fp32. A collective, forward
    and backward: every rank must call both. Raises `ValueError` on all ranks where B differs.
    """
    if not _distributed():
        return x_BD
    _check_equal_rows(x_BD)
    gathered: Tensor = _Gather.apply(x_BD)  # type: ignore[no-untyped-call]
    return gathered


def gather_ids(ids_B: Tensor) -> Tensor:
    """Return ids, or other numbers without gradient, of all ranks in rank order, `[W*B]`.

    A collective. Raises `ValueError` where B differs.
    """
    if not _distributed():
        return ids_B
    _check_equal_rows(ids_B)
    return _gather(ids_B)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor) -> Tensor:
        ctx.num_rows = len(x_BD)
        return _gather(x_BD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # All-reduce and slice, not reduce-scatter: the same call on gloo and NCCL, for a few MiB.
        gradient_ND = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient_ND)
        return gradient_ND.narrow(0, dist.get_rank() * ctx.num_rows, ctx.num_rows)


def _gather(x: Tensor) -> Tensor:
    rows = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, x.contiguous())
    return torch.cat(rows)


def _check_equal_rows(x: Tensor) -> None:
    rows_W = _gather(torch.tensor([len(x)], device=x.device)).tolist()
    if len(set(rows_W)) > 1:
        raise ValueError(f"ranks must hold equally many rows, found {rows_W} on ranks 0 to {len(rows_W) - 1}")


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
