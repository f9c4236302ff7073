"""One strict, typed schema for every job that can be submitted, with the meaning of every field.

Imports neither torch nor Ray, so that a spec is checked in a second on any machine. `jobs/spec/load.py` reads the YAML.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import product
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from pipelines.config import (
    Config,
    DataConfig,
    FeedConfig,
    MediaConfig,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pipelines.shards.mapping import SourceMapping
from pipelines.synthetic.config import CorpusConfig
from rzen.config import (
    MeanSoup,
    ModelCard,
    ModelConfig,
    ModelIdentity,
    ObjectiveConfig,
    OptimConfig,
    PromptConfig,
    ReadoutConfig,
    SoupConfig,
)
from rzen.evaluation.tasks import TASKS, Metric

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=60)]
T = TypeVar("T")


def _without_none(entries: object) -> object:
    return {k: v for k, v in entries.items() if v is not None} if isinstance(entries, dict) else entries


Named = Annotated[dict[Name, T], BeforeValidator(_without_none)]
"""Name -> entry. `null` takes out an entry of the file that this one is based on."""


class ClusterConfig(Config):
    """What a training run asks of the cluster."""

    workers: PositiveInt = 1
    """Ray Train workers, one torch rank each (paper: 16 GPUs)."""
    cpus_per_worker: PositiveFloat = 1.0
    """Logical CPUs that a worker reserves. Together they must leave CPUs to the feed."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that a worker reserves; 0 trains on the CPU with gloo."""
    threads_per_worker: PositiveInt = 1
    """Threads of torch on the CPU, within a worker."""
    chunk_tokens: PositiveInt | None = None
    """Gradient caching: a worker embeds so many tokens at once, visual tokens and padding included, and embeds all but
    a lone chunk twice. Memory is then that of a chunk, whatever the batch; the numbers do not change. `null`: all sides
    at once."""
    autoscaling: bool = False
    """The cluster can grow: skip the check that it is large enough now, which otherwise saves from waiting for ever."""
    max_restarts: NonNegativeInt = 3
    """Restarts from the last checkpoint after a worker or node was lost."""


class CheckpointConfig(Config):
    """Checkpoints: trained parameters and optimizer moments. Batches and random numbers follow from the step."""

    every_steps: PositiveInt = 200
    """A lost run repeats at most this many steps."""
    keep: PositiveInt = 2
    """Older checkpoints are deleted."""
    keep_best: bool = True
    """Keep the checkpoint with the best mean accuracy in the batches since the one before it, too, and make a model of
    it in `best/` if it is not the last. Accuracy in training, not on held-out data."""


class TrackingConfig(Config):
    """Where the numbers of every step go, besides `metrics.jsonl` and Ray's own metrics."""

    tensorboard: bool = True
    """Event files in `{root}/{name}/tensorboard/`."""
    mlflow: str | None = None
    """Tracking URI of MLflow; credentials come from its environment variables, on the workers."""
    wandb: bool = False
    """Weights & Biases; key, entity and mode come from its environment variables, on the workers."""
    project: str = "rzen"
    """Experiment of MLflow, project of W&B."""


class RunConfig(Config):
    """Where a training run lives: `{root}/{name}/`."""

    root: str = "runs"
    """Directory or s3:// URL."""
    endpoint: str | None = None
    """S3 endpoint; the environment's AWS_ENDPOINT_URL where not given."""
    overwrite: bool = False
    """A run of this name with other settings is refused (`false`) or deleted and begun anew (`true`)."""
    log_every_steps: PositiveInt = 10
    """One line of progress every so many steps, where there is no terminal for a bar."""
    tracking: TrackingConfig = TrackingConfig()
    """Where else the numbers go."""


class ModelRef(Config):
    """A trained model: a checkpoint, and an adapter on it if it was tuned with LoRA."""

    base: str
    """Checkpoint directory (path or s3:// URL) or hub name."""
    adapter: str | None = None
    """Adapter directory (path or s3:// URL)."""
    instructions: bool = True
    """Evaluate with instructions. Models of stage 1 have never seen one."""


class FileChanges(Config):
    """A job that another spec names, such as a job of a pipeline."""

    spec: str
    """YAML file of the job, relative to this one."""
    set: dict[str, Any] = Field(default_factory=dict)
    """What is changed in it, as nested mappings."""


