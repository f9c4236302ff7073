"""The driver of one training run: check, summarize, train, restart after lost workers.

A run that lost a worker resumes from its last checkpoint. So does the same command given again.
"""

from __future__ import annotations

import tempfile
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError
from ray.train import TrainingFailedError

from jobs.runtime.cluster import user_error
from jobs.runtime.lease import HeldLeases
from jobs.runtime.progress import duration, say
from jobs.runtime.revision import hardware
from jobs.spec.no_effect import unused_settings
from jobs.training.encoder import BACKBONE, encoder_of
from jobs.training.held_out import HeldOutSamples, choose_samples
from jobs.training.runs import FAILED, FAILURE, KIND, STARTS, UNTRACKED, DoneFile, HeldOutSummary, Run, read_done
from jobs.training.specs import TrainSpec
from jobs.training.start import check_backbone, check_lists, data_of, describe_start, plan_of, with_init_adapter
from jobs.training.teacher import Teacher
from jobs.training.tracking import check_tracking
from jobs.training.worker import train_worker
from pipelines.errors import UserError
from pipelines.feed.batch import ResumePoint
from pipelines.feed.reader import Reader
from pipelines.imports import importing_models
from pipelines.plan.plan import Plan
from pipelines.plan.resample import next_mixture_change
from pipelines.redaction import redact_text
from pipelines.storage.publish import is_published, publish_folder
from rzen.config import TinyBackbone

if TYPE_CHECKING:
    from rzen.training.init_adapter import InitAdapter

_MAX_TEXTS = 4000  # of a source; what a tiny tokenizer is trained on


@dataclass(frozen=True)
class Prepared:
    """A run that may start: everything that can be checked before has been checked. Picklable."""

    run: Run
    plan: Plan
    tasks: tuple[str, ...]
    held_out: HeldOutSamples | None
    """What the run is scored on while it trains."""
    teacher: Teacher | None
    """Stored vectors that the run learns from."""


def prepare(spec: TrainSpec, leases: HeldLeases) -> Prepared | None:
    """Check everything that needs no workers, and print what is going to happen. Return None if the run is finished.

    An unfinished run is leased, and `leases` gives it back.
    """
    reader = Reader(spec.data)
    plan = plan_of(spec, reader)
    plan.check_world_size(spec.cluster.workers)
    spec.objective.check_tasks(reader.tasks(plan))
    if spec.objective.distills and not reader.has_teacher_scores():
        fix = "run a job of kind judge, and name its table or one that select made of it"
        raise UserError(f"data.candidates={spec.data.candidates}", "has no teacher's scores for distillation", fix)
    check_lists(spec, reader, plan)
    check_backbone(spec)
    spec, adapter = with_init_adapter(spec)
    check_tracking(spec.run.tracking)
    teacher = Teacher.of(spec)
    warnings = reader.warnings(plan) + (teacher.check(reader, plan) if teacher else [])
    run = Run(spec)
    data = data_of(spec, reader, plan, teacher)
    if run.state(data) is not False:
        leases.hold_output(run.store, KIND, "trains")
    if not run.begin(data):
        say(f"  {run.store.url}: finished before")
        return None
    held_out = choose_samples(spec, plan)
    _summarize(run, plan, adapter, held_out)
    if teacher is not None:
        say(f"    {teacher.describe()}", "dim")
    for text in warnings:
        say(f"    {text}", "yellow")
    return Prepared(run, plan, reader.tasks(plan), held_out, teacher)


def build_backbone(prepared: Prepared) -> None:
    """Publish the tiny backbone that the spec asks for, unless it exists or the spec names another backbone.

    Its tokenizer is trained on the captions and instructions of the data.
    """
    run, config = prepared.run, prepared.run.spec.model.backbone
    if not isinstance(config, TinyBackbone) or is_published(run.store.child(BACKBONE)):
        return
    reader = Reader(run.spec.data)
    with importing_models():
        from rzen.export.export import write_identity
        from rzen.model.backbone import build_tiny

    texts = []
    for source, size in reader.sizes().items():
        for sample, _ in reader.raw(source, range(min(size, _MAX_TEXTS))):
            texts += [sample.query.text, sample.positive.text, sample.instruction, sample.target_instruction]
    with tempfile.TemporaryDirectory(prefix="rzen-backbone-") as scratch:
        build_tiny(Path(scratch), config, [text for text in texts if text])
        write_identity(Path(scratch), run.spec.identity, "float32", {"base": "random weights"})
        publish_folder(Path(scratch), run.store.child(BACKBONE))


