"""Many jobs as Ray tasks, with as many submitted at a time as the cluster can use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import ray

from pipelines.errors import UserError

_TASKS_PER_CPU = 4  # submitted at a time: a dataset may have a million shards
_END_S = 60.0  # a task that does not end is in the middle of a file
Job = TypeVar("Job")
Result = TypeVar("Result")


def run_tasks(task: Callable[[Job], Result], jobs: Sequence[Job], cpus_per_task: float) -> Iterator[tuple[int, Result]]:
    """Yield what `task` returns for each job as soon as it is there, with the position of the job.

    Raises the first `UserError` of a task. The others are then cancelled, and have ended.
    """
    remote = ray.remote(num_cpus=cpus_per_task)(without_raising)
    waiting = iter(enumerate(jobs))
    running: dict[ray.ObjectRef, int] = {}
    try:
        while True:
            most = max(1, int(ray.cluster_resources().get("CPU", 1.0) * _TASKS_PER_CPU))  # the cluster may grow
            while len(running) < most and (following := next(waiting, None)):
                number, job = following
                running[remote.remote(task, job)] = number
            if not running:
                return
            (ready, *_), _ = ray.wait([*running])
            outcome = ray.get(ready)
            if isinstance(outcome, UserError):
                raise outcome
            yield running.pop(ready), outcome
    finally:
        cancel(running)


def cancel(references: Iterable[Any]) -> None:
    """Cancel tasks and generators, and wait for them. None may write to an output that its job has left."""
    references = [*references]
    for reference in references:
        ray.cancel(reference)
    ends = [one.completed() if isinstance(one, ray.ObjectRefGenerator) else one for one in references]
    if ends:
        ray.wait(ends, num_returns=len(ends), timeout=_END_S, fetch_local=False)


def without_raising(task: Callable[[Job], Result], job: Job) -> Result | UserError:
    """Return a `UserError` as a value: if raised, Ray would wrap it, retry the task and log tracebacks."""
    try:
        return task(job)
    except UserError as error:
        return error