class SubmitConfig(Config):
    """How `rzen submit` hands the job to a cluster. Without effect where it runs by itself."""

    cpus: Annotated[float, Field(ge=0)] = 0.0
    """Logical CPUs that the job's own process reserves; with some, it may run on another node than the head."""
    memory_bytes: NonNegativeInt = 0
    """Memory that it reserves."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the job and its workers. No secrets: they would show in the dashboard."""
    retries: NonNegativeInt = 0
    """Times that a job is submitted again whose process was lost with its node. One that ended by itself is not: the
    same would happen again."""


class JobConfig(Config):
    """What all kinds have in common."""

    submit: SubmitConfig = SubmitConfig()
    """How it is submitted."""


class CorpusSpec(JobConfig):
    """Draw the synthetic corpus: real image, PDF and video files with captions."""

    kind: Literal["corpus"]
    """Draws a corpus."""
    out: str
    """Local folder; empty, new, or holding an earlier corpus."""
    corpus: CorpusConfig = CorpusConfig()
    """How much of what."""


class IngestSpec(JobConfig):
    """Turn a folder of files into shards, index and manifest."""

    kind: Literal["ingest"]
    """Ingests a folder."""
    input: str
    """Local folder of images, videos and PDFs with captions (README of pipelines/)."""
    out: str
    """Directory or s3:// URL of the data set."""
    endpoint: str | None = None
    """S3 endpoint; the environment's AWS_ENDPOINT_URL where not given."""
    held_out_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the samples that is kept for evaluation. Samples with one target stay together."""
    samples_per_shard: PositiveInt = 1000
    """Samples of a shard, at most."""
    seed: NonNegativeInt = 0
    """Of the split and the order. Equal seeds give equal bytes."""
    materialized: bool = False
    """Store the frames of videos (JPEG) and the images of pages (lossless WebP) as `media` chooses them, and not the
    files. Clips and dense pages are cheaper to read, but `frames`, `fps` and `page_pixels` are settled here."""
    media: MediaConfig = MediaConfig()
    """Limits within which files are opened."""


class IndexSource(SourceMapping):
    """Shards of one source, and how their members become samples."""

    urls: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    """Tars: local paths, file:// and s3:// URLs; `{000..099}` and `{a,b}` are spelt out, `*` and `?` match within a
    folder, and a folder stands for all .tar below it."""


class IndexSpec(JobConfig):
    """Make a data set of shards that others have written (webdataset, img2dataset), without copying them."""

    kind: Literal["index"]
    """Indexes."""
    sources: Annotated[Named[IndexSource], Field(min_length=1)]
    """Name of a source -> its shards and mapping."""
    out: str
    """Directory or s3:// URL of the data set: indices, report and manifest. The shards' own place is only read."""
    endpoint: str | None = None
    """S3 endpoint of the shards and of `out`; the environment's AWS_ENDPOINT_URL where not given."""
    split: Literal["train", "held_out"] = "train"
    """Split that the shards become."""
    decode: bool = False
    """Decode every file once, in a child process that is killed at a limit, and leave out what cannot be decoded.
    `rzen evaluate` refuses bad files, training replaces them: worth its time for `held_out`."""
    media: MediaConfig = MediaConfig()
    """Limits within which files are opened, where `decode` is on."""