def _summarize(run: Run, plan: Plan, adapter: InitAdapter | None, held_out: HeldOutSamples | None) -> None:
    spec = run.spec
    per_worker = spec.global_batch // spec.cluster.workers
    shares = f"{spec.cluster.workers} x {per_worker}" if spec.cluster.workers > 1 else "1 worker"
    say(f"  {spec.name}: {plan.num_steps:,} steps of {spec.global_batch} pairs ({shares})")
    for line in plan.summary():
        say(f"    {line}", "dim")
    describe_start(spec, adapter)
    for text in _unused_by_length(spec, plan.num_steps):
        say(f"    {text}", "yellow")
    if spec.data.candidates is not None:
        say(
            f"    up to {spec.data.negatives_per_sample} negatives a sample, candidates of {spec.data.candidates}",
            "dim",
        )
    if held_out is not None:
        say(f"    scored on {held_out}", "dim")
    elif spec.eval is not None:
        say(f"    not scored while it trains: {spec.data.root} holds out no samples of these sources", "dim")
    say(f"    {run.store.url}, checkpoint every {spec.checkpoint.every_steps} steps", "dim")
    if step := run.step():
        say(f"    resumes from step {step}")


def _unused_by_length(spec: TrainSpec, num_steps: int) -> list[str]:
    """Return the settings without effect that only the length of the run shows, if it comes from `epochs`."""
    before = {str(found) for found in unused_settings(spec)}
    known = unused_settings(spec.model_copy(update={"steps": num_steps})) if spec.steps is None else []
    return [str(found) for found in known if found.key != ("epochs",) and str(found) not in before]


def fit(prepared: Prepared, board: Any, set_state: Callable[[str, str], None], abandoned: Event) -> None:
    """Train one run to its end. Raises `UserError` for everything that stops it permanently.

    Workers post their progress to the actor `board`. `set_state(name, state)` is called when they restart.
    """
    run = prepared.run
    workers = run.spec.cluster.workers
    run.log(f"{STARTS} {run.step()} of {prepared.plan.num_steps}, {workers} workers; {hardware()}")
    try:
        _fit(prepared, board, set_state, abandoned)
    except UserError as error:
        run.log(f"{FAILED}: {error}")
        raise
    run.log("finished")


def _fit(prepared: Prepared, board: Any, set_state: Callable[[str, str], None], abandoned: Event) -> None:
    run, spec = prepared.run, prepared.run.spec
    restarts = 0
    while True:
        point = run.resume_point()
        prepared = _with_phases(prepared, point)
        stop = _stop(prepared, point)
        try:
            workers = "1 worker" if spec.cluster.workers == 1 else f"{spec.cluster.workers} workers"
            say(f"  {spec.name}: starting {workers}, which takes about half a minute", "dim")
            _trainer(prepared, stop, board).fit()
            if stop == prepared.plan.num_steps:
                if run.store.exists(UNTRACKED):
                    report(run, run.store.read(UNTRACKED).decode().strip(), "yellow")
                done = read_done(run.store)
                report(run, _seen(done))
                if done.get("held_out"):
                    report(run, _scores(done["held_out"]))
                return
            continue
        except (TrainingFailedError, RayError) as error:
            if cause := user_error(error):
                raise cause from None
            if abandoned.is_set():  # interrupted, or another run has failed: nothing waits for this one
                raise
            run.store.write(FAILURE, redact_text("".join(traceback.format_exception(error))).encode())
            if restarts == spec.cluster.max_restarts:
                problem = f"failed {restarts + 1} times, last with {_first_failure(error)}"
                raise UserError(run.store.url, problem, f"{FAILURE} there holds the traceback") from None
            restarts += 1
            again = f"restart {restarts} of {spec.cluster.max_restarts}"
            lost = f"lost a worker ({_first_failure(error)}; {run.store.url}/{FAILURE})"
        report(run, f"{lost}; {again} from step {run.step()}", "yellow")
        set_state(spec.name, again)


