"""A bad object store and killed feed workers: the batches stay what they are, or the run ends with one clear error."""

import os
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.config import DataConfig, FeedConfig, MixtureConfig
from pipelines.errors import UserError
from pipelines.feed.batch import FeedBatch, ResumePoint
from pipelines.feed.feed import PlannedFeed, batches, start_reading
from pipelines.feed.reader import Reader
from pipelines.plan.build import build_plan
from pipelines.plan.plan import Plan
from pipelines.samples import DecodedSample
from pipelines.storage.faults import brief_patience
from pipelines.storage.location import open_store
from tests.data import ColourEncoder, publish
from tests.faults.s3_proxy import FAULTS, StormyProxy

WORLD_SIZE = 2


@pytest.fixture
def bucket_url(s3_endpoint: str) -> str:
    url = f"s3://b{uuid.uuid4().hex[:12]}"
    open_store(url, s3_endpoint).ensure_bucket()
    return url


def make_plan(reader: Reader, steps: int | None = None) -> Plan:
    """One epoch, or so many steps. Every sample by itself: many small requests."""
    return build_plan(reader.tables(), MixtureConfig(run_length=1), global_batch=8, steps=steps)


class ImpatientReader(Reader):
    """Gives up a store that has answered after 25 s, in the processes that read, not after ten minutes."""

    def batch(self, plan: Plan, step: int, rank: int, world_size: int) -> FeedBatch:
        with brief_patience(25.0):
            return super().batch(plan, step, rank, world_size)


def feed(plan: Plan, reader: Reader, world_size: int = WORLD_SIZE) -> list[Iterator[FeedBatch]]:
    """The batches of each rank. All must be consumed at the same time."""
    shards = PlannedFeed(plan, reader, ResumePoint, FeedConfig(samples_per_task=16)).shards(world_size)
    return [batches(start_reading(shard), plan, rank=rank, world_size=world_size) for rank, shard in enumerate(shards)]


def consume(
    plan: Plan, reader: Reader, after_each: Callable[[FeedBatch], object] = lambda _: None
) -> list[list[FeedBatch]]:
    """All batches by rank; `after_each` gets each as soon as it is made."""

    def consumed(mine: Iterator[FeedBatch]) -> list[FeedBatch]:
        received = []
        for fed in mine:
            after_each(fed)
            received.append(fed)
        return received

    with ThreadPoolExecutor(WORLD_SIZE) as pool:
        return [*pool.map(consumed, feed(plan, reader))]


class ListEncoder(ColourEncoder):
    """A batch is the list of its samples: (source, number, red)."""

    def collate(self, samples: list[tuple[str, int, int]]) -> Any:
        return samples


def assert_identical(plan: Plan, quiet: Reader, fed: list[list[FeedBatch]]) -> None:
    """Each rank got what the reader gives by itself, from a store without faults: nothing lost, nothing twice."""
    for rank, mine in enumerate(fed):
        assert mine == [quiet.batch(plan, step, rank, WORLD_SIZE) for step in range(plan.num_steps)]
    planned = Counter(row for step in range(plan.num_steps) for row in plan.batch(step).rows)
    assert set(planned.values()) == {1}  # one epoch
    assert Counter((source, number) for mine in fed for got in mine for source, number, _ in got.batch) == planned


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_stormy_store_changes_no_batch(bucket_url: str, s3_endpoint: str, ray_cluster: None) -> None:
    publish(open_store(bucket_url, s3_endpoint), {"cars": ("t2i", 107), "dogs": ("i2i", 61)})
    quiet = Reader(DataConfig(root=bucket_url, endpoint=s3_endpoint), ListEncoder())
    plan = make_plan(quiet)
    with StormyProxy(s3_endpoint, fraction=0.05, seed=1) as proxy:
        fed = consume(plan, Reader(DataConfig(root=bucket_url, endpoint=proxy.url), ListEncoder()))
    assert all(proxy.counts[kind] for kind in FAULTS), proxy.counts
    assert proxy.counts.total() >= 0.05 * proxy.num_requests  # bursts make it more
    assert_identical(plan, quiet, fed)


class StallingEncoder(ListEncoder):
    """Whoever encodes `number` of `source` notes its process in `folder`; the first to do so then stalls."""

    def __init__(self, folder: Path, source: str, number: int) -> None:
        super().__init__()
        self.folder, self.source, self.number = folder, source, number

    def sample(self, sample: DecodedSample) -> tuple[str, int, int]:
        encoded = super().sample(sample)
        if encoded[:2] == (self.source, self.number):
            is_first = not any(self.folder.iterdir())
            (self.folder / str(os.getpid())).touch()
            if is_first:
                time.sleep(600)
        return encoded


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_feed_worker_killed_in_its_task_changes_no_batch(tmp_path: Path, ray_cluster: None) -> None:
    publish(open_store(str(tmp_path / "data")), {"cars": ("t2i", 83), "dogs": ("i2i", 45)})
    quiet = Reader(DataConfig(root=str(tmp_path / "data")), ListEncoder())
    plan = make_plan(quiet)
    folder = tmp_path / "pids"
    folder.mkdir()
    stalling = StallingEncoder(folder, *plan.batch(9).rows[5])

    seen: list[int] = []
    killed: list[tuple[int, int]] = []  # process, and batches that were consumed by then

    def kill_the_stalled() -> None:
        while not (any(folder.iterdir()) and seen):
            time.sleep(0.02)
        (worker,) = (psutil.Process(int(path.name)) for path in folder.iterdir())
        assert worker in psutil.Process().children(recursive=True)
        assert worker.cmdline()[0].startswith("ray::MapBatches(_make)")  # Ray names a process by its task
        worker.send_signal(signal.SIGKILL)
        killed.append((worker.pid, len(seen)))

    killer = threading.Thread(target=kill_the_stalled, daemon=True)
    killer.start()
    fed = consume(plan, Reader(quiet.data, stalling), lambda got: seen.append(got.step))
    killer.join(timeout=1)

    (pid, num_consumed), *others = killed
    assert not others
    assert 0 < num_consumed < plan.num_steps * WORLD_SIZE
    assert {int(path.name) for path in folder.iterdir()} > {pid}  # another process made the batch after all
    assert_identical(plan, quiet, fed)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_store_that_breaks_for_good_ends_the_feed_with_one_error(
    bucket_url: str, s3_endpoint: str, ray_cluster: None
) -> None:
    publish(open_store(bucket_url, s3_endpoint), {"cars": ("t2i", 61)})
    with StormyProxy(s3_endpoint, kinds=["slow_down"]) as proxy:
        reader = ImpatientReader(DataConfig(root=bucket_url, endpoint=proxy.url), ListEncoder())
        (mine,) = feed(make_plan(reader, steps=200), reader, world_size=1)
        next(mine)
        proxy.fraction = 1.0
        broken_s = time.monotonic()
        with pytest.raises(UserError, match=r"the object store answered SlowDown.*; try again later") as error:
            list(mine)
        assert time.monotonic() - broken_s < 90  # of which about 25 s are the patience of the store
        assert error.value.place.startswith(bucket_url)
        assert proxy.counts["slow_down"] >= 16  # eight attempts of two requests
