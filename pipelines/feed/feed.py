"""The plan on Ray Data: batches are made ahead of the training workers, in order, on whatever CPUs the cluster has.

    schedule   one row, and one block, for each task: (rank, first step, number of steps)
    task       row -> the rank's `FeedBatch`es of these steps: a pickle, and their arrays as Ray shares them, uncopied
    split      rows go to the ranks in turn: r0 steps 0-3, r1 steps 0-3, r0 steps 4-7, ...

No task changes the number of rows, so that `streaming_split` deals them round robin (tested, not documented by Ray).
"""

from __future__ import annotations

import ctypes
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache

import numpy as np
import pyarrow as pa
import ray.data
import ray.train
from ray import cloudpickle
from ray.data.block import BlockMetadata

from pipelines.config import FeedConfig
from pipelines.errors import UserError
from pipelines.feed.reader import FeedBatch, Reader
from pipelines.plan.plan import Plan

SHARD = "train"
_MIN_SAMPLES = 1000  # before a share of bad ones means anything
_NUM_REASONS = 3
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class PlannedFeed(ray.train.DataConfig):  # type: ignore[misc]
    """Makes the batches of `plan` for each group of workers, from step `start()` on.

    `start` is called whenever Ray Train starts a group of workers: it names the step after the last checkpoint. It
    must pickle, as the reader must.
    """

    def __init__(self, plan: Plan, reader: Reader, start: Callable[[], int], config: FeedConfig) -> None:
        super().__init__()
        self._plan = plan
        self._reader = reader
        self._start = start
        self._config = config

    def trainer_arguments(self) -> dict[str, object]:
        """`datasets` and `dataset_config` of a Ray trainer. The data set is a name only: `configure` replaces it."""
        return {"datasets": {SHARD: ray.data.range(1)}, "dataset_config": self}

    def configure(
        self, datasets: Iterable[str], world_size: int, *_: object, **__: object
    ) -> list[dict[str, ray.data.DataIterator]]:
        """The hook of Ray Train. Raises `UserError` if the batches cannot be dealt evenly to the workers."""
        self._plan.check_world_size(world_size)
        shards = self.shards(world_size)
        return [dict.fromkeys(datasets, shard) for shard in shards]

    def shards(self, world_size: int) -> list[ray.data.DataIterator]:
        """One iterator for each rank. All must be consumed at the same time."""
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.max_errored_blocks = 0
        context.target_max_block_size = 1  # every row is a block of its own, and so a task of its own
        context.execution_options.preserve_order = True
        job = cloudpickle.dumps((self._plan, self._reader))
        with ray.data.DataContext.current(context):
            schedule = _Schedule(self._spans(world_size), world_size)
            # Without CPUs, as it mostly waits. With as many as a task has, Ray would fuse everything into one task.
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
        return step_spans(self._start(), self._plan.num_steps, max(1, self._config.samples_per_task // largest))


def step_spans(start: int, stop: int, max_steps: int) -> list[tuple[int, int]]:
    """(first step, number of steps) of each task of a rank: 1, 2, 4, ... `max_steps`. The first batch comes soon."""
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
        """Unknown to Ray, and negligible."""

    def get_read_tasks(self, *_: object, **__: object) -> list[ray.data.ReadTask]:
        """The one reader."""
        num_rows = len(self._spans) * self._world_size
        metadata = BlockMetadata(num_rows=num_rows, size_bytes=None, input_files=None, exec_stats=None)
        return [ray.data.ReadTask(self._rows, metadata)]

    def _rows(self) -> Iterator[pa.Table]:
        for first, num_steps in self._spans:
            for rank in range(self._world_size):
                yield pa.table({"rank": [rank], "first": [first], "num_steps": [num_steps]})


def _make(rows: pa.Table, job: bytes, world_size: int) -> pa.Table:
    """What a task does. A `UserError` travels as a value: Ray would wrap it, retry the task and log tracebacks."""
    plan, reader = _unpickled(job)
    (row,) = rows.to_pylist()
    steps = range(row["first"], row["first"] + row["num_steps"])
    try:
        return _packed([reader.batch(plan, step, row["rank"], world_size) for step in steps])
    except UserError as error:
        return _packed(error)


def _packed(answer: list[FeedBatch] | UserError) -> pa.Table:
    """A row: the pickle, and a column for each array. Ray copies them once, to shared memory, and nobody else does."""
    arrays: list[pickle.PickleBuffer] = []
    head = pickle.dumps(answer, protocol=5, buffer_callback=arrays.append)
    columns = [_column(head), *(_column(array.raw()) for array in arrays)]
    return pa.Table.from_arrays(columns, [str(position) for position in range(len(columns))])


def _column(part: bytes | memoryview) -> pa.Array:
    """One value that is the given memory itself. `binary` would end at 2 GB."""
    ends = pa.py_buffer(np.array([0, len(part)], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(part)])


def disable_malloc_trim() -> None:
    """Makes glibc keep the memory of one batch for the next, in this process, from now on.

    Otherwise it goes back to the system, which clears every page again: a fifth of the time that JPEGs cost.
    """
    with suppress(AttributeError, OSError):  # another libc
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that it takes
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


@lru_cache(maxsize=4)
def _unpickled(job: bytes) -> tuple[Plan, Reader]:
    """One reader per process and run, with its manifest, indices and decoder."""
    disable_malloc_trim()
    plan, reader = pickle.loads(job)
    return plan, reader


def batches(
    shard: ray.data.DataIterator,
    plan: Plan,
    *,
    rank: int,
    world_size: int,
    start: int = 0,
    max_bad_fraction: float = 0.01,
    prefetch: int = 1,
) -> Iterator[FeedBatch]:
    """A rank's batches of steps `start` .. `plan.num_steps - 1`, in order, from its shard of a `PlannedFeed`.

    `prefetch` tasks are fetched ahead. Arrays are read-only and lie in Ray's shared memory, where all batches of a task
    stay until the last of them is dropped. Raises the `UserError` of a task, and one if too many samples were bad;
    `RuntimeError` if the batches are not those of this rank from this step on.
    """
    tally = BadSampleCounter(max_bad_fraction)
    step = start
    for block in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=prefetch):
        for fed in _received(block):
            if (fed.step, fed.rank) != (step, rank):
                raise RuntimeError(
                    f"rank {rank} of {world_size} expected step {step}, the feed gave step {fed.step} of rank"
                    f" {fed.rank}: does its `start` name the step of the checkpoint?"
                )
            tally.add(fed)
            yield fed
            step += 1
    if step < plan.num_steps:
        raise RuntimeError(f"the feed of rank {rank} of {world_size} ended at step {step} of {plan.num_steps}")


def _received(row: pa.Table) -> list[FeedBatch]:
    # Not `column[0]`: pyarrow copies what it makes a scalar of.
    head, *arrays = (column.chunk(0).buffers()[2] for column in row.columns)
    received: list[FeedBatch] | UserError = pickle.loads(head, buffers=arrays)
    if isinstance(received, UserError):
        raise received
    return received


class BadSampleCounter:
    """Counts bad samples; the run stops when they are too many."""

    def __init__(self, max_bad_fraction: float) -> None:
        self._max_bad_fraction = max_bad_fraction
        self._num_samples = 0
        self._reasons: Counter[tuple[str, str]] = Counter()  # (source, reason) -> samples
        self._examples: dict[tuple[str, str], str] = {}

    def add(self, fed: FeedBatch) -> None:
        """Raises `UserError` if there are too many by now."""
        self._num_samples += fed.num_samples
        for item in fed.rejected:
            self._reasons[fed.source, item.reason] += 1
            self._examples.setdefault((fed.source, item.reason), f"{item.origin}: {item.detail}")
        num_bad = self._reasons.total()
        if num_bad > self._max_bad_fraction * max(self._num_samples, _MIN_SAMPLES):
            raise self._too_many(num_bad)

    def _too_many(self, num_bad: int) -> UserError:
        worst = self._reasons.most_common(_NUM_REASONS)
        told = "; ".join(f"{reason} {count} in {source}" for (source, reason), count in worst)
        return UserError(
            f"source {worst[0][0][0]}",
            f"{num_bad} bad samples while {self._num_samples} good ones were read ({told}), for example"
            f" {self._examples[worst[0][0]]}",
            "replace these files, or raise data.max_bad_fraction",
        )
