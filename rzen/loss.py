"""The objective of the recipe: InfoNCE with hardness weights, false-negative elimination and a temperature per task.

For a query q with positive k+ and negatives k_i, s the cosine (RzenEmbed, arXiv 2510.27350v1, section 3):

    L = -log  exp(s(q,k+)/tau) / ( exp(s(q,k+)/tau) + sum_{i kept} w_i exp(s(q,k_i)/tau) ),   w_i = exp(alpha s(q,k_i))

computed in log space, where a weight is an addition to the logit; the literal form overflows fp32 at tau = 0.01.

Shapes: B own queries, N targets of all ranks, M mined negatives, C = N + M columns, T tasks, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipelines.errors import UserError
from rzen.config import FalseNegativeConfig, ObjectiveConfig


class Objective(nn.Module):
    """Loss of one rank's queries against the targets of all ranks; its mean over ranks is the loss of the whole batch.

    The temperatures are one vector `theta_T`, in the sorted order of `tasks`: every step gives it a gradient, zero for
    the other tasks, so that no parameter is ever unused, which data parallelism would have to be told.

    A theta outside its bounds counts as the bound, while its gradient passes unchanged (straight-through): that is
    linear, so averaging over ranks stays exact, and a theta at the bound can always return. Lest it runs away out
    there, whoever steps the optimizer projects it back after each step: `clamp_`, or, where the optimizer keeps a
    master copy (DeepSpeed), a step hook of the inner optimizer that clamps its temperature group to `bounds`.

    Gradients equal a double loop in fp64 (tests/parity/test_loss.py), across ranks (tests/parity/test_gather.py).
    """

    def __init__(self, config: ObjectiveConfig, tasks: Sequence[str]) -> None:
        super().__init__()
        if not tasks:
            raise UserError("tasks", "none given", "name the task of every source")
        temperature = config.temperature
        self.config = config
        self.tasks = tuple(sorted(set(tasks)))
        self.bounds = (math.log(temperature.minimum), math.log(temperature.maximum))
        theta_T = torch.full((len(self.tasks),), math.log(temperature.initial))
        self.theta_T = nn.Parameter(theta_T, requires_grad=temperature.learnable)

    def temperature(self, task: str) -> Tensor:
        """tau = exp(theta) of a task within its bounds: 0-dim, with gradient. Raises `UserError` for unknown tasks."""
        if task not in self.tasks:
            raise UserError(f"task {task!r}", "has no temperature", f"known tasks: {', '.join(self.tasks)}")
        theta = self.theta_T[self.tasks.index(task)]
        if theta.dtype in (torch.bfloat16, torch.float16):
            theta = theta.float()
        return torch.exp(theta + (theta.clamp(*self.bounds) - theta).detach())

    @torch.no_grad()
    def clamp_(self) -> None:
        """Project `theta_T` onto its bounds, in place."""
        self.theta_T.clamp_(*self.bounds)

    def forward(
        self,
        queries_BD: Tensor,
        targets_ND: Tensor,
        task: str,
        *,
        positive_offset: int,
        step: int,
        negatives_MD: Tensor | None = None,
        target_ids_N: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the own queries (0-dim, fp32 or wider) and detached 0-dim statistics.

        All embeddings are L2-normalised. `targets_ND` are gathered with gradient (`rzen.gather`); the positive of query
        b is row `positive_offset + b`. `negatives_MD` are mined, gathered alike, and negatives of every query.
        Targets whose id equals the positive's are copies of it and never negatives, at any `step`.
        """
        num_queries, num_targets = len(queries_BD), len(targets_ND)
        assert 0 <= positive_offset <= num_targets - num_queries, "positives lie outside the targets"
        positive_B = positive_offset + torch.arange(num_queries, device=queries_BD.device)
        columns_CD = targets_ND if negatives_MD is None else torch.cat([targets_ND, negatives_MD])
        # The 0.95 threshold and the softmax need fp32, whatever the model computes in.
        with torch.autocast(queries_BD.device.type, enabled=False):
            queries_BD, columns_CD = _widen(queries_BD), _widen(columns_CD)
            scores_BC = queries_BD @ columns_CD.T
            with torch.no_grad():
                copies_BC = copies_of_positive(positive_B, len(columns_CD), target_ids_N)
                dropped_BC = copies_BC | self._false_negatives(columns_CD, positive_B, copies_BC, step)
            temperature = self.temperature(task)
            is_positive_BC = nn.functional.one_hot(positive_B, len(columns_CD)).bool()
            hardness_BC = (self.config.hardness_alpha * scores_BC.detach()).masked_fill(is_positive_BC, 0.0)
            logits_BC = (scores_BC / temperature + hardness_BC).masked_fill(dropped_BC, -torch.inf)
            loss = nn.functional.cross_entropy(logits_BC, positive_B)
        stats = _statistics(scores_BC.detach(), is_positive_BC, dropped_BC)
        return loss, {"loss": loss.detach(), "temperature": temperature.detach(), **stats}

    def _false_negatives(self, columns_CD: Tensor, positive_B: Tensor, copies_BC: Tensor, step: int) -> Tensor:
        rule = self.config.false_negatives
        if rule is None or step < rule.warmup_steps:
            return torch.zeros_like(copies_BC)
        likeness_BC = columns_CD[positive_B] @ columns_CD.T
        return false_negatives(likeness_BC, positive_B, copies_BC, rule)


