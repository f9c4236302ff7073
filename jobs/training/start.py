"""What a run starts from: backbone, adapter and temperatures. The driver checks it before any worker starts."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.runtime.inputs import errors_of
from jobs.runtime.progress import say
from jobs.runtime.records import differences
from jobs.training.specs import TrainSpec
from jobs.training.teacher import Teacher
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.plan.build import build_plan
from pipelines.plan.plan import Plan
from pipelines.samples import Rejected
from pipelines.storage.location import open_store, resolve_endpoint
from rzen.config import ModelIdentity, ObjectiveConfig, RerankerIdentity, TemperatureConfig, TinyBackbone
from rzen.families import FAMILIES, read_family
from rzen.inputs.processor import VisionLayout
from rzen.model.checkpoints import (
    check_base,
    checkpoint_sha256,
    read_identity,
    read_pair_prompt,
)
from rzen.model.locate import config_folder, local_folder

if TYPE_CHECKING:
    from rzen.training.init_adapter import InitAdapter


_PEEKED = 32  # samples of a source that stand for all of it


def plan_of(spec: TrainSpec, reader: Reader) -> Plan:
    """Return the batches of a run. Raises `UserError` for data that are missing, and for a mixture that they lack."""
    return build_plan(
        reader.tables(),
        spec.data.mixture,
        global_batch=spec.global_batch,
        steps=spec.steps,
        epochs=spec.epochs,
        seed=spec.seed,
    )


def check_lists(spec: TrainSpec, reader: Reader, plan: Plan) -> None:
    """Raise `UserError` for a source of the plan that has nothing to train a re-ranker on, by its first samples."""
    if isinstance(spec.objective, ObjectiveConfig):
        return
    for source in plan.members:
        peeked = list(reader.records(source, range(min(_PEEKED, reader.sizes()[source]))))
        samples = [sample for sample in peeked if not isinstance(sample, Rejected)]
        fix = "leave it out of data.mixture.weights"
        if any(sample.relevance is not None for sample in samples):
            raise UserError(f"source {source}", "has graded pairs, and a re-ranker learns right and wrong answers", fix)
        if not (reader.has_candidates(source) or any(sample.negatives for sample in samples)):
            problem = f"has no negatives: none in its first {len(peeked)} samples, and no candidates in data.candidates"
            raise UserError(f"source {source}", problem, f"run a job of kind mine, and name its table; or {fix}")


def data_of(spec: TrainSpec, reader: Reader, plan: Plan, teacher: Teacher | None) -> dict[str, Any]:
    """Return what makes two runs the same, next to their settings: data, batches and first weights. Plain JSON.

    `teacher` is what the run learns from, and not looked up again: a newer version may be live by now.
    """
    found: dict[str, Any] = {"data": reader.fingerprints(plan), "weights": weights_of(spec)}
    if tables := reader.table_fingerprints():
        found["tables"] = tables
    if teacher is not None:
        found["teacher_vectors"] = teacher.version
    return found | plan.describe()


def check_backbone(spec: TrainSpec) -> None:
    """Raise `UserError` for a backbone that is missing or cannot be read as asked.

    Workers of a cluster may reach a bucket or a hub that this process does not reach. There, they check it.
    """
    backbone = spec.model.backbone
    if isinstance(backbone, TinyBackbone):
        family = FAMILIES[backbone.family]
    elif Path(backbone).is_dir() or "RAY_ADDRESS" not in os.environ:
        endpoint = resolve_endpoint(spec.run.endpoint)
        with errors_of("model.backbone", backbone), config_folder(backbone, endpoint) as folder:
            family = read_family(folder)
    else:
        return
    family.check(spec.model.readout, spec.model.packing)


def with_init_adapter(spec: TrainSpec) -> tuple[TrainSpec, InitAdapter | None]:
    """Return the spec with rank, alpha and dropout of its `init_adapter`, and what that says. A new adapter: no change.

    Raises `UserError` for an adapter that is missing, that the run cannot continue, or that has another base. Workers
    check the base again, and they alone where it is not a local directory.
    """
    if spec.init_adapter is None:
        return spec, None
    from rzen.training.init_adapter import read_init_adapter

    folder = _adapter_folder(spec, spec.init_adapter)
    found = read_init_adapter(folder, spec.model.lora)
    backbone = spec.model.backbone
    if isinstance(backbone, str) and Path(backbone).is_dir():
        check_base(folder, Path(backbone))
    return spec.model_copy(update={"model": spec.model.model_copy(update={"lora": found.lora})}), found


def weights_of(spec: TrainSpec) -> dict[str, str]:
    """Return what identifies the weights that a run starts from, by their content. Part of the identity of the run.

    Only the tags of a backbone in object storage are read, because the driver may have no room for it. A hub name stays
    a name.
    """
    found = {}
    backbone = spec.model.backbone
    if isinstance(backbone, str) and Path(backbone).is_dir():
        found["backbone"] = _sha256(backbone, _tags(backbone))
    elif isinstance(backbone, str) and "://" in backbone:
        found["backbone"] = _tags(backbone, resolve_endpoint(spec.run.endpoint))
    if spec.init_adapter is not None:
        adapter = str(_adapter_folder(spec, spec.init_adapter))
        found["init_adapter"] = _sha256(adapter, _tags(adapter))
    return found


@cache
def _sha256(folder: str, tags: str) -> str:
    """Return the `checkpoint_sha256`. Several runs of one job read a backbone once, unless its `tags` have changed."""
    return checkpoint_sha256(Path(folder))


def _tags(url: str, endpoint: str | None = None) -> str:
    return hashlib.sha256(repr(sorted(open_store(url, endpoint).tags().items())).encode()).hexdigest()


def describe_start(spec: TrainSpec, adapter: InitAdapter | None) -> None:
    """Print what the run starts from. Raises `UserError` for temperatures that cannot be carried over."""
    backbone = spec.model.backbone
    name = "a tiny random backbone" if isinstance(backbone, TinyBackbone) else backbone
    lora = spec.model.lora
    tuning = "every weight"
    if spec.model.tune == "lora":
        alpha = lora.alpha or 2 * lora.rank
        scope = "vision tower and language model" if lora.scope == "all" else "language model only"
        new = f"new LoRA rank {lora.rank}, alpha {alpha:g}, dropout {lora.dropout:g} ({scope})"
        tuning = str(adapter) if adapter else new
    instructions = "on" if spec.data.instructions else "off"
    say(f"    {name}, {tuning}, {spec.model.dtype}; instructions {instructions}", "dim")
    if token_px := _token_px(spec):
        _describe_budget(spec, token_px)
    if spec.init_adapter is not None:
        say(f"    continues from {spec.init_adapter}", "dim")
        before = _trained_as(_adapter_folder(spec, spec.init_adapter), spec.identity)
        for change in differences(before, spec.identity.model_dump()):
            say(f"    init_adapter was trained with another setting: {change}", "yellow")
    if isinstance(spec.objective, ObjectiveConfig) and spec.objective.temperature.carried:
        _describe_temperatures(spec, spec.objective.temperature)


def _trained_as(adapter: Path, ours: ModelIdentity | RerankerIdentity) -> dict[str, Any]:
    """Return what an adapter says that it was trained with, by the settings of a run; as the run where it is silent.

    A re-ranker may continue from an embedder, whose prompt is of another kind.
    """
    if isinstance(ours, ModelIdentity):
        return read_identity(adapter, ours).model_dump()
    prompt = read_pair_prompt(adapter)
    return {"pair_prompt": prompt.model_dump()} if prompt else ours.model_dump()


def _describe_budget(spec: TrainSpec, token_px: int) -> None:
    """Print how many tokens an image has at most, and which settings leave some of them unused."""
    tokens = spec.prompt.max_visual_tokens
    budget = tokens * token_px**2
    say(f"    images and pages of up to {tokens} tokens of {token_px} x {token_px} pixels", "dim")
    media = spec.data.media.for_model(budget)
    for name in ("image_pixels", "page_pixels"):
        pixels = getattr(media, name)
        if pixels < budget:
            used = f"{pixels // token_px**2} of {tokens} tokens"
            say(f"    data.media.{name}={pixels:,} gives at most {used}; leave it out to use all", "yellow")


def _token_px(spec: TrainSpec) -> int | None:
    """Return the edge of a token of the backbone. None for one that only the workers read."""
    backbone = spec.model.backbone
    if isinstance(backbone, TinyBackbone):
        return FAMILIES[backbone.family].token_px
    return VisionLayout.read(backbone).factor_px if Path(backbone).is_dir() else None


def _describe_temperatures(spec: TrainSpec, config: TemperatureConfig) -> None:
    from rzen.training.temperatures import SETTING, carried_temperatures

    backbone = spec.model.backbone
    if spec.init_adapter is not None:
        folder = _adapter_folder(spec, spec.init_adapter)
    elif isinstance(backbone, TinyBackbone):
        raise UserError(SETTING, "a tiny random backbone has no temperatures", "set it to false")
    elif Path(backbone).is_dir():
        folder = Path(backbone)
    else:
        return  # the workers read them
    found = carried_temperatures(config, folder)
    listed = ", ".join(f"{task} {value:.4g}" for task, value in sorted(found.items()))
    say(f"    temperatures carried over: {listed}", "dim")


def _adapter_folder(spec: TrainSpec, adapter: str) -> Path:
    if "://" not in adapter and not Path(adapter).is_dir():
        raise UserError(f"init_adapter {adapter}", "does not exist", "run stage 1 first, or set init_adapter: null")
    return Path(local_folder(adapter, resolve_endpoint(spec.run.endpoint)))
