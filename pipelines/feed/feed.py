"""The plan on Ray Data: the CPUs of the cluster make batches ahead of the training workers, in order.

    schedule   one row, and one block, for each task: (rank, first step, number of steps)
    task       row -> the rank's `FeedBatch`es of these steps: a pickle, and their arrays without a copy
    split      rows go to the ranks in turn: r0 steps 0-3, r1 steps 0-3, r0 steps 4-7, ...

No task changes the number of rows, so that `streaming_split` deals them round robin. Tests check this, because Ray does
not document it.
"""

from __future__ import annotations

import ctypes
import pickle
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing, suppress
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import ray.train
from ray import cloudpickle
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)
from ray.data.block import BlockMetadata

from pipelines.config import FeedConfig
from pipelines.errors import UserError
from pipelines.feed.batch import FeedBatch, ResumePoint
from pipelines.feed.pacing import FewRowsAhead, PacedRounds
from pipelines.feed.reader import Reader
from pipelines.media.cache import PixelCache, cache_folder, own
from pipelines.plan.plan import Plan

SHARD, RESUME = "train", "resume"
"""What a worker asks Ray Train for: its iterator, and where it starts."""
_MIN_SAMPLES = 1000  # before a share of bad ones means anything
_NUM_REASONS = 3
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class PlannedFeed(ray.train.DataConfig):  # type: ignore[misc]
    """Makes the batches of `plan` for each group of workers, from step `start()` on.

    Ray Train makes a copy of this object for each group of workers that it starts. The copy calls `start` once, and its
    workers get the answer as the shard `RESUME`: a checkpoint that appears later cannot lead the feed and the workers
    to different steps. `start` and the reader must pickle.
    """

    def __init__(self, plan: Plan, reader: Reader, start: Callable[[], ResumePoint], config: FeedConfig) -> None:
        super().__init__()
        self._plan = plan
        self._reader = reader
        self._start = start
        self._point: ResumePoint | None = None
        self._config = config
        self._cache_folder: Path | None = None
        if config.cache is not None:
            context = ray.get_runtime_context()
            job = f"{context.get_session_name()}-{context.get_job_id()}"
            self._cache_folder = cache_folder(config.cache.folder, job)
            own(self._cache_folder)

    def trainer_arguments(self) -> dict[str, object]:
        """Return `datasets` and `dataset_config` for a Ray trainer. Datasets are names that `configure` replaces."""
        return {"datasets": dict.fromkeys((SHARD, RESUME), ray.data.range(1)), "dataset_config": self}

    def configure(self, datasets: Iterable[str], world_size: int, *_: object, **__: object) -> list[dict[str, Any]]:
        """Return what each worker gets under the names that it asks for, for Ray Train.

        `RESUME` is the `ResumePoint`, every other name the worker's iterator. Raises `UserError` if a batch cannot be
        shared evenly.
        """
        self._plan.check_world_size(world_size)
        found: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name in datasets:
            answers = [self.resume_point()] * world_size if name == RESUME else self.shards(world_size)
            for mine, answer in zip(found, answers, strict=True):
                mine[name] = answer
        return found

    def resume_point(self) -> ResumePoint:
        """Return where this group of workers starts: the first answer of `start`."""
        if self._point is None:
            self._point = self._start()
        return self._point

    def shards(self, world_size: int) -> list[ray.data.DataIterator]:
        """Return one iterator for each rank. All must be consumed at the same time."""
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.max_errored_blocks = 0
        context.target_max_block_size = 1  # every row is its own block, and so its own task
        context.execution_options.preserve_order = True
        context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, PacedRounds]
        context.op_resource_reservation_ratio = 0.0  # memory for the schedule, which takes none
        # With this share of the memory in use, which cannot be 0, one task may run however large its batches are. By
        # default, none would run until the schedule has ended.
        context.object_store_memory_pressure_fraction = 1e-12
        context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, FewRowsAhead])
        cache = self._config.cache and (self._cache_folder, self._config.cache.max_bytes)
        job = cloudpickle.dumps((self._plan, self._reader, cache))
        with ray.data.DataContext.current(context):
            schedule = _Schedule(self._spans(world_size), world_size)
            # Without CPUs, because it mostly waits. With as many as a task has, Ray would fuse both into one task.
            rows = ray.data.read_datasource(schedule, num_cpus=0, override_num_blocks=1)
            fed = rows.map_batches(
                _make,
                fn_kwargs={"job": job, "world_size": world_size},
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=self._config.cpus_per_task,
                compute=ray.data.TaskPoolStrategy(self._config.max_tasks),
            )
            return list(fed.streaming_split(world_size, equal=True))

    def _spans(self, world_size: int) -> list[tuple[int, int]]:
        largest = max(source.batch for source in self._plan.sources) // world_size
        return step_spans(
            self.resume_point().step, self._plan.num_steps, max(1, self._config.samples_per_task // largest)
        )


def step_spans(start: int, stop: int, max_steps: int) -> list[tuple[int, int]]:
    """Return (first step, number of steps) of each task of a rank: 1, 2, 4, ... `max_steps`.

    Tasks grow, so that the first batch is there soon.
    """
    spans = []
    num_steps = 1
    while start < stop:
        num_steps = min(num_steps, max_steps, stop - start)
        spans.append((start, num_steps))
        start += num_steps
        num_steps *= 2
    return spans


class _Schedule(ray.data.Datasource):  # type: ignore[misc]
    """A row for each task, yielded one by one by a single reader: a run may have a million tasks."""

    def __init__(self, spans: list[tuple[int, int]], world_size: int) -> None:
        super().__init__()
        self._spans = spans
        self._world_size = world_size

    def estimate_inmemory_data_size(self) -> None:
        """Return None: the size is negligible."""

    def get_read_tasks(self, *_: object, **__: object) -> list[ray.data.ReadTask]:
        """Return the only reader."""
        num_rows = len(self._spans) * self._world_size
        metadata = BlockMetadata(num_rows=num_rows, size_bytes=None, input_files=None, exec_stats=None)
        return [ray.data.ReadTask(self._rows, metadata)]

    def _rows(self) -> Iterator[pa.Table]:
        for first, num_steps in self._spans:
            for rank in range(self._world_size):
                yield pa.table({"rank": [rank], "first": [first], "num_steps": [num_steps]})


def _make(rows: pa.Table, job: bytes, world_size: int) -> pa.Table:
    """Make the batches of one task. A `UserError` is returned: if raised, Ray would wrap it, retry and log it."""
    plan, reader = _unpickle_job(job)
    (row,) = rows.to_pylist()
    steps = range(row["first"], row["first"] + row["num_steps"])
    try:
        return _pack([reader.batch(plan, step, row["rank"], world_size) for step in steps])
    except UserError as error:
        return _pack(error)


def _pack(answer: list[FeedBatch] | UserError) -> pa.Table:
    """Return one row: the pickle, and a column for each array. They are copied once, by Ray, to shared memory."""
    arrays: list[pickle.PickleBuffer] = []
    head = pickle.dumps(answer, protocol=5, buffer_callback=arrays.append)
    columns = [_column(head), *(_column(array.raw()) for array in arrays)]
    return pa.Table.from_arrays(columns, [str(position) for position in range(len(columns))])


def _column(part: bytes | memoryview) -> pa.Array:
    """Return a column of one value that is the given memory itself. `binary` would end at 2 GB."""
    ends = pa.py_buffer(np.array([0, len(part)], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(part)])


def disable_malloc_trim() -> None:
    """Make glibc keep freed memory in this process, so that the next batch uses it again.

    Without this, memory returns to the system, which clears every page: a fifth of the time for JPEGs.
    """
    with suppress(AttributeError, OSError):  # another libc
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that it takes
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


@lru_cache(maxsize=4)
def _unpickle_job(job: bytes) -> tuple[Plan, Reader]:
    """Return the plan and the reader of a run, the same ones for all tasks of a process."""
    disable_malloc_trim()
    plan, reader, cache = pickle.loads(job)
    if cache is not None:
        reader.use_cache(PixelCache(*cache))
    return plan, reader


def start_reading(shard: ray.data.DataIterator, prefetch: int = 1) -> Generator[pa.Table]:
    """Start the tasks of a rank's shard of a `PlannedFeed` at once. Return what they make, for `batches`.

    Without this, the first task would start when a worker asks for its first batch: after it has imported torch and
    loaded the model. `prefetch` tasks are fetched ahead.
    """
    blocks = iter(shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=prefetch))
    first: Future[pa.Table | None] = Future()

    def ask() -> None:
        try:
            first.set_result(next(blocks, None))
        except Exception as error:  # noqa: BLE001  handed to whoever waits
            first.set_exception(error)

    # A daemon: a worker that fails before its first batch must not wait for it.
    Thread(target=ask, name="first batch", daemon=True).start()
    return _after(first, blocks)


