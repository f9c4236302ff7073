"""Train several runs at once: as many as the cluster has room for, the others in a queue."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from threading import Event, Thread
from typing import Any

from jobs.runtime.cluster import POLL_S, Resources, check_size, has_room, metrics_link, ray_cluster, user_error
from jobs.runtime.lease import HeldLeases
from jobs.runtime.progress import ProgressTracker, RunTable, say
from jobs.runtime.warm import warm_up
from jobs.training.fit import Prepared, build_backbone, fit, prepare, report
from jobs.training.page import RunPage, RunPages
from jobs.training.runs import DONE, PAGE, Run
from jobs.training.specs import TrainSpec
from pipelines.errors import UserError
from pipelines.storage.faults import brief_patience

SAVE_S = 30  # at most, for a last checkpoint


def launch(
    specs: Sequence[TrainSpec],
    max_parallel: int,
    min_survivors: int | None = None,
    failed_before: Mapping[str, str] | None = None,
    write_overview: Callable[[], None] | None = None,
) -> dict[str, UserError]:
    """Train all runs in their order, at most `max_parallel` at once and no more than the cluster has room for.

    Finished runs stay as they are. So do those of `failed_before` (name -> id of the run), unless they restarted from
    scratch. `write_overview` writes a page of all runs: while they go on, and when one ends. Returns what failed in
    this launch, and why.

    Raises `UserError` as soon as fewer than `min_survivors` runs can succeed (by default all of `specs` must). Runs
    that are then under way are abandoned. They resume from their last checkpoints at the next launch. The same happens
    when another process has taken the lease of a run.
    """
    with HeldLeases() as leases:
        unfinished = [prepared for spec in specs if (prepared := prepare(spec, leases))]
        return _launch(specs, unfinished, leases, max_parallel, min_survivors, failed_before or {}, write_overview)


def _launch(
    specs: Sequence[TrainSpec],
    unfinished: list[Prepared],
    leases: HeldLeases,
    max_parallel: int,
    min_survivors: int | None,
    failed_before: Mapping[str, str],
    write_overview: Callable[[], None] | None,
) -> dict[str, UserError]:
    given_up = [prepared for prepared in unfinished if _is_known(prepared.run, failed_before)]
    unfinished = [prepared for prepared in unfinished if prepared not in given_up]
    may_fail = 0 if min_survivors is None else len(specs) - len(given_up) - min_survivors
    if may_fail < 0:
        names = ", ".join(prepared.run.spec.name for prepared in given_up)
        problem = f"failed permanently in an earlier launch: at least {min_survivors} runs must succeed"
        raise UserError(names, problem, "set retry_failed: true to train them again")
    if not unfinished:
        return {}
    import ray

    backbones = _in_thread(_build_backbones, unfinished)  # it needs as long as Ray
    with ray_cluster():
        warm_up("pipelines.feed.feed", "jobs.training.encoder")
        for spec in (prepared.run.spec for prepared in unfinished):
            if not spec.cluster.autoscaling:
                each = Resources(spec.cluster.cpus_per_worker, spec.cluster.gpus_per_worker)
                check_size("workers", spec.cluster.workers, each, spec.feed)
        if link := metrics_link([prepared.run.spec.name for prepared in unfinished]):
            say(f"  metrics  {link}", "dim")
        with ExitStack() as stack:
            table = stack.enter_context(RunTable([prepared.run.spec.name for prepared in unfinished]))
            of_runs = {prepared.run.spec.name: _page(prepared) for prepared in unfinished}
            pages = stack.enter_context(RunPages(of_runs, write_overview))
            abandoned = Event()
            stack.callback(abandoned.set)
            board = ray.remote(num_cpus=0)(ProgressTracker).remote()
            backbones.result()
            try:
                failures = _run_queue(unfinished, leases, max_parallel, may_fail, table, pages, board, abandoned)
            except KeyboardInterrupt:
                with brief_patience():
                    _save(unfinished, board)
                raise
    _say_places([prepared.run for prepared in unfinished])
    return failures


def _build_backbones(unfinished: Sequence[Prepared]) -> None:
    for prepared in unfinished:
        build_backbone(prepared)


def _say_places(runs: Sequence[Run]) -> None:
    """Print where the pages of the runs are, and the command that shows their metrics."""
    for run in runs:
        say(f"  page         {run.store.url}/{PAGE}", "dim")
    folders = {run.store.url for run in runs} if len(runs) == 1 else {run.spec.run.root for run in runs}
    if any(run.spec.run.tracking.tensorboard for run in runs):
        for folder in sorted(folders):
            say(f"  tensorboard  tensorboard --logdir {folder}    (pip install 'rzen[tensorboard]')", "dim")


def _save(runs: Sequence[Prepared], board: Any) -> None:
    """Wait up to `SAVE_S` for a checkpoint of every run that has made steps since its last one."""
    import ray

    news = ray.get(board.progress.remote())
    done = {prepared.run: news[name].done for prepared in runs if (name := prepared.run.spec.name) in news}
    ray.get(board.stop.remote())
    say("  saving; the same command resumes from there", "yellow")
    deadline_s = time.monotonic() + SAVE_S
    try:
        while any(not run.store.exists(DONE) and run.step() < step for run, step in done.items()):
            if time.monotonic() > deadline_s:
                say(f"  not saved within {SAVE_S} s", "yellow")
                return
            time.sleep(POLL_S)
    except UserError as error:
        say(f"  not saved: {error}", "yellow")


def _is_known(run: Run, failed_before: Mapping[str, str]) -> bool:
    return failed_before.get(run.spec.name) == run.id


def _run_queue(
    unfinished: Sequence[Prepared],
    leases: HeldLeases,
    max_parallel: int,
    may_fail: int,
    table: RunTable,
    pages: RunPages,
    board: Any,
    abandoned: Event,
) -> dict[str, UserError]:
    import ray
    from ray.util.metrics import Gauge

    gauge = Gauge("rzen_runs", "Training runs of this job that are in a state", ("state",))
    waiting = deque(unfinished)
    running: dict[str, Prepared] = {}
    futures: dict[str, Future[None]] = {}
    failures: dict[str, UserError] = {}
    while waiting or running:
        leases.check_not_taken()
        while waiting and len(running) < max_parallel and _fits(running, waiting[0]):
            prepared = waiting.popleft()
            name = prepared.run.spec.name
            table.set_state(name, "starting")
            running[name] = prepared
            futures[name] = _in_thread(fit, prepared, board, table.set_state, abandoned)
        done, _ = wait(futures.values(), timeout=POLL_S, return_when=FIRST_COMPLETED)
        for name, text in ray.get(board.take_notes.remote()):
            if name in running:
                # The log is in the store, which may be what does not answer.
                _in_thread(report, running[name].run, text, "yellow")
        for name, news in ray.get(board.progress.remote()).items():
            if name in running:
                table.update(name, news, running[name].run.spec.run.log_every_steps)
        pages.refresh(running)
        for name in [name for name, future in futures.items() if future in done]:
            del running[name]
            if (error := futures.pop(name).exception()) is None:
                table.set_state(name, "finished")
                pages.finish(name, "finished")
                continue
            cause = user_error(error)
            if cause is None:
                raise error
            failures[name] = cause
            table.set_state(name, "failed", cause.problem)
            pages.finish(name, "failed")
            if len(failures) > may_fail:
                raise _too_few(failures, len(unfinished))
        for state, count in table.states().items():
            gauge.set(count, {"state": state})
    return failures


def _page(prepared: Prepared) -> RunPage:
    return RunPage(prepared.run, prepared.plan.members, prepared.held_out)


def _fits(running: Mapping[str, Prepared], another: Prepared) -> bool:
    spec = another.run.spec
    return has_room([prepared.run.spec.cluster for prepared in running.values()], spec.cluster, spec.feed)


def _too_few(failures: dict[str, UserError], count: int) -> UserError:
    if count == 1:
        return next(iter(failures.values()))
    first, *others = failures.items()
    also = f"; so did {', '.join(name for name, _ in others)}" if others else ""
    name, cause = first
    problem = f"failed permanently: {cause.place}: {cause.problem}{also}"
    return UserError(name, problem, f"{cause.fix}; the same command trains the remaining runs")


def _in_thread(function: Callable[..., None], *arguments: Any) -> Future[None]:
    """Run a function in a thread, as an executor's `submit`. The program does not wait for the thread when it ends."""
    future: Future[None] = Future()

    def work() -> None:
        try:
            function(*arguments)
            future.set_result(None)
        except BaseException as error:  # noqa: BLE001  handed to whoever waits
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future
