"""Kind `evaluate`: a job that scores models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from jobs.embedding.specs import Workers, gpus_of_actors
from jobs.judging.specs import ModelJudge
from jobs.spec.job import JobConfig, Named
from jobs.spec.kinds import Kind
from jobs.spec.model import ModelRef
from jobs.spec.no_effect import NoEffect
from pipelines.config import Config, DataConfig, MediaConfig, NonNegativeInt, PositiveInt
from rzen.config import ModelCard, ModelIdentity, PromptConfig, ReadoutConfig
from rzen.evaluation.tasks import Metric


class RerankConfig(Config):
    """A re-ranker that orders the first candidates of each query again."""

    model: ModelJudge
    """Re-ranker, or any checkpoint of a supported family with its language-model head."""
    top_k: PositiveInt = 100
    """First candidates of each query that are scored. The others keep their rank."""
    weights: Named[Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Task or dataset -> w of the fused score cos + w z, with z the log-odds of the re-ranker. U-MARVEL gives other
    tasks other weights, because re-ranking makes some of them worse."""
    tune: DataConfig | None = None
    """Split on which w is chosen for each task of `data` that `weights` does not name, by the metric that counts. It
    must be data that neither model was trained on, and not `data` itself. It is decoded as `data` is, or else by
    `media`. `null`: only `weights` are used."""
    tune_tasks: dict[str, str] = Field(default_factory=dict)
    """Dataset of the suites or of `custom` -> task of `tune` whose w it takes. Choose on training data that were held
    out, and never on the datasets themselves."""
    tune_queries: PositiveInt = 500
    """Queries of each task of `tune` that w is chosen on, at most."""
    instructions: bool = True
    """Whether the re-ranker reads the instruction of a query."""


class EvaluateSpec(Workers, ModelIdentity, JobConfig):
    """Score models on a held-out split, on public benchmarks and on custom retrieval datasets."""

    kind: Literal["evaluate"]
    """Must be `evaluate`."""
    models: Annotated[Named[ModelRef], Field(min_length=1)]
    """Name in the tables -> model."""
    baseline: str | None = None
    """Model that the others are compared with, query by query. `null` takes the first."""
    data: DataConfig | None = None
    """Split of a dataset. Each of its tasks is scored: all targets of the task (or of the source, for classes) are the
    candidates of a query."""
    tasks: list[str] | None = None
    """Tasks of `data` to score. `null` scores all that the split has samples of. A task of a name that is not in
    `rzen/evaluation/tasks.py` is scored, too: all its targets are the candidates, and its metrics are hit@1, ndcg@5."""
    metrics: list[Metric] | None = None
    """Metrics of `data`. `null` takes those of each task: hit@1, and nDCG@5 for pages, as MMEB-V2."""
    suites: dict[Literal["MMEB-V2", "M-BEIR", "M-BEIR global"], str] = Field(default_factory=dict)
    """Benchmark -> its local folder, the same on all nodes. Datasets that are there are scored; `rzen evaluate --list`
    prints what is missing."""
    custom: Named[str] = Field(default_factory=dict)
    """Name -> retrieval dataset of your own: a folder with queries.jsonl, corpus.jsonl and qrels, or a file of lists
    (`pipelines/benchmarks/custom.py`)."""
    datasets: Annotated[list[str], Field(min_length=1)] | None = None
    """Datasets of the suites to score. `null` scores all. The others are scored as 0 in the official mean."""
    rerank: RerankConfig | None = None
    """Re-ranker for the first candidates of each query. The job then reports scores before and after re-ranking, the
    best that is possible with these candidates, and how well the probabilities of the re-ranker are calibrated."""
    prompt: PromptConfig = PromptConfig()
    """Prompt of models that do not name theirs in `rzen.json`."""
    readout: ReadoutConfig = ReadoutConfig()
    """Readout of models that do not name theirs in `rzen.json`."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type. Use float32 on CPUs."""
    media: MediaConfig = MediaConfig()
    """Decoding for suites and custom datasets (`data` has its own). The official frames of a video are 8."""
    instruction_sensitivity: bool = False
    """Whether to ask every query without its instruction as well, and report what the instruction changes."""
    num_examples: NonNegativeInt = 2
    """Wrong answers of each dataset and model that the report shows."""
    submission: Named[ModelCard] = Field(default_factory=dict)
    """Model -> what its entry on the MMEB-V2 leaderboard says about it. The job writes the file for these models."""
    cache: str = "runs/vector-cache"
    """Directory or s3:// URL of the vectors, by content, weights and settings. What is there is not embedded again.
    Nothing is ever deleted from it."""
    scratch: str | None = None
    """Local folder of the job's own process for the vectors of one dataset: 4 bytes x width x candidates,
    memory-mapped. `null` uses the system's folder for temporary files."""
    endpoint: str | None = None
    """S3 endpoint of models and cache. `null` uses the environment's AWS_ENDPOINT_URL."""
    out: str
    """Local folder: results.json and results.md of `data`, index.html, and per suite and model files and tables."""

    @model_validator(mode="after")
    def _something_known(self) -> EvaluateSpec:
        if self.data is None and not self.suites and not self.custom:
            raise ValueError("data, suites and custom are all empty: there is nothing to score")
        if self.baseline is not None and self.baseline not in self.models:
            raise ValueError(f"baseline names {self.baseline!r}, which is none of {', '.join(self.models)}")
        if unknown := sorted(set(self.submission) - set(self.models)):
            raise ValueError(f"submission names {unknown[0]!r}, which is none of {', '.join(self.models)}")
        if self.rerank and self.rerank.tune_tasks and self.rerank.tune is None:
            raise ValueError("rerank.tune_tasks names tasks of rerank.tune, which is not set")
        tune = self.rerank.tune if self.rerank else None
        if tune and self.data and (tune.root.rstrip("/"), tune.split) == (self.data.root.rstrip("/"), self.data.split):
            raise ValueError(
                f"rerank.tune is the split that is scored ({tune.root} {tune.split}): a weight that is chosen on the"
                " test makes its score too good; name other held-out data"
            )
        return self


