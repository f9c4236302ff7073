"""The objective: temperatures, directions and terms put together. `Objective` is the module that training calls.

For a query q with positive k+ and negatives k_i, s the cosine (RzenEmbed, arXiv 2510.27350v1, section 3):

    L = -log  exp(s(q,k+)/tau) / ( exp(s(q,k+)/tau) + sum_{i kept} w_i exp(s(q,k_i)/tau) ),   w_i = exp(alpha s(q,k_i))

Shapes: B own queries, N pairs of all ranks, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipelines.errors import UserError
from rzen.config import ObjectiveConfig
from rzen.objective.batch import Batch, queries_of
from rzen.objective.graded import graded_loss, is_graded
from rzen.objective.pools import Direction, Pool
from rzen.objective.quantized import FIRST_STEP, fake_binary, fake_int8
from rzen.objective.similarity import Cosine, Similarity
from rzen.objective.statistics import batch_means
from rzen.objective.terms import Rounding, Term, terms_of
from rzen.objective.tiles import View, Work, tiled_loss
from rzen.vectors import Vectors, width

T = TypeVar("T")


class Objective(nn.Module):
    """Loss of one rank's queries against the targets of all ranks. Its mean over ranks is the loss of the whole batch.

    The temperatures are one vector `theta_T`, in the sorted order of `tasks`. Every step gives it a gradient, zero for
    the tasks that the batch lacks, so that data parallelism never meets an unused parameter. They start at `first`, and
    at `config.temperature.initial` for tasks that it lacks.

    The forward pass computes in fp32. Where `theta_T` is rounded, its values are those of `exact_theta_T`. Whoever
    steps an optimizer with fp32 copies writes them there.

    A theta outside its bounds counts as the bound, while its gradient passes unchanged (straight-through). That is
    linear, so averaging over ranks stays exact, and a theta at the bound can return.

    Whoever steps the optimizer projects theta back after each step, so that it cannot run away. `clamp_` does it.
    DeepSpeed keeps a master copy, so there a step hook of the inner optimizer clamps its temperature group to `bounds`.

    Gradients equal a double loop in fp64 (tests/parity/test_loss.py), across ranks (tests/parity/test_gather.py).
    """

    exact_theta_T: Tensor  # noqa: N815  a shape, as in `theta_T`
    log_step: nn.Parameter | None
    """Logarithm of the step of int8, `[1]`, which is learned. None where none is."""

    def __init__(
        self,
        config: ObjectiveConfig,
        tasks: Sequence[str],
        similarity: Similarity | None = None,
        *,
        first: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if not tasks:
            raise UserError("tasks", "none given", "name the task of every source")
        temperature = config.temperature
        self.config = config
        self.similarity = similarity or Cosine()
        self.tasks = tuple(sorted(set(tasks)))
        config.check_tasks(self.tasks)
        self.configs = {task: config.of_task(task) for task in self.tasks}
        self.terms = {task: terms_of(some) for task, some in self.configs.items()}
        self.bounds = (math.log(temperature.minimum), math.log(temperature.maximum))
        taus = [(first or {}).get(task, temperature.initial) for task in self.tasks]
        theta_T = torch.tensor([math.log(tau) for tau in taus])
        self.theta_T = nn.Parameter(theta_T, requires_grad=temperature.learnable)
        # A buffer, because DeepSpeed rounds parameters to bf16, and no buffers.
        self.register_buffer("exact_theta_T", theta_T.clone(), persistent=False)
        self.log_step = None
        if config.quantized and "int8" in config.quantized.types:
            self.log_step = nn.Parameter(torch.tensor([math.log(FIRST_STEP)]))

    @property
    def needs_queries(self) -> bool:
        """Whether a batch must bring the queries of all ranks. A graded batch always must."""
        return any(term.needs_queries for terms in self.terms.values() for term in terms)

    def shares_mined(self, task: str) -> bool:
        """Return whether a batch of this task must bring the mined negatives of all ranks, or those of its queries."""
        return self._of(task, self.configs).mined.shared

    def widths(self, full: int) -> tuple[int, ...]:
        """Return the widths at which vectors are scored, the full one last. Raises `UserError` for wider ones."""
        below = tuple(dims for term in self.terms[self.tasks[0]] for dims in term.widths)
        if (widest := max(below, default=0)) >= full:
            problem = f"{widest} is not below {full}, the width of the model's vectors"
            raise UserError("objective.matryoshka", problem, f"name widths from 1 to {full - 1}")
        return (*below, full)

    def views(self, full: int) -> list[View]:
        """Return how vectors are scored: at each width, rounded in each way and not. The full one is last."""
        widths, terms = self.widths(full), self.terms[self.tasks[0]]
        rounded = [(self._rounding(name), term.rounded_weight) for term in terms for name in term.roundings]
        return [
            View(dims, rounding, weight / len(widths))
            for dims in widths
            for rounding, weight in (*rounded, (None, 1.0))
        ]

    def _rounding(self, name: Rounding) -> Callable[[Vectors], Vectors]:
        if name == "binary":
            return fake_binary
        assert self.log_step is not None
        # In fp32: a model in bf16 has its parameters in bf16.
        step = self.log_step[0].to(torch.promote_types(self.log_step.dtype, torch.float32)).exp()
        return partial(fake_int8, step=step)

    def temperature(self, tasks: str | Sequence[str]) -> Tensor:
        """Return tau = exp(theta) within its bounds, with gradient: 0-dim for one task, `[B]` for one task a row.

        Raises `UserError` for unknown tasks.
        """
        named = {tasks} if isinstance(tasks, str) else set(tasks)
        theta_T = self._theta()
        for task in sorted(named):
            self._of(task, self.configs)
        if len(named) == 1:
            theta = theta_T[self.tasks.index(named.pop())]
        else:
            theta = theta_T[torch.tensor([self.tasks.index(task) for task in tasks], device=theta_T.device)]
        return torch.exp(theta + (theta.clamp(*self.bounds) - theta).detach())

    def temperatures(self) -> dict[str, float]:
        """Return task -> tau, as the forward pass uses it."""
        return {task: float(self.temperature(task).detach()) for task in self.tasks}

    def _theta(self) -> Tensor:
        """Return theta in fp32 or wider, with the gradient of `theta_T`."""
        if not self.theta_T.requires_grad:
            return self.exact_theta_T
        if self.theta_T.dtype not in (torch.bfloat16, torch.float16):
            return self.theta_T
        rounded_T = self.theta_T.float()
        return rounded_T + (self.exact_theta_T.float() - rounded_T).detach()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Project `theta_T` onto its bounds, in place."""
        self.theta_T.clamp_(*self.bounds)
        self.exact_theta_T.clamp_(*self.bounds)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss over the own queries (0-dim, fp32 or wider) and detached 0-dim statistics.

        `step` counts the steps done, for rules with a warm-up. A batch with `relevance` gets the loss of the graded
        pairs of all ranks, equal on each of them. Raises `UserError` where some pairs have a relevance and some none.
        """
        tau = self.temperature(batch.tasks)
        sharpest = tau.detach()
        # The 0.95 threshold and the softmax need fp32, whatever the model computes in.
        with torch.autocast(batch.queries.device.type, enabled=False):
            batch = batch.widened()
            if is_graded(batch):
                widths = self.widths(width(batch.targets))
                loss, stats = graded_loss(batch, self.similarity, widths, tau, self.config.tile_rows)
            else:
                loss, stats = self._contrast(batch, step, tau)
                if hardness := self.configs[self._task_of(batch.tasks)].hardness:
                    sharpest = sharpest / (1 + hardness.alpha * sharpest)
        taus = {"temperature": tau.detach().mean(), "effective_temperature": sharpest.mean()}
        return loss, {"loss": loss.detach(), **taus, **stats}

    def _of(self, task: str, settings: Mapping[str, T]) -> T:
        """Return the settings of a task. Raises `UserError` for an unknown one."""
        if task not in settings:
            raise UserError(f"task {task!r}", "has no temperature", f"known tasks: {', '.join(self.tasks)}")
        return settings[task]

    def _task_of(self, tasks: str | Sequence[str]) -> str:
        """Return a task that stands for all of them. Raises `UserError` where they have different objectives."""
        named = [tasks] if isinstance(tasks, str) else sorted(set(tasks))
        for task in named[1:]:
            if self.configs[task] != self.configs[named[0]]:
                problem = (
                    f"tasks {named[0]!r} and {task!r} are contrasted with each other, and differ in their objective"
                )
                raise UserError("objective.tasks", problem, "give both the same settings, or batches of their own")
        return named[0]

    def _contrast(self, batch: Batch, step: int, tau: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of both directions, and the statistics of queries against targets."""
        task = self._task_of(batch.tasks)
        config, terms = self.configs[task], self.terms[task]
        hardness, identity = config.hardness, batch.identity
        related = identity.query_to_targets
        targets = batch.targets
        pools = [Pool(batch.queries, targets, targets, related, hardness, only_positives=not config.in_batch)]
        for term in terms:
            pools += term.pools(batch)
        forward = Direction(pools, batch, step, self.similarity)
        loss, sums = self._tiled(forward, terms, tau)
        share = sum(term.reverse_share for term in terms)
        if share:
            related = identity.target_to_queries
            among_queries = Pool(batch.positives, queries_of(batch), batch.targets, related, hardness)
            reverse = Direction([among_queries], batch, step, self.similarity, is_reverse=True)
            reverse_loss, _ = self._tiled(reverse, terms, tau)
            loss = (1 - share) * loss + share * reverse_loss
        return loss, batch_means(sums, forward.num_rows)

    def _tiled(self, direction: Direction, terms: Sequence[Term], tau: Tensor) -> tuple[Tensor, Tensor]:
        views = self.views(width(direction.pools[0].rows))
        return tiled_loss(Work(direction, terms, views, self.config.tile_rows), tau)
