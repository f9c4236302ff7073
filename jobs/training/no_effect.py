"""Settings of a training run without effect. `tests/unit/jobs/test_no_effect.py` shows it for each entry."""

from __future__ import annotations

from jobs.spec.no_effect import NoEffect
from jobs.training.specs import TrainSpec
from rzen.config import ObjectiveConfig, RerankObjectiveConfig


def _never_drops(spec: TrainSpec) -> bool:
    rule = spec.objective.false_negatives if isinstance(spec.objective, ObjectiveConfig) else None
    return rule is not None and spec.steps is not None and rule.warmup_steps >= spec.steps


def _never_resamples(spec: TrainSpec) -> bool:
    resample = spec.data.mixture.resample
    return resample is not None and spec.steps is not None and resample.every_steps >= spec.steps


def _has_one_source(spec: TrainSpec) -> bool:
    return spec.data.mixture.weights is not None and len(spec.data.mixture.weights) == 1


def _never_warms_up(spec: TrainSpec) -> bool:
    fraction = spec.optim.warmup_fraction
    return spec.steps is not None and fraction > 0 and int(fraction * spec.steps) == 0


def _blocks_are_whole(spec: TrainSpec) -> bool:
    return all(size == spec.global_batch for size in spec.data.mixture.blocks.values())


def _fixed(spec: TrainSpec) -> bool:
    return isinstance(spec.objective, ObjectiveConfig) and not spec.objective.temperature.learnable


def _only_reverse(spec: TrainSpec) -> bool:
    objective = spec.objective
    return isinstance(objective, ObjectiveConfig) and objective.symmetric == 1 and not objective.tasks


def _is_pointwise(spec: TrainSpec) -> bool:
    return isinstance(spec.objective, RerankObjectiveConfig) and spec.objective.loss == "bce"


def _is_listwise(spec: TrainSpec) -> bool:
    return isinstance(spec.objective, RerankObjectiveConfig) and spec.objective.loss == "listwise"


def _compares_scores(spec: TrainSpec) -> bool:
    teacher = spec.objective.distillation if isinstance(spec.objective, ObjectiveConfig) else None
    return teacher is not None and teacher.loss == "margin_mse"


def _compares_cosines(spec: TrainSpec) -> bool:
    teacher = spec.objective.embedding_distillation if isinstance(spec.objective, ObjectiveConfig) else None
    return teacher is not None and teacher.loss == "mse"


def _no_sandbox(spec: TrainSpec) -> bool:
    return spec.data.trusted and spec.data.media.video_backend != "decord"


NO_EFFECT = (
    NoEffect("epochs", lambda spec: spec.steps is not None, "steps is set"),
    NoEffect("model.lora", lambda spec: spec.model.tune == "full", "model.tune: full trains every weight"),
    NoEffect(
        "model.lora",
        lambda spec: spec.init_adapter is not None,
        "init_adapter decides, and the run fails where it says otherwise",
    ),
    NoEffect("objective.mined", lambda spec: spec.data.negatives_per_sample == 0, "data.negatives_per_sample is 0"),
    NoEffect("data.negatives_draw", lambda spec: spec.data.candidates is None, "data.candidates is not set"),
    NoEffect("data.negatives_draw", lambda spec: spec.data.negatives_per_sample == 0, "data.negatives_per_sample is 0"),
    NoEffect(
        "objective.tasks.*.mined",
        lambda spec: spec.data.negatives_per_sample == 0,
        "data.negatives_per_sample is 0",
    ),
    NoEffect("objective.mined", _only_reverse, "symmetric: 1 leaves no query -> targets"),
    NoEffect(
        "data.negatives_per_sample",
        _only_reverse,
        "objective.symmetric: 1 leaves no query -> targets, so that mined negatives are never scored",
    ),
    NoEffect(
        "objective.false_negatives.warmup_steps",
        _never_drops,
        "it is not below steps, so that no false negative is ever dropped",
        also_default=True,
    ),
    NoEffect(
        "data.teacher_vectors",
        lambda spec: not spec.objective.distills_vectors,
        "objective.embedding_distillation is not set",
    ),
    NoEffect(
        "objective.distillation.teacher_temperature",
        _compares_scores,
        "loss: margin_mse has no temperatures",
    ),
    NoEffect(
        "objective.embedding_distillation.teacher_temperature",
        _compares_cosines,
        "loss: mse has no temperatures",
    ),
    NoEffect("objective.temperature.lr_scale", _fixed, "temperature.learnable is false"),
    NoEffect("objective.temperature.minimum", _fixed, "temperature.learnable is false"),
    NoEffect("objective.temperature.maximum", _fixed, "temperature.learnable is false"),
    NoEffect("objective.list_temperature", _is_pointwise, "loss: bce has no softmax over a list"),
    NoEffect("objective.positive_weight", _is_listwise, "loss: listwise has one positive in each list"),
    NoEffect("data.mixture.resample", _never_resamples, "every_steps is not below steps"),
    NoEffect("data.mixture.resample", _has_one_source, "data.mixture.weights names one source"),
    NoEffect("data.mixture.blocks", _blocks_are_whole, "each block is a whole global batch, as without blocks"),
    NoEffect("optim.warmup_fraction", _never_warms_up, "it is less than one of the steps"),
    NoEffect("data.media.max_cpu_s", _no_sandbox, "data.trusted: true decodes without limits"),
    NoEffect("data.media.max_memory_bytes", _no_sandbox, "data.trusted: true decodes without limits"),
    NoEffect(
        "run.tracking.project",
        lambda spec: spec.run.tracking.mlflow is None and not spec.run.tracking.wandb,
        "neither tracking.mlflow nor tracking.wandb is on",
    ),
)
