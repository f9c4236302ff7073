"""The evaluation tasks as a table: what is asked, what is searched, and how it is scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rzen.evaluation.metrics import Relevant, metrics_by_query
from rzen.evaluation.vectors import IntArray

Form = Literal["text", "image", "page", "video", "image+text", "class"]
Metric = Literal["hit@1", "hit@5", "hit@10", "ndcg@5", "mrr"]


def _at(family: str, k: int) -> Callable[[IntArray], float]:
    def value(rank_Q: IntArray) -> float:
        queries = np.arange(len(rank_Q))
        one_each = Relevant(queries, np.zeros_like(queries), np.ones(len(queries)), len(queries))
        return float(metrics_by_query(one_each, rank_Q, (k,))[f"{family}@{k}"].mean())

    return value


METRICS: dict[Metric, Callable[[IntArray], float]] = {
    "hit@1": _at("hit", 1),
    "hit@5": _at("hit", 5),
    "hit@10": _at("hit", 10),
    "ndcg@5": _at("ndcg_linear", 5),
    "mrr": lambda rank_Q: float((1.0 / rank_Q).mean()),
}
"""Each takes the rank of the one relevant target of each query, from 1, `[Q]`, and gives a score in [0, 1]."""
DATASET_METRICS: dict[Metric, str] = {"ndcg@5": "ndcg_linear@5", "mrr": "mrr@10"}
"""The metric of `rzen.evaluation.metrics` that stands for one of another name."""


@dataclass(frozen=True, slots=True)
class Task:
    """One retrieval task. The first metric is the one that is compared: hit@1, or nDCG@5 for documents (MMEB-V2)."""

    name: str
    title: str
    query: Form
    target: Form
    metrics: tuple[Metric, ...]
    pool: Literal["task", "source"] = "task"
    """Whose targets are the candidates of a query: those of all sources of the task, or of its own source (the names
    of its classes)."""

    @property
    def modality(self) -> Literal["image", "video", "visdoc", "mixed"]:
        """Modality of the targets, as the tables of benchmarks name it."""
        return _MODALITIES[self.target]


_MODALITIES: dict[Form, Literal["image", "video", "visdoc", "mixed"]] = {
    "text": "mixed",
    "image": "image",
    "page": "visdoc",
    "video": "video",
    "image+text": "image",
    "class": "image",
}
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("text_image", "Text → image", "text", "image", ("hit@1", "ndcg@5")),
        Task("text_page", "Text → page", "text", "page", ("ndcg@5", "hit@1")),
        Task("text_video", "Text → video", "text", "video", ("hit@1", "ndcg@5")),
        Task("image_text_image", "Image + text → image", "image+text", "image", ("hit@1", "ndcg@5")),
        Task("image_class", "Image → class", "image", "class", ("hit@1",), pool="source"),
    )
}


def chance(metric: Metric, num_candidates: int) -> float:
    """What random ranking expects with one relevant target: the mean score over all its possible ranks."""
    return METRICS[metric](np.arange(1, num_candidates + 1))
