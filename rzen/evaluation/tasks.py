"""The evaluation tasks as a table: what is asked, what is searched, and how it is scored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from rzen.evaluation.metrics import Relevant, metrics_by_query
from rzen.evaluation.vectors import IntArray

Form = Literal["text", "image", "page", "video", "image+text", "class", "any"]
Metric = Literal["hit@1", "hit@5", "hit@10", "ndcg@5", "mrr"]


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
    "any": "mixed",
}
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("text_image", "Text → image", "text", "image", ("hit@1", "ndcg@5")),
        Task("text_page", "Text → page", "text", "page", ("ndcg@5", "hit@1")),
        Task("text_video", "Text → video", "text", "video", ("hit@1", "ndcg@5")),
        Task("image_text_image", "Image + text → image", "image+text", "image", ("hit@1", "ndcg@5")),
        Task("text_text", "Text → text", "text", "text", ("hit@1", "ndcg@5")),
        Task("image_class", "Image → class", "image", "class", ("hit@1",), pool="source"),
    )
}
"""The tasks of the recipe. Data may have others."""


def task_of(name: str) -> Task:
    """Return a task by its name. One that is not in `TASKS` is scored as retrieval of any input by any input."""
    return TASKS.get(name) or Task(name, name, "any", "any", ("hit@1", "ndcg@5"))


def score_queries(metric: Metric, relevant: Relevant, rank_P: IntArray) -> npt.NDArray[np.float64]:
    """Return the score of each query in [0, 1], `[Q]`, from the ranks of its relevant targets. Each has at least one.

    `mrr` is 1 / rank of the first one, however low.
    """
    if metric == "mrr":
        best_Q = np.full(relevant.num_queries, np.iinfo(np.int64).max)
        np.minimum.at(best_Q, relevant.query, rank_P)
        return 1.0 / best_Q
    name = DATASET_METRICS.get(metric, metric)
    return metrics_by_query(relevant, rank_P, (int(name.rpartition("@")[2]),))[name]


def chance(metric: Metric, num_candidates: int, num_relevant: int = 1) -> float:
    """Return what random ranking expects: the mean score over all orders of the candidates."""
    if metric.startswith("ndcg"):
        cutoff = int(metric.rpartition("@")[2])
        gains = [1 / math.log2(1 + rank) for rank in range(1, min(cutoff, num_candidates) + 1)]
        return num_relevant / num_candidates * math.fsum(gains) / math.fsum(gains[:num_relevant])
    last = num_candidates - num_relevant + 1 if metric == "mrr" else int(metric.rpartition("@")[2])
    first_is_here = num_relevant / num_candidates  # that the first relevant candidate has this rank
    shares = []
    for rank in range(1, min(last, num_candidates - num_relevant + 1) + 1):
        shares.append(first_is_here / rank if metric == "mrr" else first_is_here)
        left = num_candidates - rank
        first_is_here *= (left - num_relevant + 1) / left if left else 0.0
    return math.fsum(shares)