def report(run: Run, event: str, style: str = "") -> None:
    """Print an event and write it to the run's log."""
    say(f"  {run.spec.name}: {event}", style)
    run.log(event)


def _seen(done: DoneFile) -> str:
    """Return what a finished run was trained on."""
    parts = [
        f"{name} {counts['samples']:,.0f} samples ({counts['epochs']:.2f} epochs"
        + (f", {counts['skipped']:,.0f} skipped)" if counts["skipped"] else ")")
        for name, counts in done["sources"].items()
    ]
    replaced = f"; {done['replaced']:,} bad samples were replaced by others" if done["replaced"] else ""
    return f"trained on {', '.join(parts)}{replaced}"


def _scores(rows: Sequence[HeldOutSummary]) -> str:
    """Return how the held-out scores went, and what they took."""
    first, last = rows[0], rows[-1]
    sources = ", ".join(f"{name} {hit:.1%}" for name, hit in last["sources"].items())
    took = duration(sum(row["seconds"] for row in rows))
    change = f"{last['hit']:.1%} ({sources}), {first['hit']:.1%} after {first['step']} steps"
    return f"held-out hit@1 {change}; {len(rows)} scores took {took}"


def _with_phases(prepared: Prepared, point: ResumePoint) -> Prepared:
    """Return the run with all changes of the mixture in its plan. A change that is due is recorded first."""
    run, resample = prepared.run, prepared.run.spec.data.mixture.resample
    if resample is None:
        return prepared
    recorded = run.phases()
    plan = prepared.plan
    for phase in recorded:
        if phase.first_step not in plan.phase_starts:
            plan = plan.with_mixture_phase(phase)
    if due := next_mixture_change(plan, run.rows(point), point.step, resample):
        run.record(due)
        plan = plan.with_mixture_phase(due)
        total = sum(due.weights.values())
        shares = ", ".join(f"{name} {weight / total:.1%}" for name, weight in due.weights.items())
        report(run, f"from step {due.first_step} on {shares}")
    return replace(prepared, plan=plan)


def _stop(prepared: Prepared, point: ResumePoint) -> int:
    """Return the step where the workers stop: before the mixture changes, or at the end."""
    resample = prepared.run.spec.data.mixture.resample
    if resample is None:
        return prepared.plan.num_steps
    return min(prepared.plan.num_steps, (point.step // resample.every_steps + 1) * resample.every_steps)


def _trainer(prepared: Prepared, stop: int, board: Any) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from jobs.training.process_group import Rendezvous
    from pipelines.feed.feed import PlannedFeed

    run, spec = prepared.run, prepared.run.spec
    cluster = spec.cluster
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    reader = Reader(spec.data, encoder_of(run, prepared.teacher))
    feed = PlannedFeed(prepared.plan.until(stop), reader, run.resume_point, spec.feed)
    filesystem, path = run.store.child("ray").arrow_filesystem()
    return DataParallelTrainer(
        train_worker,
        train_loop_config={"prepared": prepared, "stop": stop, "board": board},
        scaling_config=ScalingConfig(
            num_workers=cluster.workers, use_gpu=cluster.gpus_per_worker > 0, resources_per_worker=resources
        ),
        backend_config=Rendezvous(),
        # rzen restarts runs: Ray would also repeat errors that no repetition can fix. A new name, because Ray resumes
        # runs of the same name by itself.
        run_config=RunConfig(
            name=f"{spec.name}-{uuid.uuid4().hex[:8]}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=0),
        ),
        **feed.trainer_arguments(),
    )


def _first_failure(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", {})
    return str(next(iter(failures.values()), error)).strip().splitlines()[-1].strip().partition(". ")[0][:200]
