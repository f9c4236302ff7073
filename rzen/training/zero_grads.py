"""A gradient for every trained parameter, also for those that a batch does not use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def with_zero_grads_for_unused(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return the loss unchanged, with a gradient for each of the parameters: zero where the loss does not depend on it.

    Where the loss is not finite, no gradient is finite. All ranks then skip the step.

    Without it, a batch of text leaves the vision tower without gradient. Ranks that differ in that fill their
    communication buckets differently. They wait for each other indefinitely, or reduce the wrong numbers.
    """
    reached: Tensor = _Reach.apply(loss, *parameters)  # type: ignore[no-untyped-call]
    return reached


class _Reach(torch.autograd.Function):
    """Identity in the first input. The zeros are expanded scalars: they take no memory."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.zeros = [(parameter.new_zeros(()), parameter.shape) for parameter in parameters]
        ctx.save_for_backward(torch.where(loss.isfinite(), 1.0, torch.nan))
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (one,) = ctx.saved_tensors
        return gradients[0] * one, *((zero * one).expand(shape) for zero, shape in ctx.zeros)