def copies_of_positive(positive_B: Tensor, num_columns: int, target_ids_N: Tensor | None) -> Tensor:
    """Mark, bool `[B, C]`, the other targets with the id of the query's positive. Mined negatives carry no ids."""
    copies_BC = torch.zeros(len(positive_B), num_columns, dtype=torch.bool, device=positive_B.device)
    if target_ids_N is not None:
        copies_BC[:, : len(target_ids_N)] = target_ids_N[positive_B, None] == target_ids_N[None, :]
        copies_BC.scatter_(1, positive_B[:, None], False)
    return copies_BC


def false_negatives(likeness_BC: Tensor, positive_B: Tensor, copies_BC: Tensor, rule: FalseNegativeConfig) -> Tensor:
    """Mark, bool `[B, C]`, the negatives that look like the positive (paper, section 3), within the cap of `rule`.

    `likeness_BC` is the cosine of each column with the query's positive, fp32. The cap becomes a second threshold per
    row: the most similar negative that has to stay. Copies fill the cap first. Ties at the cap stay.
    """
    num_columns = likeness_BC.shape[1]
    most_dropped = int(rule.max_dropped_fraction * (num_columns - 1))
    likeness_BC = likeness_BC.masked_fill(copies_BC, torch.inf).scatter(1, positive_B[:, None], -torch.inf)
    cutoff_B1 = likeness_BC.kthvalue(num_columns - most_dropped, dim=1, keepdim=True).values
    return likeness_BC > cutoff_B1.clamp(min=rule.threshold)


def _statistics(scores_BC: Tensor, is_positive_BC: Tensor, dropped_BC: Tensor) -> dict[str, Tensor]:
    """Means over the batch; a query is right when its positive beats every kept negative, ties count against it."""
    num_negatives = max(scores_BC.numel() - len(scores_BC), 1)
    positive_B = scores_BC[is_positive_BC]
    hardest_B = scores_BC.masked_fill(is_positive_BC | dropped_BC, -torch.inf).amax(dim=1)
    return {
        "dropped_fraction": dropped_BC.sum() / num_negatives,
        "positive_similarity": positive_B.mean(),
        "negative_similarity": scores_BC.masked_fill(is_positive_BC, 0.0).sum() / num_negatives,
        "accuracy": (positive_B > hardest_B).float().mean(),
    }


def _widen(embeddings: Tensor) -> Tensor:
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
