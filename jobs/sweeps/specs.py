"""Kinds `finetunes`, `soup` and `ablation`: several training runs, and what is made of them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jobs.spec.job import FileChanges, JobConfig, Name, Named
from jobs.spec.kinds import InputType, Kind, gpus_of, no_gpus
from jobs.spec.model import ModelRef
from jobs.spec.no_effect import NoEffect
from pipelines.config import NonNegativeInt, PositiveInt
from rzen.config import MeanSoup, SoupConfig

_ROUNDING = 1e-6  # thirds add up to 1 within this


class SoupsConfig(JobConfig):
    """Which soups to make of several models, and how to score them."""

    soups: Annotated[Named[SoupConfig], Field(min_length=1)] = Field(default={"uniform": MeanSoup()})
    """Name of a soup -> how it is made."""
    evaluate: FileChanges | None = None
    """Spec of kind `evaluate` that scores every model and soup for the summary. Its `models` and `out` are ignored.
    `null`: no scores."""
    probe: FileChanges | None = None
    """Spec of kind `evaluate` on other data. Greedy and searched soups choose by its mean score. `null` uses
    `evaluate`: the scores of the chosen soups are then biased upwards, as the summary says."""
    base: str | None = None
    """Checkpoint that full models were trained from (directory, s3:// URL or hub name). The methods `ties` and `dare`
    need it to merge what training changed. Adapters hold only that, so they need no base."""
    out: str
    """Directory or s3:// URL of the results: `{soup}/adapter` or `{soup}/model`, summary.json, .md and .svg, and
    index.html."""
    endpoint: str | None = None
    """S3 endpoint of `out` and the models. `null` uses AWS_ENDPOINT_URL from the environment."""

    @model_validator(mode="after")
    def _choices_need_scores(self) -> SoupsConfig:
        for name, soup in self.soups.items():
            if soup.method in ("greedy", "searched") and not (self.evaluate or self.probe):
                raise ValueError(f"soups.{name}: method={soup.method} chooses by scores; set evaluate")
            if name in ("candidates", "models"):
                raise ValueError(f"soups.{name}: the job keeps scores in a folder of this name; choose another name")
        return self

    def impossible(self, adapters: bool) -> tuple[tuple[str, ...], str] | None:
        """Return key and problem of what cannot be merged from adapters, or from full models. None if there is none."""
        if adapters and self.base:
            return ("base",), f"base={self.base}: adapters hold only what training changed, so leave base out"
        for name, soup in self.soups.items() if not adapters else ():
            if soup.method in ("ties", "dare") and not self.base:
                return ("soups", name), f"soups.{name}: method={soup.method} of full models needs base"
            if isinstance(soup.rank, int):
                return ("soups", name), f"soups.{name}: rank={soup.rank}, but full models have no rank"
        return None

    def check_names(self, known: Collection[str]) -> None:
        """Raise `ValueError` for soup weights of something that is not among the models."""
        for name, soup in self.soups.items():
            if unknown := sorted(set(getattr(soup, "weights", None) or {}) - set(known)):
                raise ValueError(f"soups.{name}.weights names {unknown[0]!r}, which is none of {', '.join(known)}")


class FinetunesSpec(SoupsConfig):
    """Train several fine-tunes in parallel, then make soups of their results."""

    kind: Literal["finetunes"]
    """Must be `finetunes`."""
    stage: str
    """Spec of kind `train` that every fine-tune starts from, relative to this file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Changes to the stage that all fine-tunes share."""
    runs: Named[dict[str, Any]] = Field(default_factory=dict)
    """Name of a fine-tune -> the changes that only it makes, usually `data.mixture.weights`."""
    grid: dict[str, Annotated[list[str | int | float | bool | None], Field(min_length=1)]] = Field(default_factory=dict)
    """Setting -> its values, such as `seed: [0, 1, 2]`. Each entry of `runs` is trained with every combination. The
    values become part of the names: `balanced-seed-0`."""
    max_parallel: PositiveInt = 3
    """Largest number of fine-tunes at the same time. Fewer run if the cluster has no room; the others wait in order. A
    cluster that can grow (`cluster.autoscaling`) grows for runs that have started and have no room yet."""
    min_survivors: PositiveInt | None = None
    """How many fine-tunes must succeed. The job fails as soon as that is impossible. A fine-tune fails permanently
    after `cluster.max_restarts` restarts. `null`: all must succeed."""
    retry_failed: bool = False
    """Whether to train fine-tunes again that failed permanently in an earlier launch."""

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
        """Return name of a fine-tune -> (its entry of `runs`, its grid values by setting)."""
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
    """Make soups of existing models."""

    kind: Literal["soup"]
    """Must be `soup`."""
    models: Annotated[Named[ModelRef], Field(min_length=1)]
    """Name -> model: adapters of one base, or full models. A soup among them counts with the number of models that it
    was made of, so that adding one more model gives the mean of all."""

    @model_validator(mode="after")
    def _of_one_kind(self) -> SoupSpec:
        if len({ref.adapter is None for ref in self.models.values()}) > 1:
            raise ValueError("models has adapters and full models; export the adapters first, or remove one kind")
        if found := self.impossible(adapters=next(iter(self.models.values())).adapter is not None):
            raise ValueError(found[1])
        self.check_names(list(self.models))
        return self


class AblationSpec(JobConfig):
    """Train with and without parts of the recipe, with several seeds each, and compare."""

    kind: Literal["ablation"]
    """Must be `ablation`."""
    stage: str
    """Spec of kind `train` that every run starts from, relative to this file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Changes to the stage that all runs share."""
    variants: Annotated[Named[dict[str, Any]], Field(min_length=2)]
    """Name of a variant -> the changes that only it makes. The job sets `name` and `seed`: runs are called
    {variant}-s{seed}."""
    baseline: Name = "baseline"
    """Variant that the others are compared with."""
    contrasts: Named[dict[Name, float]] = Field(default_factory=dict)
    """Name of a contrast -> variant -> weight. The weights add up to 0: `{both: 1, rule: -1, hardness: -1, none: 1}` is
    what two parts do together beyond what each does alone. The sum is taken within each seed."""
    seeds: Annotated[int, Field(ge=2)] | Annotated[list[NonNegativeInt], Field(min_length=2)] = 10
    """Seeds of each variant: a list, or how many from 0 on. Results from fewer than ten seeds are mostly noise."""
    evaluate: FileChanges
    """Spec of kind `evaluate` that scores every run. Its `models` and `out` are ignored."""
    max_parallel: PositiveInt = 8
    """Largest number of runs at the same time. Fewer run if the cluster has no room."""
    question: str = ""
    """What the ablation asks, printed at the head of the report."""
    notes: list[str] = Field(default=[])
    """Remarks on the setup, printed in the report."""
    limits: list[str] = Field(default=[])
    """What the ablation does not show, printed at the end of the report."""
    out: str
    """Local folder of ablation.json, ablation.md, ablation.svg, contrasts.svg, registered.json and index.html."""

    @model_validator(mode="after")
    def _comparable(self) -> AblationSpec:
        if self.baseline not in self.variants:
            raise ValueError(f"baseline={self.baseline!r} is not one of the variants: {', '.join(self.variants)}")
        if len(set(self.seed_list)) < len(self.seed_list):
            raise ValueError(f"seeds={self.seeds} names one twice")
        for name, weights in self.contrasts.items():
            if unknown := sorted(weights.keys() - self.variants.keys()):
                raise ValueError(f"contrasts.{name} names {unknown[0]!r}, which is none of {', '.join(self.variants)}")
            if abs(math.fsum(weights.values())) > _ROUNDING or not any(weights.values()):
                raise ValueError(f"contrasts.{name}={weights} must have weights other than 0 that add up to 0")
        return self

    @property
    def seed_list(self) -> list[int]:
        """All seeds."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds


def _gpus_of_finetunes(spec: FinetunesSpec, named: Sequence[JobConfig]) -> float:
    """Return what the largest runs use that may run at the same time."""
    runs = sorted((gpus_of(one) for one in named if one.kind == "train"), reverse=True)
    return sum(runs[: spec.max_parallel])


def _always(spec: JobConfig) -> bool:
    return True


def _models_of_soup(spec: SoupSpec) -> dict[str, InputType]:
    """Return the adapters, or the full models. The base of adapters may be anywhere, unless scores need it."""
    is_scored = spec.evaluate or spec.probe
    bases: dict[str, InputType] = {} if spec.base is None else {"base": "checkpoint"}
    if is_scored or next(iter(spec.models.values())).adapter is None:
        return bases | {"models": "checkpoint"}
    return bases | {f"models.{name}.adapter": "adapter" for name in spec.models}


def _nothing_to_choose(spec: SoupsConfig) -> bool:
    return all(soup.method not in ("greedy", "searched") for soup in spec.soups.values())


_SCORES_OF = tuple(
    NoEffect(f"{entry}.set.{name}", _always, "the job sets it")
    for entry in ("evaluate", "probe")
    for name in ("models", "out")
)
_PROBE = (NoEffect("probe", _nothing_to_choose, "no soup is greedy or searched"), *_SCORES_OF)
_RUN_NAME = NoEffect("set.name", _always, "the job names its runs")
_SOUPS = {"out": "{soup}/adapter or {soup}/model, summary"}
FINETUNES = Kind(
    name="finetunes",
    spec=FinetunesSpec,
    run="jobs.sweeps.finetunes:run",
    reads={"stage": "spec of the runs", "evaluate": "spec of the scores", "probe": "spec of the choice"},
    makes=_SOUPS,
    named="jobs.sweeps.finetunes:named",
    gpus=_gpus_of_finetunes,
    no_effect=(*_PROBE, _RUN_NAME, NoEffect("runs.*.name", _always, "the job names its runs")),
)
SOUP = Kind(
    name="soup",
    spec=SoupSpec,
    run="jobs.sweeps.soup:run",
    reads={"models": "adapters or models", "evaluate": "spec of the scores", "probe": "spec of the choice"},
    inputs=_models_of_soup,
    makes=_SOUPS,
    named="jobs.sweeps.soup:named",
    gpus=no_gpus,
    no_effect=_PROBE,
)
ABLATION = Kind(
    name="ablation",
    spec=AblationSpec,
    run="jobs.sweeps.ablation:run",
    reads={"stage": "spec of the runs", "evaluate": "spec of the scores"},
    makes={"out": "ablation.json, .md and .svg"},
    named="jobs.sweeps.ablation:named",
    local="writes its report to a local folder",
    no_effect=(
        *_SCORES_OF[:2],
        _RUN_NAME,
        NoEffect("set.seed", _always, "`seeds` decides"),
        NoEffect("variants.*.name", _always, "the job names its runs"),
        NoEffect("variants.*.seed", _always, "`seeds` decides"),
    ),
)