def _after(first: Future[pa.Table | None], others: Iterator[pa.Table]) -> Generator[pa.Table]:
    if (block := first.result()) is not None:
        yield block
        yield from others


def batches(
    blocks: Generator[pa.Table],
    plan: Plan,
    *,
    rank: int,
    world_size: int,
    start: int = 0,
    max_bad_fraction: float = 0.01,
) -> Iterator[FeedBatch]:
    """Yield a rank's batches of steps `start` .. `plan.num_steps - 1`, in order, from what `start_reading` returned.

    Arrays are read-only and in Ray's shared memory, where all batches of a task stay until the last of them is dropped.
    Raises the `UserError` of a task, and one if too many samples were bad. Raises `RuntimeError` if the batches are not
    those of this rank from this step on.
    """
    counter = BadSampleCounter(max_bad_fraction)
    step = start
    with closing(blocks):  # an error would keep it open as long as its traceback is kept
        for block in blocks:
            for fed in _unpack(block):
                if (fed.step, fed.rank) != (step, rank):
                    raise RuntimeError(
                        f"rank {rank} of {world_size} expected step {step}, the feed gave step {fed.step} of rank"
                        f" {fed.rank}: does its `start` name the step of the checkpoint?"
                    )
                counter.add(fed)
                yield fed
                step += 1
    if step < plan.num_steps:
        raise RuntimeError(f"the feed of rank {rank} of {world_size} ended at step {step} of {plan.num_steps}")


