"""Kinds `mine`, `select` and `cluster`: jobs that make candidate tables."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from jobs.embedding.specs import Workers, gpus_of_actors
from jobs.spec.job import JobConfig, Named
from jobs.spec.kinds import Kind, no_gpus
from jobs.spec.no_effect import NoEffect
from pipelines.candidates.config import SelectionConfig
from pipelines.config import Config, DataConfig, MediaConfig, NonNegativeInt, PositiveInt
from pipelines.samples import StoredSplit


class PoolConfig(Config):
    """Sources whose targets are candidates."""

    root: str | None = None
    """Directory or s3:// URL of their dataset. `null` is `data.root`."""
    split: StoredSplit = "train"
    """Split of that dataset. The media of `uncaptioned` have no query, as those of a corpus."""
    sources: Annotated[list[str], Field(min_length=1)] | None = None
    """Their names. `null` takes all sources of the split."""


class InvertedListsConfig(Config):
    """Approximate search with FAISS: vectors in lists by their nearest centroid."""

    lists: PositiveInt | None = None
    """Number of lists. `null` is four times the square root of the number of candidates."""
    probes: PositiveInt = 32
    """Lists that are searched for each query. More find more and take longer."""
    seed: NonNegativeInt = 0
    """Seed of the centroids, and of the queries that measure the recall."""


class MineSpec(Workers, JobConfig):
    """Find the targets that a model puts closest to each query: candidates for hard negatives."""

    kind: Literal["mine"]
    """Must be `mine`."""
    model: str
    """Exported model: a directory or an s3:// URL. A checkpoint or a hub name works, too."""
    adapter: str | None = None
    """Adapter of a checkpoint: a directory or an s3:// URL."""
    data: DataConfig
    """Dataset and split whose samples get candidates."""
    sources: Annotated[list[str], Field(min_length=1)] | None = None
    """Sources whose samples get candidates. `null` takes all of the split."""
    pools: Literal["own", "all"] | Annotated[list[PoolConfig], Field(min_length=1)] = "own"
    """Targets that are candidates. `own` takes those of the sample's source, as batches are drawn from one source.
    `all` takes those of all mined sources. A list names datasets, splits and sources for all samples."""
    depth: PositiveInt = 100
    """Candidates of each sample. `select` chooses among them."""
    select: SelectionConfig | None = None
    """Choose negatives in the same job. `out` is then the table of the chosen ones, and all candidates are in
    `{out}/mined`. `null` only mines."""
    search: Literal["exact", "ivf"] = "exact"
    """`exact` compares each query with every candidate. `ivf` is approximate, for many millions on CPUs. It needs
    FAISS, and the job reports how much of the exact result it finds."""
    ivf: InvertedListsConfig = InvertedListsConfig()
    """Settings of `search: ivf`."""
    owners: bool = True
    """Whether to compare each query with the query of the candidate's own sample. `select` needs it for
    `max_owner_likeness`. It takes a second file of vectors on each node."""
    out: str
    """Directory or s3:// URL of the candidate table."""
    vectors: str | None = None
    """Directory or s3:// URL of the vectors, by content and model. What is there is not embedded again. `null` is the
    folder `vectors` in `out`."""
    scratch: str | None = None
    """Folder of each node for the vectors that are searched: 4 bytes x width x candidates, memory-mapped. `null` uses
    the system's folder for temporary files."""
    queries_per_task: PositiveInt = 8192
    """About this many queries are searched at a time. Each time, all candidates are read once."""
    endpoint: str | None = None
    """S3 endpoint of model, vectors and table. `null` uses AWS_ENDPOINT_URL from the environment."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute type; that of the export where not given."""


class SelectSpec(JobConfig):
    """Choose hard negatives among candidates, by rules that leave out likely right answers."""

    kind: Literal["select"]
    """Must be `select`."""
    table: str
    """Directory or s3:// URL of a candidate table: what `mine`, `judge` or `cluster` wrote."""
    out: str
    """Directory or s3:// URL of the new table and its report."""
    selection: SelectionConfig = SelectionConfig()
    """How negatives are chosen."""
    sources: Named[SelectionConfig] = Field(default_factory=dict)
    """Source -> how its negatives are chosen, instead of `selection`. A threshold belongs to one kind of data."""
    num_examples: NonNegativeInt = 30
    """Samples that the report shows."""
    root: str | None = None
    """Directory or s3:// URL of the dataset, for the report. `null` takes that of the table."""
    trusted: bool = False
    """Whether you made the media yourself. `false` decodes videos and documents of the report in a child process."""
    endpoint: str | None = None
    """S3 endpoint of tables and data. `null` uses AWS_ENDPOINT_URL from the environment."""

    def data_of(self, root: str, split: str) -> DataConfig:
        """Return how a dataset is read for the report."""
        data = DataConfig(root=root, endpoint=self.endpoint, instructions=False, trusted=self.trusted)
        return data.model_copy(update={"split": split, "media": MediaConfig(frames=4)})


