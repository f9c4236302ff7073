"""What a job of any kind will need: its training runs one by one, and files that are missing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from jobs.runtime.dispatch import named_specs
from jobs.spec.job import JobConfig
from jobs.spec.kinds import find_kind
from jobs.spec.load import Document
from jobs.training.forecast import Forecaster, Made, Rate, RunForecast
from jobs.training.specs import TrainSpec
from jobs.workflows.pipeline import resolve_jobs
from jobs.workflows.specs import PipelineSpec
from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.storage.location import exists
from rzen.model.checkpoints import HUB_NAME

_CHECKED_BY_OTHERS = frozenset({"stage", "evaluate", "corpus", "probe", "jobs"})  # specs, which are read before
# A first model makes the registry, `rzen index` reads the sources, and pools and rules may name datasets.
_PLACES = ("base", "adapter")  # of a model; its other settings are names and numbers
_MAY_BE_ABSENT = frozenset({"registry", "sources", "pools", "rules"})


@dataclass(frozen=True)
class JobForecast:
    """What one job will need."""

    runs: list[RunForecast]
    mistakes: list[str]
    """Those of the job itself. Each run has its own."""
    to_come: list[str]
    """What does not exist yet, because an earlier job makes it."""


def forecast(
    spec: JobConfig, document: Document, rate: Rate | None = None, memory_limit_bytes: int | None = None
) -> JobForecast:
    """Return what a job will need. A pipeline needs what all its jobs need.

    An output of an earlier job of the pipeline may be absent. Raises `UserError` for specs that are no specs.
    """
    jobs = resolve_jobs(spec, document).values() if isinstance(spec, PipelineSpec) else [(spec, document)]
    found, made = JobForecast([], [], []), Made()
    for job, source in jobs:
        trained = [one for one in (job, *named_specs(job, source)) if isinstance(one, TrainSpec)]
        found.runs.extend(Forecaster(run, made).forecast(rate, memory_limit_bytes) for run in trained)
        if not isinstance(job, TrainSpec):
            _check_files(job, made, found)
        for one in (job, *trained):
            for place in _outputs(one):
                made.add(place, one)
    return found


def _outputs(spec: JobConfig) -> Iterator[str]:
    if isinstance(spec, TrainSpec):
        yield f"{spec.run.root}/{spec.name}"
        return
    for key in find_kind(spec.kind).makes:
        yield from _places(_value(spec, key))


def _check_files(spec: JobConfig, made: Made, found: JobForecast) -> None:
    """Add what a job reads and is missing, apart from what its training runs read."""
    for key in find_kind(spec.kind).reads:
        if key in _CHECKED_BY_OTHERS | _MAY_BE_ABSENT:
            continue
        value = _value(spec, key)
        data = value if isinstance(value, DataConfig) else None
        endpoint = data.endpoint if data else getattr(spec, "endpoint", None)
        for place in dict.fromkeys([data.root] if data else _places(value)):
            try:
                if made.is_to_come(place, endpoint):
                    found.to_come.append(place)
                elif data:
                    _check_data(data)
                elif not _is_hub_name(key, place) and not exists(place, endpoint):
                    raise UserError(f"{key} {place}", "does not exist", "check the path, or run the job that makes it")
            except UserError as error:
                found.mistakes.append(f"{spec.kind}: {error}")


def _check_data(data: DataConfig) -> None:
    if not any(Reader(data).sizes().values()):
        fix = "ingest with held_out_fraction above 0, or name another split"
        raise UserError(f"{data.root} {data.split}", "has no samples", fix)


def _is_hub_name(key: str, place: str) -> bool:
    return (
        key in ("model", "models", "rerank.model")
        and bool(HUB_NAME.fullmatch(place))
        and not Path(place.split("/")[0]).is_dir()
    )


def _value(spec: Any, key: str) -> Any:
    """Return a setting by its dotted key. None where a part of the spec is not there."""
    for part in key.split("."):
        spec = getattr(spec, part, None)
    return spec


def _places(value: Any) -> Iterator[str]:
    """Yield the paths and URLs in a setting: itself, the values of a mapping, or base and adapter of a model."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _places(inner)
    elif isinstance(value, BaseModel):
        yield from (inner for name in _PLACES if isinstance(inner := getattr(value, name, None), str))