def _unpack(row: pa.Table) -> list[FeedBatch]:
    # `column[0]` would copy: pyarrow makes a scalar of it.
    head, *arrays = (column.chunk(0).buffers()[2] for column in row.columns)
    received: list[FeedBatch] | UserError = pickle.loads(head, buffers=arrays)
    if isinstance(received, UserError):
        raise received
    return received


class BadSampleCounter:
    """Counts bad samples, and stops the run when there are too many."""

    def __init__(self, max_bad_fraction: float) -> None:
        self._max_bad_fraction = max_bad_fraction
        self._num_samples = 0
        self._num_candidates = self._num_bad_candidates = 0
        self._reasons: Counter[tuple[str, str]] = Counter()  # (source, reason) -> samples
        self._examples: dict[tuple[str, str], str] = {}

    def add(self, fed: FeedBatch) -> None:
        """Count the bad samples of a batch. Raises `UserError` if there are too many."""
        self._num_samples += fed.num_samples
        for item in fed.rejected:
            self._reasons[fed.source, item.reason] += 1
            self._examples.setdefault((fed.source, item.reason), f"{item.origin}: {item.detail}")
        self._num_candidates += fed.num_candidates
        self._num_bad_candidates += len(fed.rejected_candidates)
        if self._num_bad_candidates > self._max_bad_fraction * max(self._num_candidates, _MIN_SAMPLES):
            worst = fed.rejected_candidates[-1]
            problem = f"{self._num_bad_candidates} of {self._num_candidates} candidates were bad, for example"
            fix = "replace these files, or raise data.max_bad_fraction"
            raise UserError("data.candidates", f"{problem} {worst.origin}: {worst.reason} {worst.detail}", fix)
        num_bad = self._reasons.total()
        if num_bad > self._max_bad_fraction * max(self._num_samples, _MIN_SAMPLES):
            raise self._too_many(num_bad)

    def _too_many(self, num_bad: int) -> UserError:
        worst = self._reasons.most_common(_NUM_REASONS)
        reasons = "; ".join(f"{reason} {count} in {source}" for (source, reason), count in worst)
        return UserError(
            f"source {worst[0][0][0]}",
            f"{num_bad} bad samples while {self._num_samples} good ones were read ({reasons}), for example"
            f" {self._examples[worst[0][0]]}",
            "replace these files, or raise data.max_bad_fraction",
        )
