"""Kind `embed`: a dataset becomes vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from jobs.spec.job import JobConfig
from jobs.spec.kinds import Kind
from pipelines.config import DataConfig, PositiveFloat, PositiveInt


class EmbedSpec(JobConfig):
    """Embed the targets of a dataset: the corpus that `rzen search` searches."""

    kind: Literal["embed"]
    """Must be `embed`."""
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


def _gpus(spec: EmbedSpec, named: Sequence[JobConfig]) -> float:
    return spec.actors * spec.gpus_per_actor


EMBED = Kind(
    name="embed",
    spec=EmbedSpec,
    run="jobs.embedding.embed:run",
    reads={"model": "exported model", "data": "dataset"},
    makes={"out": "vectors as Parquet, and vectors.json"},
    gpus=_gpus,
)
