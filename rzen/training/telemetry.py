"""The metrics of training, with names and units: one row per step, equal on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rzen.config import AnyObjectiveConfig, ObjectiveConfig
from rzen.training.batch import FeedBatchProtocol

Row = dict[str, float | int | str]


@dataclass(frozen=True)
class Metric:
    """One metric, as dashboards and READMEs show it."""

    description: str
    unit: str = ""


_EMBEDDER_METRICS = {
    "temperature": Metric("tau of the step's task"),
    "effective_temperature": Metric(
        "temperature of the softmax among negatives, with the weights: 1 / (1/tau + alpha)"
    ),
    "dropped_fraction": Metric("negatives dropped as duplicates, false negatives or by the margin", "fraction"),
    "duplicate_fraction": Metric("negatives dropped because ids show that they are right answers", "fraction"),
    "effective_fraction": Metric("kept negatives that weigh in, by their hardness weights (Kish)", "fraction"),
    "positive_similarity": Metric("mean cosine of query and positive"),
    "negative_similarity": Metric("mean cosine of query and negatives, dropped ones included"),
    "no_teacher_fraction": Metric("pairs for which `data.teacher_vectors` lacks the query or the target", "fraction"),
    "margin": Metric("mean lead of the positive's cosine over the hardest kept negative"),
}
_RERANKER_METRICS = {
    "positive_probability": Metric("mean probability of yes of the positives"),
    "negative_probability": Metric("mean probability of yes of the negatives"),
}
_STEP_METRICS = {
    "loss": Metric("value of the objective, mean over ranks; not comparable across its options"),
    "accuracy": Metric("queries whose positive beats every kept negative; of graded pairs, those in order", "fraction"),
    "grad_norm": Metric("norm of the averaged gradient, before clipping"),
    "lr": Metric("learning rate, temperatures apart"),
    "skipped": Metric("1 if the step was skipped, because its loss or gradient was not finite"),
    "feed_wait_s": Metric("time spent waiting for the batch, mean over ranks", "s"),
    "feed_wait_fraction": Metric("share of the step that was spent waiting for the batch", "fraction"),
    "step_s": Metric("the whole step, waiting included, mean over ranks", "s"),
    "samples_per_s": Metric("samples of all ranks per second", "1/s"),
    "tokens": Metric("tokens of all inputs and ranks, visual tokens included, padding not"),
    "tokens_per_s": Metric("tokens per second", "1/s"),
    "padding_fraction": Metric("padding among the tokens that were computed, mean over ranks", "fraction"),
    "cached_fraction": Metric("media whose pixels came from `feed.cache`, mean over ranks", "fraction"),
    "bad_samples": Metric("samples of the step, over all ranks, that could not be decoded and were replaced"),
    "bad_candidates": Metric("candidates of a table, over all ranks, that could not be decoded and were left out"),
}
METRICS = _STEP_METRICS | _EMBEDDER_METRICS | _RERANKER_METRICS
"""All metrics of rows. A row also has its `step`, `source` and `task`. Names of several blocks are joined by `+`."""


def metrics_of(objective: AnyObjectiveConfig) -> dict[str, Metric]:
    """Return the metrics that the rows of a run with this objective have."""
    return _STEP_METRICS | (_EMBEDDER_METRICS if isinstance(objective, ObjectiveConfig) else _RERANKER_METRICS)


RUN_METRICS = {
    "progress": Metric("share of the steps that are done", "fraction"),
    "checkpoint_time_s": Metric("when the newest checkpoint was in place, or the worker began: Unix time", "s"),
}
"""Metrics of a run that are not those of a step, for monitoring only."""

HELD_OUT = "held_out"
HELD_OUT_METRIC = Metric("hit@1 of a search among held-out samples of one source", "fraction")
"""The score of `rzen.training.held_out`, by source."""

REJECTED = "rejected"
"""Name of the counter of samples that could not be decoded and were replaced, by source and reason."""


def step_row(
    fed: FeedBatchProtocol,
    stats: Mapping[str, Tensor],
    *,
    skipped: bool,
    grad_norm: float,
    lr: float,
    feed_wait_s: float,
    step_s: float,
    device: torch.device,
) -> Row:
    """Return the row of a step. `stats` are the learner's, 0-dim. A collective: one all-reduce of a few numbers."""
    measured: dict[str, float | Tensor] = {
        **stats,
        "feed_wait_s": feed_wait_s,
        "step_s": step_s,
        "cached_fraction": fed.cached_fraction,
        "bad_samples": float(len(fed.rejected)),
        "bad_candidates": float(len(fed.rejected_candidates)),
    }
    means = _mean_over_ranks(measured, device)
    world_size, step_s = dist.get_world_size(), means["step_s"]
    tokens = round(world_size * means["tokens"])
    return {
        "step": fed.step,
        "source": "+".join(block.source for block in fed.blocks),
        "task": "+".join(block.task for block in fed.blocks),
        **means,
        "grad_norm": grad_norm,
        "lr": lr,
        "skipped": float(skipped),
        "feed_wait_fraction": means["feed_wait_s"] / step_s,
        "samples_per_s": world_size * len(fed.batch) / step_s,
        "tokens": tokens,
        "tokens_per_s": tokens / step_s,
        "bad_samples": round(world_size * means["bad_samples"]),
        "bad_candidates": round(world_size * means["bad_candidates"]),
    }


def _mean_over_ranks(values: Mapping[str, float | Tensor], device: torch.device) -> dict[str, float]:
    """Return the means. Every rank must pass the same names in the same order."""
    means = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values.values()])
    dist.all_reduce(means)
    return dict(zip(values, (means / dist.get_world_size()).tolist(), strict=True))
