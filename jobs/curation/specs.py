"""Kind `curate`: a job that decides which samples training leaves out."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from jobs.embedding.specs import Workers, gpus_of_actors
from jobs.spec.job import JobConfig
from jobs.spec.kinds import Kind
from jobs.spec.no_effect import NoEffect
from pipelines.config import DataConfig, NonNegativeInt
from pipelines.curate.settings import CurationRules


class CurateSpec(Workers, JobConfig):
    """List the samples that training leaves out, and why, without touching the shards."""

    kind: Literal["curate"]
    """Must be `curate`."""
    data: DataConfig
    """Dataset, and the split whose samples are judged."""
    rules: CurationRules = CurationRules()
    """Rules, in the order in which they are applied."""
    model: str | None = None
    """Exported model for `rules.alignment` and `rules.semantic`: a directory, an s3:// URL or a hub name."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute type of the model. `null` takes that of the export."""
    cache: str = "runs/curation-cache"
    """Directory or s3:// URL of what was computed of each shard: hashes, texts, vectors. It is kept by content, so that
    no shard is decoded twice, whatever the rules. Nothing is ever deleted from it."""
    out: str
    """Directory or s3:// URL of the table of drops and its reports. Name it in `data.curation` of a training run."""
    endpoint: str | None = None
    """S3 endpoint of model, cache and `out`. `null` uses AWS_ENDPOINT_URL from the environment."""
    num_examples: NonNegativeInt = 3
    """Samples of each reason that the report shows, evenly spread over those that were left out."""

    @model_validator(mode="after")
    def _has_a_model(self) -> CurateSpec:
        if self.rules.needs_model and self.model is None:
            rule = "alignment" if self.rules.alignment else "semantic"
            raise ValueError(f"rules.{rule} needs vectors: name a model, or set rules.{rule}: null")
        return self


def _always(spec: CurateSpec) -> bool:
    return True


def _no_model(spec: CurateSpec) -> bool:
    return not spec.rules.needs_model


def _no_cap(spec: CurateSpec) -> bool:
    return spec.rules.semantic is not None and spec.rules.semantic.max_per_cluster is None


_NO_VECTORS = "rules.alignment and rules.semantic are null"
_HOW = {*Workers.model_fields, "submit", "out", "cache", "num_examples"}
CURATE = Kind(
    name="curate",
    spec=CurateSpec,
    run="jobs.curation.curate:run",
    reads={
        "data": "dataset",
        "model": "exported model",
        "rules": "evaluation sets of `rules.leakage`",
    },
    makes={"out": "table of drops, HTML report", "cache": "hashes and vectors"},
    inputs=lambda spec: {"data": "dataset", **({"model": "embedder"} if spec.rules.needs_model else {})},
    gpus=gpus_of_actors,
    no_effect=(
        NoEffect("model", _no_model, _NO_VECTORS),
        NoEffect("dtype", _no_model, _NO_VECTORS),
        NoEffect("actors", _no_model, _NO_VECTORS),
        NoEffect("gpus_per_actor", _no_model, _NO_VECTORS),
        NoEffect("rules.semantic.full_clusters", _no_cap, "rules.semantic.max_per_cluster is null"),
        NoEffect("data.mixture", _always, "every sample of the split is judged"),
        NoEffect("data.negatives_per_sample", _always, "mined negatives are not judged"),
        NoEffect("data.max_bad_fraction", _always, "bad media are a rule of their own"),
    ),
    not_science=frozenset(_HOW),
)