def _tunes(spec: EvaluateSpec) -> bool:
    return spec.rerank is not None and spec.rerank.tune is not None


def _has_data(spec: EvaluateSpec) -> bool:
    return spec.data is not None


_HOW_FAST = {*Workers.model_fields, "submit"}
_WHERE = {"models", "out", "cache", "scratch"}
_ONLY_SHOWN = {"baseline", "num_examples", "instruction_sensitivity", "submission"}
EVALUATE = Kind(
    name="evaluate",
    spec=EvaluateSpec,
    run="jobs.evaluation.evaluate:run",
    reads={
        "models": "checkpoints and adapters",
        "rerank.model": "re-ranker",
        "rerank.tune": "split that weights are chosen on",
        "data": "held-out split of a dataset",
        "suites": "public benchmarks",
        "custom": "custom datasets",
    },
    makes={"out": "scores, leaderboard files, HTML report", "cache": "vectors"},
    inputs=lambda spec: {
        "data": "dataset",
        "rerank.tune": "dataset",
        "models": "embedder",
        "rerank.model": "checkpoint",
    },
    gpus=gpus_of_actors,
    no_effect=(
        NoEffect("datasets", lambda spec: not spec.suites, "suites is empty"),
        NoEffect("submission", lambda spec: "MMEB-V2" not in spec.suites, "suites does not name MMEB-V2"),
        NoEffect("media", lambda spec: not (spec.suites or spec.custom), "suites and custom are empty"),
        NoEffect("tasks", lambda spec: spec.data is None, "data is not set"),
        NoEffect("metrics", lambda spec: spec.data is None, "data is not set"),
        NoEffect("data.mixture", _has_data, "every sample of the split is scored"),
        NoEffect("data.negatives_per_sample", _has_data, "mined negatives are not scored"),
        NoEffect("data.max_bad_fraction", _has_data, "a bad sample is an error"),
        NoEffect("data.instructions", _has_data, "`instructions` of each model decides"),
        NoEffect(
            "rerank.tune",
            lambda spec: spec.data is None and not (spec.rerank and spec.rerank.tune_tasks),
            "data is not set, and tune_tasks gives no dataset of a suite a task",
        ),
        NoEffect("rerank.tune_queries", lambda spec: not _tunes(spec), "rerank.tune is not set"),
        NoEffect("rerank.tune.media", _tunes, "`data.media` decides, or `media` without `data`"),
        NoEffect("rerank.tune_tasks", lambda spec: not (spec.suites or spec.custom), "suites and custom are empty"),
        NoEffect("rerank.tune.mixture", _tunes, "queries of the split are scored"),
        NoEffect("rerank.tune.negatives_per_sample", _tunes, "mined negatives are not scored"),
        NoEffect("rerank.tune.max_bad_fraction", _tunes, "a bad sample is an error"),
        NoEffect("rerank.tune.instructions", _tunes, "`instructions` of each model decides"),
    ),
    not_science=frozenset(_HOW_FAST | _WHERE | _ONLY_SHOWN),
)