class TrainSpec(JobConfig):
    """One stage of training: the plan's global batches, the objective, checkpoints, a model at the end."""

    kind: Literal["train"]
    """Trains."""
    name: Name
    """Of the run: folder below `run.root`, label of its metrics."""
    run: RunConfig = RunConfig()
    """Where it lives."""
    data: DataConfig
    """What it reads."""
    feed: FeedConfig = FeedConfig()
    """How data reach the workers."""
    model: ModelConfig
    """What is trained."""
    init_adapter: str | None = None
    """Adapter to go on from (directory or s3:// URL), such as that of stage 1. `null` starts a new one."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The loss."""
    optim: OptimConfig = OptimConfig()
    """The optimizer."""
    global_batch: Annotated[int, Field(ge=2)] = 768
    """Samples of one optimizer step over all workers; all are contrasted with all (paper: 768)."""
    steps: PositiveInt | None = None
    """Optimizer steps; `null` follows `epochs`."""
    epochs: PositiveFloat = 1.0
    """Passes over the data, where `steps` is not given (paper: 1)."""
    seed: NonNegativeInt = 0
    """Of the plan, new weights and dropout."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """How often the run can be resumed from."""
    cluster: ClusterConfig = ClusterConfig()
    """What it needs."""

    @model_validator(mode="after")
    def _possible(self) -> TrainSpec:
        if self.init_adapter is not None and self.model.tune != "lora":
            raise ValueError("init_adapter needs model.tune: lora")
        if self.model.quantize and self.optim.zero_stage == 3:
            raise ValueError(f"model.quantize={self.model.quantize} works with optim.zero_stage 1 and 2 alone")
        return self


class SoupsConfig(JobConfig):
    """Which soups are made of several models, and how they are scored."""

    soups: Annotated[Named[SoupConfig], Field(min_length=1)] = Field(default={"uniform": MeanSoup()})
    """Name of a soup -> how it is made."""
    evaluate: FileChanges | None = None
    """Spec of kind `evaluate` that scores every model and soup for the summary. Its own `models` and `out` do not
    count. `null`: no scores."""
    probe: FileChanges | None = None
    """The same on other data, by whose mean score greedy and searched soups choose; `evaluate` where not given, which
    flatters the scores of what was chosen, as the summary says."""
    base: str | None = None
    """Checkpoint that full models were trained from (directory, s3:// URL or hub name), for methods that merge what
    training changed (`ties`, `dare`). Adapters hold no more than that themselves."""
    out: str
    """Directory or s3:// URL: `{soup}/adapter` or `{soup}/model`, and summary.json, .md and .svg."""
    endpoint: str | None = None
    """S3 endpoint; the environment's AWS_ENDPOINT_URL where not given."""

    @model_validator(mode="after")
    def _choices_need_scores(self) -> SoupsConfig:
        for name, soup in self.soups.items():
            if soup.method in ("greedy", "searched") and not (self.evaluate or self.probe):
                raise ValueError(f"soups.{name}: method={soup.method} chooses by scores; set evaluate")
            if name in ("candidates", "models"):
                raise ValueError(f"soups.{name}: the job keeps scores in a folder of this name; give it another")
        return self

    def check_names(self, known: Collection[str]) -> None:
        """Raise `ValueError` for weights of something that is not among the models."""
        for name, soup in self.soups.items():
            if unknown := sorted(set(getattr(soup, "weights", None) or {}) - set(known)):
                raise ValueError(f"soups.{name}.weights names {unknown[0]!r}, which is none of {', '.join(known)}")


class FinetunesSpec(SoupsConfig):
    """Several fine-tunes side by side, then soups of what they made."""

    kind: Literal["finetunes"]
    """Fine-tunes and soups."""
    stage: str
    """Spec of kind `train` that every fine-tune starts from, relative to this file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """What all of them change in it."""
    runs: Named[dict[str, Any]] = Field(default_factory=dict)
    """Name of a fine-tune -> what it alone changes, usually `data.mixture.weights`."""
    grid: dict[str, Annotated[list[str | int | float | bool | None], Field(min_length=1)]] = Field(default_factory=dict)
    """Setting -> its values, such as `seed: [0, 1, 2]`: every one of `runs` with every combination. The values become
    part of the names: `balanced-seed-0`."""
    max_parallel: PositiveInt = 3
    """Fine-tunes that run at the same time, or as many as the cluster has room for; the others wait in their order. On
    a cluster that grows (`cluster.autoscaling`), what has been started and has no room yet is what it grows for."""
    min_survivors: PositiveInt | None = None
    """So many fine-tunes must end well. With fewer, the job fails as soon as that is certain; `null`: all of them. A
    fine-tune has failed for good after `cluster.max_restarts`."""
    retry_failed: bool = False
    """Try what failed for good again, in a job that ended well without it."""

    @model_validator(mode="after")
    def _possible(self) -> FinetunesSpec:
        names = list(self.changes())
        if not names:
            raise ValueError("runs and grid are both empty: there is nothing to train")
        if self.min_survivors is not None and self.min_survivors > len(names):
            raise ValueError(f"min_survivors={self.min_survivors} is more than the {len(names)} runs")
        self.check_names(names)
        return self

    def changes(self) -> dict[str, tuple[str | None, dict[str, Any]]]:
        """Name of a fine-tune -> the entry of `runs` it is made from, and its values of the grid by setting."""
        found: dict[str, tuple[str | None, dict[str, Any]]] = {}
        for run in self.runs or [None]:
            for values in product(*self.grid.values()):
                settings = dict(zip(self.grid, values, strict=True))
                parts = [f"{key.rpartition('.')[2]}-{value}" for key, value in settings.items()]
                name = re.sub(r"[^A-Za-z0-9_-]+", "_", "-".join([*([run] if run else []), *parts]))
                if name in found:
                    raise ValueError(f"two runs of the grid have the name {name!r}; give them names in `runs`")
                if name:
                    found[name] = (run, settings)
        return found


class SoupSpec(SoupsConfig):
    """Soups of models that are there already, the user's own or those of earlier jobs."""

    kind: Literal["soup"]
    """Soups."""
    models: Annotated[Named[ModelRef], Field(min_length=1)]
    """Name -> model: adapters of one base, or full models. A soup among them counts as all that it was made of, so that
    one more model can be stirred into it."""

    @model_validator(mode="after")
    def _of_one_kind(self) -> SoupSpec:
        if len({ref.adapter is None for ref in self.models.values()}) > 1:
            raise ValueError("models has adapters and full models; export the adapters first, or leave one kind out")
        self.check_names(list(self.models))
        return self


class GateConfig(Config):
    """What a new model must show on the frozen set to take the champion's place. Scores are shares, not percent."""

    min_gain: float = 0.0
    """The mean gain over all tasks must lie above this with its whole 95% interval (paired bootstrap over queries)."""
    max_drop: Annotated[float, Field(ge=0)] = 0.01
    """No task, and so no modality, may lose more than this. Our choice."""
    minimum: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    """Task -> score below which no model is promoted, the first one neither."""
    draws: PositiveInt = 10_000
    """Of the bootstrap."""


class RetrainSpec(JobConfig):
    """One run of a schedule: train on data that are new since the champion, and promote what is better."""

    kind: Literal["retrain"]
    """Retrains."""
    stage: str
    """Spec of kind `train`, relative to this file. Its `name` is the job's, and so is what it goes on from."""
    set: dict[str, Any] = Field(default_factory=dict)
    """What is changed in it."""
    start: Literal["champion", "afresh"] = "champion"
    """`champion` goes on from its weights, `afresh` starts as the stage says. The first model always does."""
    soup: MeanSoup | None = MeanSoup()
    """Mean of `champion` and `candidate`, which takes part in place of what was trained; `null`: that itself."""
    evaluate: FileChanges
    """Spec of kind `evaluate` on a set that never changes. Its own `models` and `out` do not count."""
    gate: GateConfig = GateConfig()
    """When the new model is promoted."""
    min_new_samples: PositiveInt = 1
    """With fewer new samples there is nothing to do."""
    registry: str
    """Directory or s3:// URL of the registry of models."""
    endpoint: str | None = None
    """S3 endpoint; the environment's AWS_ENDPOINT_URL where not given."""
    lease_s: PositiveFloat = 300.0
    """So long after the death of one retraining another may begin."""

    @model_validator(mode="after")
    def _two_parents(self) -> RetrainSpec:
        if unknown := sorted(set((self.soup and self.soup.weights) or {}) - {"champion", "candidate"}):
            raise ValueError(f"soup.weights names {unknown[0]!r}; the parents are champion and candidate")
        return self


class AblationSpec(JobConfig):
    """The same training with and without parts of the recipe, each with several seeds, and what the parts change."""

    kind: Literal["ablation"]
    """Ablates."""
    stage: str
    """Spec of kind `train` that every run starts from, relative to this file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """What all runs change in it."""
    variants: Annotated[Named[dict[str, Any]], Field(min_length=2)]
    """Name of a variant -> what only it changes. The job sets `name` and `seed`: runs are called {variant}-s{seed}."""
    baseline: Name = "baseline"
    """Variant that the others are compared with."""
    seeds: Annotated[int, Field(ge=2)] | Annotated[list[NonNegativeInt], Field(min_length=2)] = 10
    """Seeds of each variant, or how many, from 0 on. What is claimed from fewer than ten is mostly noise."""
    evaluate: FileChanges
    """Spec of kind `evaluate` that scores every run. Its own `models` and `out` do not count."""
    max_parallel: PositiveInt = 8
    """Runs at the same time, or as many as the cluster holds."""
    notes: list[str] = Field(default=[])
    """What a reader has to know of the setup: printed in the report."""
    out: str
    """Local folder of ablation.json, ablation.md and ablation.svg."""

    @model_validator(mode="after")
    def _comparable(self) -> AblationSpec:
        if self.baseline not in self.variants:
            raise ValueError(f"baseline={self.baseline!r} is not one of the variants: {', '.join(self.variants)}")
        if len(set(self.seed_list)) < len(self.seed_list):
            raise ValueError(f"seeds={self.seeds} names one twice")
        return self

    @property
    def seed_list(self) -> list[int]:
        """All seeds."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds


class EvaluateSpec(ModelIdentity, JobConfig):
    """Rank held-out targets for held-out queries, for several models."""

    kind: Literal["evaluate"]
    """Evaluates."""
    models: Annotated[Named[ModelRef], Field(min_length=1)]
    """Name in the table -> model. All of one evaluation share `prompt`, unless they bring their own."""
    data: DataConfig
    """What is asked and searched; every target of a task's source is a candidate."""
    prompt: PromptConfig = PromptConfig()
    """For models that do not say (`rzen.json`) with which prompt they were trained."""
    readout: ReadoutConfig = ReadoutConfig()
    """For models that do not say how their vectors are made."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type. CPUs want float32."""
    tasks: list[str] | None = None
    """Tasks to score; all of which the data have samples where not given."""
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
    """Local JSON file to write, and its table beside it as Markdown."""

    @model_validator(mode="after")
    def _known_tasks(self) -> EvaluateSpec:
        if unknown := sorted(set(self.tasks or []) - set(TASKS)):
            raise ValueError(f"tasks names {unknown[0]!r}, which is not one of {', '.join(TASKS)}")
        return self


class BenchmarkSpec(ModelIdentity, JobConfig):
    """Score models on public benchmarks and on retrieval data sets of your own."""

    kind: Literal["benchmark"]
    """Scores."""
    models: Annotated[Named[ModelRef], Field(min_length=1)]
    """Name in the tables -> model."""
    suites: dict[Literal["MMEB-V2", "M-BEIR", "M-BEIR global"], str] = Field(default_factory=dict)
    """Benchmark -> local folder that it lies in, the same on all nodes. `rzen evaluate --list` tells what is missing
    there; what is there is scored."""
    custom: Named[str] = Field(default_factory=dict)
    """Name -> retrieval data set of your own: a folder with queries.jsonl, corpus.jsonl and qrels, or a file of lists
    (`pipelines/benchmarks/custom.py`)."""
    datasets: Annotated[list[str], Field(min_length=1)] | None = None
    """Datasets of the suites to score; all where not given. The others count 0 in the official mean."""
    prompt: PromptConfig = PromptConfig()
    """For models that do not say (`rzen.json`) with which prompt they were trained."""
    readout: ReadoutConfig = ReadoutConfig()
    """For models that do not say how their vectors are made."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type. CPUs want float32."""
    media: MediaConfig = MediaConfig()
    """Decoding. The official frames of a video are 8."""
    instruction_sensitivity: bool = False
    """Ask every query without its instruction, too, and tell what the instruction changes."""
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


class ExportSpec(ModelIdentity, JobConfig):
    """Make a directory that other libraries load, of an adapter and its base."""

    kind: Literal["export"]
    """Exports."""
    model: ModelRef
    """What is exported."""
    prompt: PromptConfig = PromptConfig()
    """For a model that does not say with which prompt it was trained."""
    readout: ReadoutConfig = ReadoutConfig()
    """For a model that does not say how its vectors are made."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the stored weights; the sum is taken in fp32 and rounded once. An adapter keeps its own."""
    format: Literal["model", "adapter", "rzen_release"] = "model"
    """`model`: base and adapter as one, for AutoModel, sentence-transformers, vLLM and mteb. `adapter`: for PEFT.
    `rzen_release`: as one, for the script released with RzenEmbed, which reads Qwen2-VL with the prompt `rzen_release`
    and positions `1d` alone."""
    frames: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    """Frames of a video in libraries that fix how many, and by them the size of a frame. `null`: `data.media.frames` of
    the training, where its settings lie beside the weights, or 8."""
    instructions: Named[str] = Field(default_factory=dict)
    """Name -> instruction, for `encode(..., prompt_name=...)` of sentence-transformers."""
    scores: str | None = None
    """Local results.json of an evaluation of this very base and adapter, for the card."""
    license: str | None = None
    """Identifier for the card, such as apache-2.0, where it is known."""
    out: str
    """Directory or s3:// URL. An earlier export there is replaced."""
    endpoint: str | None = None
    """S3 endpoint; the environment's AWS_ENDPOINT_URL where not given."""


class EmbedSpec(JobConfig):
    """Embed the targets of a data set: the corpus that `rzen search` searches."""

    kind: Literal["embed"]
    """Embeds."""
    model: str
    """Exported model (directory or s3:// URL)."""
    data: DataConfig
    """`data.split` is ignored: see `splits`."""
    splits: Annotated[list[Literal["train", "held_out"]], Field(min_length=1)] = Field(default=["train", "held_out"])
    """Splits to embed."""
    out: str
    """Directory or s3:// URL of the vectors (Parquet) and `vectors.json`."""
    endpoint: str | None = None
    """S3 endpoint; the environment's AWS_ENDPOINT_URL where not given."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute type; that of the export where not given."""
    batch_size: PositiveInt = 32
    """Samples embedded at once."""
    samples_per_task: PositiveInt = 256
    """Samples of one unit of work."""
    actors: PositiveInt = 1
    """Copies of the model."""
    cpus_per_actor: PositiveFloat = 1.0
    """Logical CPUs of each."""
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of each."""
    autoscaling: bool = False
    """The cluster can grow: skip the check that it is large enough now."""


class SearchSpec(JobConfig):
    """Search an embedded corpus in words, and write one HTML page."""

    kind: Literal["search"]
    """Searches."""
    queries: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None
    """What to search for; `null` takes a few captions of the corpus itself."""
    vectors: str
    """Directory or s3:// URL written by a job of kind `embed`."""
    endpoint: str | None = None
    """S3 endpoint; the environment's AWS_ENDPOINT_URL where not given."""
    instruction: str = "Find an image that matches the given caption:"
    """Put before every query."""
    modalities: Annotated[list[Literal["image", "page", "video", "text"]], Field(min_length=1)] | None = None
    """What may be found; everything where not given."""
    top_k: PositiveInt = 12
    """Hits of each query."""
    html: str | None = None
    """Local HTML file to write."""
    results: str | None = None
    """JSON of an evaluation whose table goes onto the page."""
    curves: Named[str] = Field(default_factory=dict)
    """Name -> folder of a training run whose loss goes onto the page."""


class PipelineSpec(JobConfig):
    """Jobs one after the other. A finished one is not repeated while its settings and all before it are unchanged."""

    kind: Literal["pipeline"]
    """Runs a pipeline."""
    name: Name
    """For messages."""
    vars: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    """Values for `${name}` in the jobs."""
    state: str
    """Directory or s3:// URL where finished jobs are recorded."""
    endpoint: str | None = None
    """S3 endpoint; the environment's AWS_ENDPOINT_URL where not given."""
    jobs: Annotated[Named[FileChanges], Field(min_length=1)]
    """In order."""


Spec = (
    CorpusSpec
    | IngestSpec
    | IndexSpec
    | TrainSpec
    | FinetunesSpec
    | SoupSpec
    | AblationSpec
    | RetrainSpec
    | EvaluateSpec
    | BenchmarkSpec
    | ExportSpec
    | EmbedSpec
    | SearchSpec
    | PipelineSpec
)
KINDS: dict[str, type[Spec]] = {
    "corpus": CorpusSpec,
    "ingest": IngestSpec,
    "index": IndexSpec,
    "train": TrainSpec,
    "finetunes": FinetunesSpec,
    "soup": SoupSpec,
    "ablation": AblationSpec,
    "retrain": RetrainSpec,
    "evaluate": EvaluateSpec,
    "benchmark": BenchmarkSpec,
    "export": ExportSpec,
    "embed": EmbedSpec,
    "search": SearchSpec,
    "pipeline": PipelineSpec,
}
