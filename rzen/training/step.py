"""The forward pass of a training step: embed both sides, contrast them across ranks, leave no parameter out.

Shapes: B own pairs, N pairs of all ranks, D width of the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rzen.embedder import Embedder
from rzen.gather import gather_ids, gather_with_gradient
from rzen.loss import Objective
from rzen.training.batch import EncodedPairs


class Learner(nn.Module):
    """Embedder and objective as one module, as data parallelism wants it.

    With gradients averaged over ranks, W ranks of B pairs equal one process with W * B pairs, parameters and
    temperatures alike (tests/parity/test_training_step.py).
    """

    def __init__(self, embedder: Embedder, objective: Objective) -> None:
        super().__init__()
        self.embedder = embedder
        self.objective = objective

    def forward(
        self, pairs: EncodedPairs, blocks: Sequence[tuple[str, int]], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of the own queries, 0-dim fp32, and the objective's detached statistics.

        `blocks` are (task, own pairs) in the order of the pairs; each is contrasted with itself alone, across ranks.
        A collective: every rank must bring the same blocks. Queries and targets go through the backbone one after the
        other: they differ in length more than among themselves, and padding costs more than a second call.
        """
        queries_BD = self.embedder(pairs.queries)
        targets_BD = self.embedder(pairs.targets)
        ids_B = torch.tensor(pairs.target_ids, device=targets_BD.device)
        rank = dist.get_rank() if dist.is_initialized() else 0
        targets_WBD = gather_with_gradient(targets_BD).view(-1, *targets_BD.shape)
        ids_WB = gather_ids(ids_B).view(-1, len(pairs))
        sizes = [size for _, size in blocks]
        losses: list[Tensor] = []
        stats: list[dict[str, Tensor]] = []
        parts = (torch.split(queries_BD, sizes), torch.split(targets_WBD, sizes, 1), torch.split(ids_WB, sizes, 1))
        for (task, size), own_BD, block_WBD, block_ids_WB in zip(blocks, *parts, strict=True):
            loss, block_stats = self.objective(
                own_BD,
                block_WBD.flatten(0, 1),
                task,
                positive_offset=rank * size,
                step=step,
                target_ids_N=block_ids_WB.flatten(),
            )
            losses.append(loss)
            stats.append(block_stats)
        shares = torch.tensor(sizes, device=ids_B.device) / len(pairs)
        means = {name: _mean([some[name] for some in stats], shares) for name in stats[0]}
        return reach_all(_mean(losses, shares), self), means


def _mean(values: Sequence[Tensor], shares: Tensor) -> Tensor:
    return values[0] if len(values) == 1 else (torch.stack(list(values)) * shares).sum()


def reach_all(loss: Tensor, module: nn.Module) -> Tensor:
    """The loss unchanged, with a gradient for every trained parameter: zero where the loss does not depend on it.

    Without it, a batch of text leaves the vision tower without gradient. Ranks whose batches differ in that would fill
    their communication buckets differently, and wait for each other for ever or reduce the wrong numbers.
    """
    reached: Tensor = _Reach.apply(loss, *(p for p in module.parameters() if p.requires_grad))  # type: ignore[no-untyped-call]
    return reached


class _Reach(torch.autograd.Function):
    """Identity in the first input. The zeros are expanded scalars: they take no memory."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.zeros = [(parameter.new_zeros(()), parameter.shape) for parameter in parameters]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *(zero.expand(shape) for zero, shape in ctx.zeros)
