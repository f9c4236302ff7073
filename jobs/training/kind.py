"""Kind `train`: one training run."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.spec.job import JobConfig
from jobs.spec.kinds import Kind
from jobs.training.no_effect import NO_EFFECT
from jobs.training.specs import TrainSpec


def _cannot_share(spec: TrainSpec) -> str | None:
    # A source that is smaller than a batch gets a smaller one, which the plan checks.
    if spec.global_batch % spec.cluster.workers == 0 or spec.data.mixture.merge_small:
        return None
    return f"global_batch={spec.global_batch} cannot be shared evenly by {spec.cluster.workers} workers"


def _gpus(spec: TrainSpec, named: Sequence[JobConfig]) -> float:
    return spec.cluster.workers * spec.cluster.gpus_per_worker


TRAIN = Kind(
    name="train",
    spec=TrainSpec,
    run="jobs.training.train:run",
    reads={
        "data": "dataset",
        "data.candidates": "candidate table",
        "data.curation": "tables of drops",
        "data.teacher_vectors": "vectors of a larger model",
        "model.backbone": "checkpoint",
        "init_adapter": "adapter",
    },
    makes={"run": "{root}/{name}/ with adapter or model, checkpoints, metrics"},
    gpus=_gpus,
    no_effect=NO_EFFECT,
    impossible=_cannot_share,
    # Where and how fast a run goes. Datasets are identified by their fingerprints, wherever they are stored.
    not_science=frozenset(
        {"run", "feed", "checkpoint", "eval", "cluster", "submit", "data.root", "data.endpoint", "data.trusted"}
        | {"data.candidates", "data.curation", "data.teacher_vectors"}
        | {"optim.zero_stage"}
    ),
)