class ClusterSpec(JobConfig):
    """Put samples that are hard negatives of each other into clusters, which share a batch."""

    kind: Literal["cluster"]
    """Must be `cluster`."""
    table: str
    """Directory or s3:// URL of a candidate table: what `mine`, `judge` or `select` wrote."""
    out: str
    """Directory or s3:// URL of the new table, which has the candidates, too."""
    method: Literal["preferences", "origin"] = "preferences"
    """`preferences` joins samples of a source that rank each other's targets high, and cuts this graph into parts of
    one size (B3). It needs pymetis. `origin` takes metadata, such as pages of one document."""
    first_rank: PositiveInt = 30
    """First rank of the candidates that count. Those above may be right answers (B3: 30)."""
    num_ranks: PositiveInt = 70
    """Number of ranks from there on that count, as far as the table goes."""
    cluster_size: PositiveInt = 32
    """Samples of a cluster, within about one (B3: 32)."""
    seed: NonNegativeInt = 0
    """Seed of the partition."""
    origin: str = "^(.*)#page="
    """Regular expression for the origin of a sample. Samples with an equal first group share a cluster."""
    root: str | None = None
    """Directory or s3:// URL of the dataset, for `method: origin`. `null` takes that of the table."""
    endpoint: str | None = None
    """S3 endpoint of tables and data. `null` uses AWS_ENDPOINT_URL from the environment."""

    @field_validator("origin")
    @classmethod
    def _has_a_group(cls, value: str) -> str:
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from error
        if groups < 1:
            raise ValueError("has no group in parentheses, which names the cluster")
        return value


def _without_effect(place: str, selection: Callable[[Any], SelectionConfig | None]) -> tuple[NoEffect, ...]:
    """Return the settings of a selection at `place` that change nothing. `selection` takes it out of a spec."""
    return (
        NoEffect(
            f"{place}.seed",
            lambda spec: (found := selection(spec)) is not None and found.choice != "random",
            f"{place}.choice is not random",
        ),
        NoEffect(
            f"{place}.low_rank",
            lambda spec: (found := selection(spec)) is not None and found.modality != "mm_embed",
            f"{place}.modality is not mm_embed",
        ),
    )


MINE = Kind(
    name="mine",
    spec=MineSpec,
    run="jobs.mining.mine:run",
    reads={"model": "exported model", "data": "dataset", "pools": "datasets"},
    makes={"out": "candidate table, and vectors by content"},
    inputs=lambda spec: {"model": "embedder", "data": "dataset"},
    gpus=gpus_of_actors,
    no_effect=(
        NoEffect("data.mixture", lambda spec: True, "`sources` decides"),
        NoEffect("data.negatives_per_sample", lambda spec: True, "queries and targets are embedded"),
        NoEffect("data.max_bad_fraction", lambda spec: True, "bad samples get no candidates and are counted"),
        NoEffect("ivf", lambda spec: spec.search == "exact", "search: exact compares with every candidate"),
        *_without_effect("select", lambda spec: spec.select),
    ),
)
SELECT = Kind(
    name="select",
    spec=SelectSpec,
    run="jobs.mining.select:run",
    reads={"table": "candidate table", "root": "dataset"},
    makes={"out": "candidate table of the chosen negatives, and report.html"},
    inputs=lambda spec: {"table": "table"},
    gpus=no_gpus,
    no_effect=_without_effect("selection", lambda spec: spec.selection),
)
CLUSTER = Kind(
    name="cluster",
    spec=ClusterSpec,
    run="jobs.mining.cluster:run",
    reads={"table": "candidate table", "root": "dataset"},
    makes={"out": "candidate table with clusters"},
    inputs=lambda spec: {"table": "table"},
    gpus=no_gpus,
    no_effect=(
        *(
            NoEffect(name, lambda spec: spec.method == "origin", "method: origin takes metadata")
            for name in ("first_rank", "num_ranks", "cluster_size", "seed")
        ),
        *(
            NoEffect(name, lambda spec: spec.method == "preferences", "method: preferences takes ranks")
            for name in ("origin", "root")
        ),
    ),
)
