"""What a training run will need: steps, memory of a worker, hours, and every mistake that shows before Ray starts.

It reads the manifest and a few samples of the data, and the `config.json` of the backbone. Nothing is written.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from jobs.spec.job import JobConfig
from jobs.training.memory import GIB, forecast_memory, memory_limit, read_backbone_config
from jobs.training.runs import METRICS, SPEC, Run, read_rows, read_spec
from jobs.training.specs import TrainSpec
from jobs.training.start import check_backbone, check_lists, data_of, plan_of, with_init_adapter
from jobs.training.teacher import Teacher
from jobs.training.tracking import check_tracking
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.plan.plan import Plan
from pipelines.storage.location import exists, open_store
from rzen.config import ObjectiveConfig, prompt_setting

_NOT_COUNTED = 3  # first steps of a run, which are slower


@dataclass(frozen=True)
class SourceForecast:
    """How much of a source a run will see."""

    samples: int
    steps: float
    epochs: float


@dataclass
class RunForecast:
    """What a training run will need. None: unknown, because of a mistake or of data that do not exist yet."""

    name: str
    workers: int
    global_batch: int
    chunk_tokens: int | Literal["auto"] | None
    """With `auto` and a limit of memory, what fits is put here."""
    steps: int | None = None
    samples: int | None = None
    """Pairs that the whole run trains on."""
    sources: dict[str, SourceForecast] = field(default_factory=dict)
    memory_bytes: dict[str, int] | None = None
    """Bytes of a worker by part, and `total`."""
    largest_input_tokens: int | None = None
    hours: float | None = None
    mistakes: list[str] = field(default_factory=list)
    to_come: dict[str, str] = field(default_factory=dict)
    """Setting -> what does not exist yet, because an earlier job makes it."""


@dataclass(frozen=True)
class Rate:
    """Pairs of all workers per second, given or measured on `workers` workers."""

    samples_per_s: float
    workers: int | None = None

    def hours(self, spec: TrainSpec, samples: int) -> float:
        """Return the hours of a run. A measured rate counts for each worker."""
        scale = 1.0 if self.workers is None else spec.cluster.workers / self.workers
        return samples / (self.samples_per_s * scale) / 3600


def measured_rate(url: str) -> Rate:
    """Return the rate of a run from its records: the median of its steps. Raises `UserError` for a folder without."""
    store = open_store(url)
    if not store.exists(SPEC):
        raise UserError(url, "is not the folder of a run", "`rzen runs FOLDER` lists the runs below a folder")
    rows = read_rows(store, METRICS)[_NOT_COUNTED:] if store.exists(METRICS) else []
    rates = [float(row["samples_per_s"]) for row in rows if row.get("samples_per_s")]
    if not rates:
        raise UserError(url, f"has no rate: fewer than {_NOT_COUNTED + 1} steps", "name a run that has trained longer")
    return Rate(statistics.median(rates), read_spec(store)["spec"]["cluster"]["workers"])


class Made:
    """What the jobs before one make: it may be absent when the job is planned."""

    def __init__(self) -> None:
        self._makers: dict[str, JobConfig] = {}  # path or URL -> who writes there

    def add(self, place: str, maker: JobConfig) -> None:
        """Add an output."""
        self._makers[place] = maker

    def maker(self, place: str) -> JobConfig | None:
        """Return the job that writes a place, or a folder around it."""
        found = (job for made, job in self._makers.items() if place == made or place.startswith(f"{made}/"))
        return next(found, None)

    def is_to_come(self, place: str, endpoint: str | None) -> bool:
        """Return whether a place does not exist, but an earlier job makes it."""
        return self.maker(place) is not None and not exists(place, endpoint)


class Forecaster:
    """Finds out what one run will need, after the jobs that have `made` what it reads."""

    def __init__(self, spec: TrainSpec, made: Made) -> None:
        self._spec = spec
        self._made = made
        self._reader = Reader(spec.data)
        self._teacher: Teacher | None = None
        self.found = RunForecast(
            spec.name, spec.cluster.workers, spec.global_batch, spec.cluster.chunk_tokens, spec.steps
        )

    def forecast(self, rate: Rate | None, memory_limit_bytes: int | None) -> RunForecast:
        """Return what the run will need, and all mistakes in it."""
        found, spec = self.found, self._spec
        plan = None
        with self._collected():
            plan = self._plan()
        if found.steps is not None:
            found.samples = round(self._samples(plan, found.steps))
            found.hours = rate.hours(spec, found.samples) if rate else None
        with self._collected():
            check_tracking(spec.run.tracking)
        with self._collected():
            self._check_teacher(plan)
        with self._collected():
            self._read_init_adapter()
        with self._collected():
            self._memory(plan, memory_limit_bytes)
        if plan is not None and not found.mistakes and not found.to_come:
            with self._collected():
                self._compare_with_earlier_run(plan)
        return found

    def _compare_with_earlier_run(self, plan: Plan) -> None:
        run = Run(self._spec)
        if run.store.exists(SPEC):  # otherwise the weights need not be read
            run.state(data_of(self._spec, self._reader, plan, self._teacher))

    @contextmanager
    def _collected(self) -> Iterator[None]:
        """Add the mistake that ends the block to the forecast, once."""
        try:
            yield
        except UserError as error:
            if str(error) not in self.found.mistakes:
                self.found.mistakes.append(str(error))

    def _is_to_come(self, setting: str, place: str, endpoint: str | None) -> bool:
        """Return whether an earlier job makes what does not exist yet, and note it."""
        if is_to_come := self._made.is_to_come(place, endpoint):
            self.found.to_come[setting] = place
        return is_to_come

    def _plan(self) -> Plan | None:
        found, spec = self.found, self._spec
        read = {"data.root": spec.data.root, "data.candidates": spec.data.candidates}
        read |= {f"data.curation.{number}": table for number, table in enumerate(spec.data.curation)}
        to_come = [self._is_to_come(setting, place, spec.data.endpoint) for setting, place in read.items() if place]
        if any(to_come):
            return None
        plan = plan_of(spec, self._reader)
        found.steps = plan.num_steps
        for source, steps in zip(plan.sources, plan.steps_of_sources(), strict=True):
            epochs = steps * source.step_samples / source.num_samples
            found.sources[source.name] = SourceForecast(source.num_samples, steps, epochs)
        plan.check_world_size(spec.cluster.workers)
        check_lists(spec, self._reader, plan)
        return plan

    def _samples(self, plan: Plan | None, num_steps: int) -> float:
        if plan is None:
            return num_steps * self._spec.global_batch
        steps_of = zip(plan.sources, plan.steps_of_sources(), strict=True)
        return sum(steps * source.step_samples for source, steps in steps_of)

    def _read_init_adapter(self) -> None:
        adapter = self._spec.init_adapter
        if adapter is not None and not self._is_to_come("init_adapter", adapter, self._spec.run.endpoint):
            self._spec, _ = with_init_adapter(self._spec)

    def _check_teacher(self, plan: Plan | None) -> None:
        vectors = self._spec.data.teacher_vectors
        if vectors is not None and self._is_to_come("data.teacher_vectors", vectors, self._spec.data.endpoint):
            return
        if plan is not None and (teacher := Teacher.of(self._spec)):
            teacher.check(self._reader, plan)
            self._teacher = teacher

    def _memory(self, plan: Plan | None, limit_bytes: int | None) -> None:
        from rzen.objective.loss import Objective

        found, spec = self.found, self._spec
        backbone = spec.model.backbone
        while isinstance(backbone, str) and self._is_to_come("model.backbone", backbone, spec.run.endpoint):
            maker = self._made.maker(backbone)
            if not isinstance(maker, TrainSpec):
                return
            backbone = maker.model.backbone  # what it trains has the same shape
        spec = spec.model_copy(update={"model": spec.model.model_copy(update={"backbone": backbone})})
        check_backbone(spec)
        config = read_backbone_config(spec)
        if isinstance(spec.objective, ObjectiveConfig):
            Objective(spec.objective, ["any"]).widths(config.get_text_config().hidden_size)
        limit_bytes = limit_bytes or memory_limit(spec)
        memory = forecast_memory(spec, config, self._reader, plan, limit_bytes)
        found.memory_bytes, found.largest_input_tokens = memory.worker.as_json(), memory.largest_input_tokens
        found.chunk_tokens = memory.chunk_tokens
        if limit_bytes is not None and memory.worker.total > limit_bytes:
            problem = f"a worker needs {memory.worker.total / GIB:.1f} GiB, more than {limit_bytes / GIB:.1f} GiB"
            visual_tokens = f"{prompt_setting(spec.objective)}.max_visual_tokens"
            fix = f"lower cluster.chunk_tokens or {visual_tokens}, or set model.gradient_checkpointing"
            raise UserError(spec.name, problem, fix)
