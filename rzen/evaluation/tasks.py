"""The evaluation tasks as a table: what is asked, what is searched, and how it is scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rzen.evaluation.ranking import hit_at_k, mrr, ndcg_at_k
from rzen.evaluation.vectors import IntArray

Form = Literal["text", "image", "page", "video", "image+text", "class"]
Metric = Literal["hit@1", "hit@5", "hit@10", "ndcg@5", "mrr"]

METRICS: dict[Metric, Callable[[IntArray], float]] = {
    "hit@1": lambda ranks: hit_at_k(ranks, 1),
    "hit@5": lambda ranks: hit_at_k(ranks, 5),
    "hit@10": lambda ranks: hit_at_k(ranks, 10),
    "ndcg@5": lambda ranks: ndcg_at_k(ranks, 5),
    "mrr": mrr,
}
"""Each takes ranks of relevant targets (`rzen.evaluation.ranking`) and gives a score in [0, 1]."""


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
