"""The Ray tasks of an ingest job: a task plans a group, and a task writes each of its blocks.

Blocks go from task to task through Ray's object store. The job sees plans and results only. A group is planned when few
blocks wait, so that the object store holds little.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import ray

from pipelines.errors import UserError
from pipelines.ingest.markers import Plan, WrittenBlock
from pipelines.ingest.planning import BlockWork, GroupWork, TableWork
from pipelines.ingest.settings import IngestSettings
from pipelines.ingest.tasks import cancel, without_raising
from pipelines.ingest.writing import write_block

_SUBMITTED_PER_CPU = 2  # blocks whose tasks wait in Ray: enough that no CPU waits for the job


def run(works: Sequence[GroupWork], settings: IngestSettings) -> Iterator[tuple[int, Plan | WrittenBlock]]:
    """Yield plans and written blocks as they finish, with the place of their group. Raises a task's `UserError`."""
    tasks = _Tasks(works, settings)
    try:
        yield from tasks.results()
    finally:
        tasks.cancel()


class _Tasks:
    """The tasks of a job that run, and the blocks that wait."""

    def __init__(self, works: Sequence[GroupWork], settings: IngestSettings) -> None:
        self._settings = settings
        self._shared = ray.put(settings) if works else None
        self._planner = ray.remote(num_cpus=1, num_returns="streaming")(_plan)
        self._writer = ray.remote(num_cpus=1)(_write)
        self._waiting = deque(enumerate(works))
        self._planning: dict[Any, int] = {}  # generators of blocks -> place of their group
        self._planned: set[int] = set()
        self._blocks: deque[tuple[int, Any]] = deque()  # works, or references of works
        self._running: dict[Any, int] = {}

    def results(self) -> Iterator[tuple[int, Plan | WrittenBlock]]:
        """Yield what tasks return, as they finish."""
        while True:
            self._submit()
            if not self._planning and not self._running:
                return
            (ready, *_), _ = ray.wait([*self._running, *self._planning])
            if ready in self._planning:
                yield from self._next_of_plan(ready)
            else:
                yield self._running.pop(ready), _value(ray.get(ready))

    def _submit(self) -> None:
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1.0)))  # the cluster may grow
        while self._waiting and len(self._blocks) < cpus and len(self._planning) < max(1, cpus // 2):
            place, work = self._waiting.popleft()
            if isinstance(work, TableWork):
                self._planning[self._planner.remote(work, self._shared)] = place
            else:
                self._blocks += [(place, block) for block in work.blocks]
        while self._blocks and len(self._running) < _SUBMITTED_PER_CPU * cpus:
            place, block = self._blocks.popleft()
            self._running[self._writer.remote(block, self._shared)] = place

    def _next_of_plan(self, generator: Any) -> Iterator[tuple[int, Plan]]:
        """Take the next item of a planner: its plan first, then references of blocks."""
        place = self._planning[generator]
        try:
            reference = next(generator)
        except StopIteration:
            del self._planning[generator]
            return
        if place not in self._planned:
            self._planned.add(place)
            yield place, _value(ray.get(reference))
        else:
            self._blocks.append((place, reference))

    def cancel(self) -> None:
        """End the tasks that still run."""
        cancel([*self._planning, *self._running])


def _value(result: Any) -> Any:
    if isinstance(result, UserError):
        raise result
    return result


def _plan(work: TableWork, settings: IngestSettings) -> Iterator[Plan | BlockWork | UserError]:
    """Yield a `UserError` as a value: if raised, Ray would wrap it, retry the task and log tracebacks."""
    try:
        yield from work.plan(settings)
    except UserError as error:
        yield error


def _write(work: BlockWork | UserError, settings: IngestSettings) -> WrittenBlock | UserError:
    """Return a `UserError` as a value, also that of the planner."""
    return work if isinstance(work, UserError) else without_raising(partial(write_block, settings=settings), work)
