"""Kind `embed`: a dataset becomes vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from jobs.spec.job import JobConfig, Named
from jobs.spec.kinds import Kind
from jobs.spec.no_effect import NoEffect
from pipelines.config import Config, DataConfig, NonNegativeInt, PositiveFloat, PositiveInt
from pipelines.samples import StoredSplit
from pipelines.sources.table_config import TableSource
from rzen.index.kinds import IndexKind


class Workers(Config):
    """The share of the cluster that embeds: settings of every kind that does."""

    chunk_tokens: PositiveInt = 16_384
    """Tokens embedded at once, visual tokens and padding included."""
    actors: PositiveInt = 1
    """Number of model replicas. Each holds one model at a time."""
    cpus_per_actor: PositiveFloat = 1.0
    """Logical CPUs of each replica."""
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of each replica."""
    cpus_per_task: PositiveFloat = 1.0
    """Logical CPUs of a task that decodes. As many tasks run as the replicas leave CPUs for."""
    autoscaling: bool = False
    """Whether the cluster can grow. If so, the job does not check that it is large enough now."""


class EmbedSpec(Workers, JobConfig):
    """Embed the targets of a dataset: the corpus that `rzen search` searches."""

    kind: Literal["embed"]
    """Must be `embed`."""
    model: str
    """Exported model: a directory or an s3:// URL. A checkpoint or a hub name works, too."""
    data: DataConfig
    """Dataset whose targets are embedded. `data.split` is ignored: see `splits`."""
    input: str | None = None
    """Folder of images, videos, PDFs and texts to embed, with or without captions. The job first brings the dataset at
    `data.root` up to date with it. `null` embeds the dataset as it is."""
    sources: Named[TableSource] = Field(default_factory=dict)
    """Name of a source -> table whose positives are embedded, as in a job of kind `ingest`. A table needs no `query`:
    its text is the title of the target."""
    splits: Annotated[list[StoredSplit], Field(min_length=1)] = Field(default=["train", "held_out"])
    """Splits to embed. `uncaptioned` exists in datasets that were ingested with `keep_uncaptioned`."""
    queries: bool = False
    """`true` embeds the queries, too, each with its instruction: what `data.teacher_vectors` of a training run needs.
    They are stored apart from the targets, and no search finds them."""
    segment_seconds: Annotated[float, Field(ge=1)] | None = None
    """Divide longer videos into segments of this many seconds, each with a vector, `start_s` and `end_s`, so that a
    search finds the moment. 30 suits lectures and films, 10 sports and short scenes. A last segment of less than half
    is part of the one before. `null` makes one vector of a video, as training data need it."""
    segment_overlap_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Seconds by which a segment begins before the end of the one before, at most half of `segment_seconds`."""
    out: str
    """Directory or s3:// URL of the vectors (Parquet) and `vectors.json`. A second run embeds only what is new."""
    endpoint: str | None = None
    """S3 endpoint; the environment's AWS_ENDPOINT_URL where not given."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute type; that of the export where not given."""
    samples_per_part: PositiveInt = 1024
    """Targets of one Parquet file, at most. A file is kept while its targets are the same."""
    index: IndexKind | Literal["auto"] = "auto"
    """What searches the vectors. `exact` compares with each vector. `lance` is a LanceDB table. `faiss_sq8` and
    `faiss_rabitq` are resident in memory. `qdrant` is on the server that the variable QDRANT_URL names. `auto`:
    `lance` above 200,000 vectors, else `exact`."""
    keep_versions: NonNegativeInt = 1
    """Earlier versions that stay readable, with the files and indices that they need."""

    @model_validator(mode="after")
    def _segments_fit(self) -> EmbedSpec:
        if self.segment_seconds is None:
            return self
        if self.segment_overlap_seconds > self.segment_seconds / 2:
            found = f"{self.segment_overlap_seconds:g} is more than half of segment_seconds={self.segment_seconds:g}"
            raise ValueError(f"segment_overlap_seconds={found}; use at most {self.segment_seconds / 2:g}")
        if self.queries:
            problem = "a training run learns from vectors of whole targets; leave out one of the two"
            raise ValueError(f"queries and segment_seconds are both set: {problem}")
        return self


def gpus_of_actors(spec: Workers, named: Sequence[JobConfig]) -> float:
    """Return how many GPUs a job that embeds can use at once."""
    return spec.actors * spec.gpus_per_actor


def _is_whole(spec: EmbedSpec) -> bool:
    return spec.segment_seconds is None


def _always(spec: EmbedSpec) -> bool:
    return True


EMBED = Kind(
    name="embed",
    spec=EmbedSpec,
    run="jobs.embedding.embed:run",
    reads={"model": "exported model", "data": "dataset", "input": "folder of files", "sources": "tables"},
    makes={"out": "vectors as Parquet, their index, and vectors.json"},
    inputs=lambda spec: {"model": "embedder", "input": "folder"},  # the job may make `data`
    gpus=gpus_of_actors,
    no_effect=(
        NoEffect("data.split", _always, "`splits` decides"),
        NoEffect("segment_overlap_seconds", _is_whole, "without `segment_seconds`, videos are not divided"),
        NoEffect("data.mixture", _always, "every target is embedded"),
        NoEffect("data.negatives_per_sample", _always, "targets only are embedded"),
        NoEffect("data.max_bad_fraction", _always, "bad targets are skipped and counted"),
    ),
)
