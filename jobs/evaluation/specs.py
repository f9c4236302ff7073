"""Kinds `evaluate` and `benchmark`: jobs that score models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from jobs.spec.job import JobConfig, Named
from jobs.spec.kinds import Kind
from jobs.spec.model import ModelRef
from pipelines.config import DataConfig, MediaConfig, NonNegativeInt, PositiveFloat, PositiveInt
from rzen.config import ModelCard, ModelIdentity, PromptConfig, ReadoutConfig
from rzen.evaluation.tasks import TASKS, Metric


class EvaluateSpec(ModelIdentity, JobConfig):
    """Rank held-out targets for held-out queries, for several models."""

    kind: Literal["evaluate"]
    """Must be `evaluate`."""
    models: Annotated[Named[ModelRef], Field(min_length=1)]
    """Name in the table -> model. All of one evaluation share `prompt`, unless they bring their own."""
    data: DataConfig
    """What is asked and searched; every target of a task's source is a candidate."""
    prompt: PromptConfig = PromptConfig()
    """Prompt of models whose files do not record the one they were trained with (`rzen.json`)."""
    readout: ReadoutConfig = ReadoutConfig()
    """Readout of models whose files do not record how their vectors are made."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type. CPUs want float32."""
    tasks: list[str] | None = None
    """Tasks to score. `null`: all that the data have samples of."""
    metrics: list[Metric] | None = None
    """Metrics; each task's own where not given (hit@1, and nDCG@5 for pages, as MMEB-V2)."""
    batch_size: PositiveInt = 32
    """Samples embedded at once."""
    cpus_per_model: PositiveFloat = 1.0
    """Logical CPUs of one model's evaluation; models are evaluated side by side."""
    gpus_per_model: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of one model's evaluation."""
    autoscaling: bool = False
    """The cluster can grow: skip the check that it is large enough now."""
    out: str
    """Local JSON file to write, and next to it its table as Markdown."""

    @model_validator(mode="after")
    def _known_tasks(self) -> EvaluateSpec:
        if unknown := sorted(set(self.tasks or []) - set(TASKS)):
            raise ValueError(f"tasks names {unknown[0]!r}, which is not one of {', '.join(TASKS)}")
        return self


class BenchmarkSpec(ModelIdentity, JobConfig):
    """Score models on public benchmarks and on custom retrieval datasets."""

    kind: Literal["benchmark"]
    """Must be `benchmark`."""
    models: Annotated[Named[ModelRef], Field(min_length=1)]
    """Name in the tables -> model."""
    suites: dict[Literal["MMEB-V2", "M-BEIR", "M-BEIR global"], str] = Field(default_factory=dict)
    """Benchmark -> its local folder, the same on all nodes. `rzen evaluate --list` prints what is missing
    there. The job scores what is there."""
    custom: Named[str] = Field(default_factory=dict)
    """Name -> retrieval dataset of your own: a folder with queries.jsonl, corpus.jsonl and qrels, or a file of lists
    (`pipelines/benchmarks/custom.py`)."""
    datasets: Annotated[list[str], Field(min_length=1)] | None = None
    """Datasets of the suites to score; all where not given. The others count 0 in the official mean."""
    prompt: PromptConfig = PromptConfig()
    """Prompt of models whose files do not record the one they were trained with (`rzen.json`)."""
    readout: ReadoutConfig = ReadoutConfig()
    """Readout of models whose files do not record how their vectors are made."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type. CPUs want float32."""
    media: MediaConfig = MediaConfig()
    """Decoding. The official frames of a video are 8."""
    instruction_sensitivity: bool = False
    """Ask every query without its instruction, too, and report what the instruction changes."""
    num_examples: NonNegativeInt = 2
    """Wrong answers that the page shows of each dataset and model."""
    submission: Named[ModelCard] = Field(default_factory=dict)
    """Model -> what its entry on the leaderboard of MMEB-V2 says about it; its file is written for these."""
    cache: str = "runs/vectors"
    """Directory or s3:// URL where vectors are kept, by content, weights and settings: what is there is not embedded
    again. Nothing is ever deleted from it."""
    scratch: str | None = None
    """Local folder of the job's own process for the vectors of the dataset that is being scored: 4 bytes x width x
    candidates, memory-mapped. `null`: the system's folder for temporary files."""
    endpoint: str | None = None
    """S3 endpoint; the environment's AWS_ENDPOINT_URL where not given."""
    chunk_tokens: PositiveInt = 16_384
    """Tokens embedded at once, visual tokens and padding included."""
    actors: PositiveInt = 1
    """Copies of the model."""
    cpus_per_actor: PositiveFloat = 1.0
    """Logical CPUs of each."""
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of each."""
    cpus_per_task: PositiveFloat = 1.0
    """Logical CPUs of a task that decodes; as many run as the actors leave CPUs for."""
    autoscaling: bool = False
    """The cluster can grow: skip the check that it is large enough now."""
    out: str
    """Local folder: index.html, and of every model and suite the files, tables and settings."""

    @model_validator(mode="after")
    def _something_known(self) -> BenchmarkSpec:
        if not self.suites and not self.custom:
            raise ValueError("suites and custom are both empty: there is nothing to score")
        if unknown := sorted(set(self.submission) - set(self.models)):
            raise ValueError(f"submission names {unknown[0]!r}, which is none of {', '.join(self.models)}")
        return self


def _gpus(spec: EvaluateSpec, named: Sequence[JobConfig]) -> float:
    return len(spec.models) * spec.gpus_per_model


EVALUATE = Kind(
    name="evaluate",
    spec=EvaluateSpec,
    run="jobs.evaluation.evaluate:run",
    reads={"models": "checkpoints and adapters", "data": "held-out split of a dataset"},
    makes={"out": "scores as JSON, and a table as Markdown"},
    gpus=_gpus,
    not_science=frozenset({"models", "out", "cpus_per_model", "gpus_per_model", "autoscaling", "batch_size", "submit"}),
)
BENCHMARK = Kind(
    name="benchmark",
    spec=BenchmarkSpec,
    run="jobs.evaluation.benchmark:run",
    reads={"models": "checkpoints and adapters", "suites": "public benchmarks", "custom": "custom datasets"},
    makes={"out": "scores, leaderboard files, HTML report", "cache": "vectors"},
    local="reads its files at the same path on every node",
)
