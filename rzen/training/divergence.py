"""The error for training that has diverged: which samples to look at when step after step is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from pipelines.errors import UserError
from rzen.training.batch import FeedBatchProtocol
from rzen.training.learner import Learner
from rzen.training.telemetry import Row

_NAMED = 5


def divergence_error(learner: Learner, fed: FeedBatchProtocol, row: Row, num_skipped: int) -> UserError:
    """Return the error that ends a run whose last `num_skipped` steps were skipped. `fed`, `row`: of the last one.

    The weights are those before these steps. So reading each sample again, one by one, shows which of them have no
    finite vector or score. A collective.
    """
    learner.eval()
    with torch.no_grad():
        not_finite = learner.not_finite(fed.batch)
    keys, broken = _all_ranks(fed.batch.keys), _all_ranks(not_finite)
    made = learner.makes
    if len(broken) == len(keys):
        found = f"no sample has a finite {made}: the weights have diverged"
    elif broken:
        found = f"{_listed(broken)} have no finite {made}"
    else:
        found = f"the {made}s of its samples are finite ({_listed(keys)})"
    problem = f"loss is {row['loss']}, grad_norm {row['grad_norm']}, the last of {num_skipped} skipped steps; {found}"
    place = f"step {row['step']}, source {row['source']}, task {row['task']}"
    return UserError(place, problem, "look at these samples, lower optim.lr or raise optim.warmup_fraction, and resume")


def _all_ranks(keys: Sequence[str]) -> list[str]:
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(keys))
    return [key for some in gathered for key in some]


def _listed(keys: Sequence[str]) -> str:
    rest = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + rest
