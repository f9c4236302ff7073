"""The plan through a real streaming split: every rank gets exactly its batches, from any step, and hears of faults."""

import time
import uuid
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.data
import ray.train
from ray.data import ExecutionOptions

from pipelines.config import CacheConfig, DataConfig, FeedConfig, MixtureConfig
from pipelines.errors import UserError
from pipelines.feed.batch import FeedBatch, ResumePoint
from pipelines.feed.feed import PlannedFeed, batches, start_reading, step_spans
from pipelines.feed.reader import Reader
from pipelines.plan.build import build_plan
from pipelines.plan.plan import Plan
from pipelines.samples import DecodedSample
from pipelines.storage.location import open_store
from tests.benchmarks.feed_scale import FakePlan, FakeReader
from tests.data import ColourEncoder, publish

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
SOURCES = {"cars": ("t2i", 37), "dogs": ("i2i", 21)}


def make(
    root: str,
    endpoint: str | None = None,
    bad: dict[str, Collection[int]] | None = None,
    global_batch: int = 4,
    epochs: float = 1,
) -> tuple[Plan, Reader]:
    publish(open_store(root, endpoint), SOURCES, bad)
    reader = Reader(DataConfig(root=root, endpoint=endpoint), ColourEncoder())
    plan = build_plan(reader.tables(), MixtureConfig(run_length=4), global_batch=global_batch, epochs=epochs)
    return plan, reader


@dataclass(frozen=True)
class From:
    """Picklable: the step to start at."""

    step: int

    def __call__(self) -> ResumePoint:
        return ResumePoint(self.step)


def consume(
    plan: Plan,
    reader: Reader,
    world_size: int,
    start: int = 0,
    samples_per_task: int = 12,
    expected: int | None = None,
    cache: CacheConfig | None = None,
) -> list[list[FeedBatch]]:
    """All batches by rank, ranks consuming at the same time. The worker expects step `expected`, or `start`."""
    config = FeedConfig(samples_per_task=samples_per_task, cpus_per_task=1, cache=cache)
    feed = PlannedFeed(plan, reader, From(start), config)
    shards = feed.configure({"train": None}, world_size, None, None)

    def rank_batches(rank: int) -> list[FeedBatch]:
        first = start if expected is None else expected
        blocks = start_reading(shards[rank]["train"])
        return [*batches(blocks, plan, rank=rank, world_size=world_size, start=first)]

    with ThreadPoolExecutor(world_size) as pool:
        return [*pool.map(rank_batches, range(world_size))]


def assert_fed(plan: Plan, reader: Reader, fed: list[list[FeedBatch]], start: int = 0) -> None:
    for rank, mine in enumerate(fed):
        assert [batch.step for batch in mine] == list(range(start, plan.num_steps))
        for got in mine:
            wanted = reader.batch(plan, got.step, rank, len(fed))
            assert np.array_equal(got.batch, wanted.batch)
            for name in ("rank", "blocks", "rejected"):
                assert getattr(got, name) == getattr(wanted, name)


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_rank_gets_its_share_of_every_step(world_size: int, tmp_path: Path) -> None:
    plan, reader = make(str(tmp_path))
    assert plan.num_steps == 14  # in tasks of 1, 2, 3, 3, 3, 2 steps, or with two ranks 1, 2, 4, 6, 1
    assert_fed(plan, reader, consume(plan, reader, world_size))


def test_a_feed_started_late_gives_the_same_batches_and_counts_the_bad(tmp_path: Path) -> None:
    source, number = make(str(tmp_path))[0].batch(9).rows[3]
    plan, reader = make(str(tmp_path), bad={source: {number}})
    fed = consume(plan, reader, 2, start=5)
    assert_fed(plan, reader, fed, start=5)
    (item,) = fed[1][9 - 5].rejected
    assert (item.origin[-8:], item.reason) == (f"{number:08d}", "unsupported_format")


def test_batches_with_a_cache_are_the_same_and_later_epochs_take_their_pixels_from_it(tmp_path: Path) -> None:
    plan, reader = make(str(tmp_path), epochs=4)
    cache = CacheConfig(max_bytes=1 << 24, folder=str(tmp_path / "pixels"))
    first = consume(plan, reader, 2, cache=cache)
    assert_fed(plan, reader, first)
    shares = [batch.cached_fraction for mine in first for batch in mine]
    assert min(shares) == 0
    assert max(shares) == 1
    again = consume(plan, reader, 2, cache=cache)  # another run of the job
    assert_fed(plan, reader, again)
    assert {batch.cached_fraction for mine in again for batch in mine} == {1}
    (folder,) = (tmp_path / "pixels").iterdir()
    assert {path.suffix for path in folder.iterdir()} == {"", ".rgb"}


def test_a_finished_run_is_fed_nothing_and_an_unfinished_one_notices(tmp_path: Path) -> None:
    plan, reader = make(str(tmp_path))
    assert consume(plan, reader, 2, start=plan.num_steps) == [[], []]
    with pytest.raises(RuntimeError, match="the feed of rank 0 of 1 ended at step 13 of 14"):
        consume(plan, reader, 1, start=plan.num_steps, expected=13)


@pytest.fixture(scope="module")
def stored_twice(tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str) -> list[tuple[Plan, Reader]]:
    """The same data on a local disk and on S3."""
    places = [(str(tmp_path_factory.mktemp("data")), None), (f"s3://b{uuid.uuid4().hex[:12]}/x", s3_endpoint)]
    return [make(*place, global_batch=12, epochs=3) for place in places]


