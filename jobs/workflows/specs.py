"""Kinds `retrain` and `pipeline`: jobs that run other jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jobs.spec.job import FileChanges, JobConfig, Name, Named
from jobs.spec.kinds import Kind, gpus_of
from jobs.spec.no_effect import NoEffect
from pipelines.config import Config, PositiveFloat, PositiveInt
from rzen.config import MeanSoup


class GateConfig(Config):
    """What a new model must show on the frozen set to replace the champion. Scores are fractions, not percent."""

    min_gain: float = 0.0
    """The 95% interval of the mean gain over all tasks must be above this (paired bootstrap over queries)."""
    max_drop: Annotated[float, Field(ge=0)] = 0.01
    """Largest loss of any single task, and so of any modality. Our choice."""
    minimum: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    """Task -> lowest score of a model that is promoted. The first model must reach it, too."""
    min_queries: PositiveInt = 100
    """Least number of queries of each task. With fewer, no model is promoted, and no training starts. Our choice."""
    draws: PositiveInt = 10_000
    """Number of bootstrap draws."""


class RetrainSpec(JobConfig):
    """Train on data that are new since the champion, and promote the model if it is better."""

    kind: Literal["retrain"]
    """Must be `retrain`."""
    stage: str
    """Spec of kind `train`, relative to this file. The job sets its `name` and the weights that it starts from."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Changes to the stage."""
    start: Literal["champion", "afresh"] = "champion"
    """`champion` continues from the champion's weights, `afresh` starts as the stage says. The first model always
    starts as the stage says."""
    soup: MeanSoup | None = MeanSoup(rank="keep")
    """Mean of `champion` and `candidate`, which is scored instead of the trained model. `null` scores that itself. By
    default every champion has the rank and scale of the first. With `rank: null` the ranks add up at each promotion."""
    evaluate: FileChanges
    """Spec of kind `evaluate` on a dataset that never changes. Its `models` and `out` are ignored."""
    gate: GateConfig = GateConfig()
    """When the new model is promoted."""
    corpus: FileChanges | None = None
    """Spec of kind `embed`. A new model embeds the corpus before it is promoted. Servers that follow the registry
    (`rzen serve --registry`) load both at once. Its `model`, `out` and `endpoint` are ignored. `null`: no server can
    follow the registry."""
    min_new_samples: PositiveInt = 1
    """With fewer new samples, the job does nothing."""
    registry: str
    """Directory or s3:// URL of the model registry."""
    endpoint: str | None = None
    """S3 endpoint of the registry. `null` uses AWS_ENDPOINT_URL from the environment."""
    lease_s: PositiveFloat = 300.0
    """Seconds after a retraining run was killed until another may start."""

    @model_validator(mode="after")
    def _two_parents(self) -> RetrainSpec:
        if unknown := sorted(set((self.soup and self.soup.weights) or {}) - {"champion", "candidate"}):
            raise ValueError(f"soup.weights names {unknown[0]!r}; the parents are champion and candidate")
        return self


class PipelineSpec(JobConfig):
    """Run jobs one after the other, and repeat only those whose settings or inputs changed."""

    kind: Literal["pipeline"]
    """Must be `pipeline`."""
    name: Name
    """Name of the pipeline in messages."""
    vars: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    """Values for `${name}` in the jobs."""
    state: str
    """Directory or s3:// URL in which finished jobs are recorded."""
    endpoint: str | None = None
    """S3 endpoint of `state`. `null` uses AWS_ENDPOINT_URL from the environment."""
    jobs: Annotated[Named[FileChanges], Field(min_length=1)]
    """Name of a job -> its spec, in the order in which the jobs run."""


def _gpus_of_retrain(spec: RetrainSpec, named: Sequence[JobConfig]) -> float:
    return max(gpus_of(one) for one in named)


def _always(spec: RetrainSpec) -> bool:
    return True


RETRAIN = Kind(
    name="retrain",
    spec=RetrainSpec,
    run="jobs.workflows.retrain:run",
    reads={
        "stage": "spec of the training",
        "evaluate": "spec of the scores",
        "corpus": "spec of the corpus",
        "registry": "champion",
    },
    makes={"registry": "model with its lineage; a promotion if it is better, with its corpus"},
    named="jobs.workflows.retrain:named",
    gpus=_gpus_of_retrain,
    no_effect=(
        NoEffect("set.name", _always, "the job names its runs"),
        NoEffect("evaluate.set.models", _always, "the job sets it"),
        NoEffect("evaluate.set.out", _always, "the job sets it"),
        NoEffect("corpus.set.model", _always, "the job sets it"),
        NoEffect("corpus.set.out", _always, "the job sets it"),
    ),
)
PIPELINE = Kind(
    name="pipeline",
    spec=PipelineSpec,
    run="jobs.workflows.pipeline:run",
    reads={"jobs": "specs of the jobs"},
    makes={"state": "record of each finished job"},
    named="jobs.workflows.pipeline:named",
    local="the shipped ones start from a local folder; retraining has a manifest of its own",
)
