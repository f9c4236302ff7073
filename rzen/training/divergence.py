"""The error for training that has diverged: which samples to look at when step after step is not finite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from pipelines.errors import UserError
from rzen.inputs.pairs import EncodedPairs
from rzen.inputs.processor import EncodedBatch
from rzen.training.batch import FeedBatchProtocol
from rzen.training.step import Learner
from rzen.training.telemetry import Row

_NAMED = 5


def divergence_error(learner: Learner, fed: FeedBatchProtocol, row: Row, num_skipped: int) -> UserError:
    """Return the error that ends a run whose last `num_skipped` steps were skipped. `fed`, `row`: of the last one.

    The weights are those before these steps. So embedding each sample again, one by one, shows which of them have no
    finite vector. A collective.
    """
    keys, broken = _all_ranks(fed.batch.keys), _all_ranks(_broken(learner, fed.batch))
    if len(broken) == len(keys):
        found = "no sample has a finite vector: the weights have diverged"
    elif broken:
        found = f"{_listed(broken)} have no finite vector"
    else:
        found = f"the vectors of its samples are finite ({_listed(keys)})"
    problem = f"loss is {row['loss']}, grad_norm {row['grad_norm']}, the last of {num_skipped} skipped steps; {found}"
    place = f"step {row['step']}, source {row['source']}, task {row['task']}"
    return UserError(place, problem, "look at these samples, lower optim.lr or raise optim.warmup_fraction, and resume")


def _broken(learner: Learner, pairs: EncodedPairs) -> list[str]:
    """Return the keys of the pairs that have a vector which is not finite. Each pair is embedded by itself."""
    learner.eval()
    broken = []
    with torch.no_grad():
        for key, inputs in zip(pairs.keys, _inputs(pairs), strict=True):
            # Blanks are embedded too, because ZeRO stage 3 needs them, and then left out.
            vectors = learner.embedder(EncodedBatch.concat([*inputs, *learner.blanks]))[: len(inputs)]
            if not vectors.isfinite().all():
                broken.append(key)
    return broken


def _inputs(pairs: EncodedPairs) -> Iterator[list[EncodedBatch]]:
    """Yield query, target and mined negatives of each pair."""
    start = 0
    for index, count in enumerate(pairs.negative_counts.tolist()):
        inputs = [role.slice(index, index + 1) for role in (pairs.queries, pairs.targets)]
        if pairs.negatives is not None:
            inputs.append(pairs.negatives.slice(start, start + count))
        start += count
        yield inputs


def _all_ranks(keys: Sequence[str]) -> list[str]:
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(keys))
    return [key for some in gathered for key in some]


def _listed(keys: Sequence[str]) -> str:
    rest = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + rest