@pytest.mark.parametrize(("world_size", "start"), [(1, 0), (2, 7), (3, 0), (3, 1), (4, 0), (4, 11)])
def test_s3_feeds_any_number_of_workers_the_same_from_any_step(
    stored_twice: list[tuple[Plan, Reader]], world_size: int, start: int
) -> None:
    local, stored = stored_twice
    assert local[0].num_steps == 12
    assert stored[0].fingerprint() == local[0].fingerprint()
    fed = consume(*stored, world_size, start=start)
    assert_fed(*local, fed, start=start)
    # The uninterrupted batch of one worker is what all ranks hold together.
    for offset, step in enumerate(range(start, 12)):
        whole = local[1].batch(local[0], step, 0, 1).batch
        assert np.array_equal(np.concatenate([mine[offset].batch for mine in fed]), whole)


def test_a_feed_from_another_step_is_refused(tmp_path: Path) -> None:
    plan, reader = make(str(tmp_path))
    with pytest.raises(RuntimeError, match="rank 0 of 1 expected step 7, the feed gave step 5 of rank 0"):
        consume(plan, reader, 1, start=5, expected=7)


def test_a_user_error_of_a_task_reaches_the_worker_as_itself(tmp_path: Path) -> None:
    plan, reader = make(str(tmp_path), bad={"cars": range(37)})
    with pytest.raises(UserError, match="has no sample left to replace a bad one in step") as error:
        consume(plan, reader, 1)
    assert error.value.place == f"{tmp_path}/train/cars"


class Broken(ColourEncoder):
    """An encoder with a defect."""

    def sample(self, sample: DecodedSample) -> Any:
        raise ZeroDivisionError(sample.sample.key)


def test_a_defect_in_a_task_stops_the_feed(tmp_path: Path) -> None:
    plan, reader = make(str(tmp_path))
    with pytest.raises(Exception, match="ZeroDivisionError"):
        consume(plan, Reader(reader.data, Broken()), 1)


class Marking(ColourEncoder):
    """An encoder that leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self.mark = mark

    def sample(self, sample: DecodedSample) -> Any:
        self.mark.touch()
        return super().sample(sample)


def test_decoding_starts_before_a_worker_asks_for_a_batch(tmp_path: Path) -> None:
    plan, reader = make(str(tmp_path))
    encoder = Marking(tmp_path / "mark")
    (shard,) = PlannedFeed(plan, Reader(reader.data, encoder), From(0), FeedConfig()).shards(1)
    blocks = start_reading(shard)
    deadline_s = time.monotonic() + 120
    while not encoder.mark.exists():
        assert time.monotonic() < deadline_s, "nothing was decoded"
        time.sleep(0.05)
    fed = [*batches(blocks, plan, rank=0, world_size=1)]
    assert [batch.step for batch in fed] == list(range(plan.num_steps))


def test_too_many_bad_samples_stop_the_worker(tmp_path: Path) -> None:
    plan, reader = make(str(tmp_path), bad={"cars": {1, 8, 9, 17}})
    feed = PlannedFeed(plan, reader, From(0), FeedConfig())
    (shard,) = feed.shards(1)
    with pytest.raises(UserError, match=r"source cars: 3 bad samples while \d+ good ones were read") as error:
        list(batches(start_reading(shard), plan, rank=0, world_size=1, max_bad_fraction=0.002))
    assert "unsupported_format 3 in cars" in error.value.problem
    assert f"{tmp_path}/train/cars/cars-00000" in error.value.problem
    assert error.value.fix == "replace these files, or raise data.max_bad_fraction"


def test_ranks_that_cannot_share_evenly_are_refused(tmp_path: Path) -> None:
    plan, reader = make(str(tmp_path))
    with pytest.raises(UserError, match="have 4 samples, which 3 workers cannot share evenly"):
        PlannedFeed(plan, reader, From(0), FeedConfig()).configure({"train": None}, 3)


class TaskEncoder(ColourEncoder):
    """A batch is the id of the Ray task that made it."""

    def collate(self, samples: list[tuple[str, int, int]]) -> Any:
        return ray.get_runtime_context().get_task_id()


def test_each_span_of_steps_is_a_task_of_its_own(tmp_path: Path) -> None:
    plan, reader = make(str(tmp_path))
    (mine,) = consume(plan, Reader(reader.data, TaskEncoder()), 1)
    tasks = [fed.batch for fed in mine]
    assert [tasks.count(task) for task in dict.fromkeys(tasks)] == [1, 2, 3, 3, 3, 2]


@pytest.mark.parametrize(
    ("start", "stop", "max_steps", "spans"),
    [
        (0, 14, 3, [(0, 1), (1, 2), (3, 3), (6, 3), (9, 3), (12, 2)]),
        (5, 12, 100, [(5, 1), (6, 2), (8, 4)]),
        (0, 3, 1, [(0, 1), (1, 1), (2, 1)]),
        (4, 4, 2, []),
    ],
)
def test_spans_grow_and_cover_every_step(start: int, stop: int, max_steps: int, spans: list[tuple[int, int]]) -> None:
    assert step_spans(start, stop, max_steps) == spans


def test_batches_too_large_for_the_memory_do_not_wait_until_the_schedule_has_ended() -> None:
    """Ray Data would first read all rows of the schedule, 200,000 here, and only then start one more task."""
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.resource_limits = ExecutionOptions().resource_limits.copy(object_store_memory=8 << 20)
    plan: Any = FakePlan(2, num_steps=100_000)
    reader: Any = FakeReader(4 << 20)
    with ray.data.DataContext.current(context):
        shards = PlannedFeed(plan, reader, From(0), FeedConfig(samples_per_task=1)).shards(2)

    def consume_few(rank: int) -> list[int]:
        with closing(batches(start_reading(shards[rank]), plan, rank=rank, world_size=2)) as fed:
            return [batch.step for batch in islice(fed, 12)]

    begun_s = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(consume_few, range(2))) == [list(range(12))] * 2
    assert time.monotonic() - begun_s < 60
