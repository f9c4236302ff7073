"""Settings that choose negatives among candidates. Every rule says what it removes in the report."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipelines.config import Config, NonNegativeInt, PositiveInt

Cosine = Annotated[float, Field(ge=-1, le=1)]


class PositiveRules(Config):
    """Which samples training keeps. Some positive of the query must meet both rules at once."""

    max_rank: PositiveInt | None = None
    """Rank of a positive, at most: 1 and the number of candidates that score above it."""
    min_score: Cosine | None = None
    """A positive must score at least this (Qwen3-VL-Embedding's refinement of positives)."""


class NegativeRules(Config):
    """Which candidates are likely to be right answers, and so are no negatives. All rules apply."""

    max_score: Cosine | None = None
    """A candidate scores at most this (U-MARVEL: 0.7). It belongs to one model's scale."""
    margin: Annotated[float, Field(ge=0, lt=1)] | None = 0.05
    """A candidate scores at most p - margin x |p|. Here, p is the lowest score of the query's positives. This is the
    95% rule of NV-Retriever, in a form that also holds for negative scores."""
    max_above_mean: float | None = None
    """A candidate scores less than the mean of the query's positives plus this (Qwen3-VL-Embedding)."""
    judge_margin: float | None = None
    """A candidate's judge score is below that of the lowest positive minus this (UniME-V2: 0.01). Needs a table with
    judge scores."""
    max_owner_likeness: Cosine | None = None
    """The candidate's own query has at most this cosine with the query (SaHa). Needs `owners: true` in `mine`."""


class TeacherConfig(Config):
    """Teacher's score of each chosen candidate and of the positive: recall x cosine + judge x judge score.

    `objective.distillation` learns it. A sum of 1 keeps the scale.
    """

    recall: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the cosine by which the candidate was mined (U-MARVEL)."""
    judge: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the judge score (U-MARVEL: half of 1, and less for tasks that its re-ranker makes worse)."""


class SelectionConfig(Config):
    """How negatives are chosen among the candidates of each sample."""

    positives: PositiveRules = PositiveRules()
    """Samples that training keeps."""
    negatives: NegativeRules = NegativeRules()
    """Candidates that are left out as likely right answers."""
    first_rank: PositiveInt = 1
    """Candidates of lower rank are left out. Ranks count from 1, before any rule."""
    last_rank: PositiveInt | None = None
    """Candidates of higher rank are left out. `null` takes all."""
    modality: Literal["any", "same", "mm_embed"] = "any"
    """`same` takes candidates of the positive's modality. `mm_embed` takes those of another modality that score above
    the positive, and those of its modality from rank `low_rank` on, in turns."""
    low_rank: PositiveInt = 45
    """First rank of candidates of the right modality with `modality: mm_embed`."""
    choice: Literal["top", "random", "spread"] = "top"
    """`top` takes the best that are left, `random` any by a hash of seed, source, sample and candidate, `spread` takes
    evenly from best to worst."""
    negatives_per_sample: PositiveInt = 5
    """At most this many negatives of each sample."""
    min_negatives: NonNegativeInt = 0
    """Samples with fewer negatives are left out of training."""
    seed: NonNegativeInt = 0
    """Seed of `choice: random`."""
    teacher: TeacherConfig | None = None
    """Mix of both scores that becomes the teacher's. Needs a table with judge scores. `null` keeps the judge scores."""

    @model_validator(mode="after")
    def _leaves_something(self) -> SelectionConfig:
        if self.last_rank is not None and self.last_rank < self.first_rank:
            raise ValueError(f"last_rank={self.last_rank} is below first_rank={self.first_rank}: no candidate is left")
        if self.min_negatives > self.negatives_per_sample:
            rule = f"negatives_per_sample={self.negatives_per_sample}"
            raise ValueError(f"min_negatives={self.min_negatives} is above {rule}: no sample is kept")
        return self
