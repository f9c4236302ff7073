"""The ways to feed two consumers that are compared. A run wants a process of its own.

    bare        two processes, each: read a file's bytes out of the tar, decode, forget
    reader      two processes, each: `Reader.batch` over the steps of the plan; no Ray
    ray         `PlannedFeed` on a local Ray with two CPUs; two actors receive and count
    webdataset  webdataset in a torch DataLoader with two workers
    streaming   MosaicML Streaming in a torch DataLoader with two workers

All decode the same samples to the same pixels. Bare loop, reader and Ray go through them in the order of the plan; the
other two, for whom it is cheaper, in the order of the files, without a shuffle buffer.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import multiprocessing
import os
import shutil
import sys
import tarfile
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.config import DataConfig, FeedConfig, MixtureConfig
from pipelines.feed.batch import ResumePoint
from pipelines.feed.reader import Reader
from pipelines.media.decode import decode_sample
from pipelines.plan.build import build_plan
from pipelines.plan.plan import Plan
from pipelines.samples import DecodedSample, Members, Sample

WORKERS = 2
MDS = "mds"

Counts = Callable[["Run", int, Any], Iterator[int]]  # (run, rank, argument) -> sizes of batches


@dataclass(frozen=True)
class Run:
    """What to measure. `root` holds one source, `kind`; `streaming` is a folder of packages for that way alone."""

    way: str
    root: str
    kind: str
    samples_per_worker: int = 32
    feed: dict[str, Any] = field(default_factory=dict)
    streaming: str | None = None


@dataclass(frozen=True)
class Result:
    """Wall and CPU seconds at steady state, and the samples that came in them; apart, the time to the first batch."""

    samples: int
    wall_s: float
    cpu_s: float
    first_batch_s: float

    @property
    def per_s(self) -> float:
        return self.samples / self.wall_s

    @property
    def per_cpu_s(self) -> float:
        return self.samples / self.cpu_s


class Delivered(NamedTuple):
    """A batch, when it is there."""

    time_s: float
    cpu_s: float  # of the whole machine
    samples: int


def consume(counts: Iterable[int]) -> list[Delivered]:
    """Takes batches of (decoded) samples and only counts them."""
    return [Delivered(time.monotonic(), machine_cpu_s(), count) for count in counts]


def result(asked_s: float, consumers: list[list[Delivered]]) -> Result:
    """What is delivered between the first and the last quarter of the samples.

    Before the first the pipeline fills, after the last it drains, which would count samples made at other times.
    """
    delivered = sorted(itertools.chain.from_iterable(consumers))
    total = list(itertools.accumulate(batch.samples for batch in delivered))
    begin, end = (bisect.bisect_left(total, total[-1] * share) for share in (0.25, 0.75))
    return Result(
        samples=total[end] - total[begin],
        wall_s=delivered[end].time_s - delivered[begin].time_s,
        cpu_s=delivered[end].cpu_s - delivered[begin].cpu_s,
        first_batch_s=delivered[0].time_s - asked_s,
    )


def machine_cpu_s() -> float:
    """CPU seconds of all processes so far. Summed by process, those of a Ray worker that ends would be lost."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def in_processes(run: Run, counts: Counts, argument: Any) -> Result:
    """Two forked processes, each consuming what it makes itself."""
    asked_s = time.monotonic()
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("fork")) as pool:
        made = [pool.submit(_consume_own, run, counts, rank, argument) for rank in range(WORKERS)]
        return result(asked_s, [future.result() for future in made])


def _consume_own(run: Run, counts: Counts, rank: int, argument: Any) -> list[Delivered]:
    return consume(counts(run, rank, argument))


def planned(run: Run) -> tuple[Plan, Reader]:
    """One epoch."""
    reader = Reader(DataConfig(root=run.root, trusted=True))  # the files are our own, and no peer has a sandbox
    return build_plan(reader.tables(), MixtureConfig(), global_batch=WORKERS * run.samples_per_worker), reader


def run_bare(run: Run) -> Result:
    plan, _ = planned(run)
    stored = [entry for shard in shards(run) for entry in located(shard)]
    return in_processes(run, _bare_counts, (plan, stored))


@dataclass(frozen=True)
class Stored:
    """Where the one member of a sample lies."""

    path: Path
    sample: Sample
    offset: int
    length: int


def located(shard: Path) -> list[Stored]:
    """Where everything is, found before the clock starts."""
    stored = []
    with tarfile.open(shard) as tar:
        for entry in tar:
            if entry.name.endswith(".json"):
                opened = tar.extractfile(entry)
                assert opened is not None
                sample = Sample.from_json(opened.read())
            else:
                stored.append(Stored(shard, sample, entry.offset_data, entry.size))
    return stored


def _bare_counts(run: Run, rank: int, argument: tuple[Plan, list[Stored]]) -> Iterator[int]:
    plan, stored = argument
    config = DataConfig(root=run.root, trusted=True)
    files = {path: path.open("rb") for path in {entry.path for entry in stored}}
    for step in range(plan.num_steps):
        rows = plan.batch(step, rank, WORKERS).rows
        for _, index in rows:
            entry = stored[index]
            file = files[entry.path]
            file.seek(entry.offset)
            members = {entry.sample.positive.media[0].member: file.read(entry.length)}
            decode_sample(entry.sample, members, config.media, config.instructions)
        yield len(rows)


def run_reader(run: Run) -> Result:
    return in_processes(run, _reader_counts, planned(run))


def _reader_counts(run: Run, rank: int, argument: tuple[Plan, Reader]) -> Iterator[int]:
    from pipelines.feed.feed import disable_malloc_trim

    plan, reader = argument
    disable_malloc_trim()  # as the tasks do
    for step in range(plan.num_steps):
        yield reader.batch(plan, step, rank, WORKERS).num_samples


class Zero:
    """Where the feed starts."""

    def __call__(self) -> ResumePoint:
        return ResumePoint(0)


def run_ray(run: Run) -> Result:
    import ray

    from pipelines.feed.feed import PlannedFeed, batches, start_reading

    folder = tempfile.mkdtemp(prefix="rz", dir="/tmp")  # sockets lie in it, and their paths must be short
    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    class Worker:
        """Stands where a training worker would."""

        def ready(self) -> None:
            pass

        def consume(self, shard: Any, plan: Plan, rank: int, prefetch: int) -> list[Delivered]:
            fed = batches(start_reading(shard, prefetch), plan, rank=rank, world_size=WORKERS)
            return consume(batch.num_samples for batch in fed)

    try:
        workers = [ray.remote(num_cpus=0)(Worker).remote() for _ in range(WORKERS)]
        ray.get([worker.ready.remote() for worker in workers])
        plan, reader = planned(run)
        config = FeedConfig(**run.feed)
        asked_s = time.monotonic()
        split = PlannedFeed(plan, reader, Zero(), config).shards(WORKERS)
        consumed = [
            worker.consume.remote(shard, plan, rank, config.prefetch_tasks)
            for rank, (worker, shard) in enumerate(zip(workers, split, strict=True))
        ]
        return result(asked_s, ray.get(consumed))
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def shards(run: Run) -> list[Path]:
    """The tars, in order."""
    return sorted(Path(run.root, "train", run.kind).glob("*.tar"))


def decoded(record: bytes, members: Members) -> list[Any]:
    """The pixels of a sample as tensors, which a DataLoader hands over in shared memory and not through a pipe."""
    import torch

    warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # and nothing writes
    config = DataConfig(root="")
    sample = decode_sample(Sample.from_json(record), members, config.media, config.instructions)
    return [torch.from_numpy(visual.frames) for visual in visuals(sample)]


def visuals(sample: DecodedSample) -> list[Any]:
    """Everything with pixels."""
    return [visual for part in (sample.query, sample.positive, *sample.negatives) for visual in part.visuals]


def as_list(batch: list[Any]) -> list[Any]:
    """Samples of different sizes cannot be stacked."""
    return batch


def run_webdataset(run: Run) -> Result:
    import webdataset as wds
    from torch.utils.data import DataLoader

    def decode(stored: dict[str, Any]) -> list[Any]:
        return decoded(stored["json"], {name: data for name, data in stored.items() if name.startswith("p")})

    urls = [str(path) for path in shards(run)]
    dataset = wds.WebDataset(urls, shardshuffle=False).map(decode)
    dataset = dataset.batched(run.samples_per_worker, collation_fn=as_list, partial=False)
    asked_s = time.monotonic()
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=None, num_workers=WORKERS)
    return result(asked_s, [consume(map(len, loader))])


def run_streaming(run: Run) -> Result:
    from torch.utils.data import DataLoader

    class Mds(import_streaming(run.streaming).StreamingDataset):  # type: ignore[misc]
        """The samples as `convert` wrote them."""

        def __getitem__(self, at: Any) -> list[Any]:
            stored = super().__getitem__(at)
            return decoded(stored["json"], {stored["member"]: stored["data"]})

    dataset = Mds(local=str(Path(run.root, MDS)), shuffle=False, batch_size=run.samples_per_worker)
    asked_s = time.monotonic()
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=run.samples_per_worker, num_workers=WORKERS, collate_fn=as_list
    )
    return result(asked_s, [consume(map(len, loader))])


def convert(run: Run) -> str | None:
    """The shards as MDS, uncompressed, unless they are there. The version of Streaming, if it is installed."""
    try:
        package = import_streaming(run.streaming)
    except ModuleNotFoundError:
        return None
    target = Path(run.root, MDS)
    if not (target / "index.json").exists():
        columns = {"json": "bytes", "member": "str", "data": "bytes"}
        with package.MDSWriter(out=str(target), columns=columns) as writer:
            for shard in shards(run):
                with tarfile.open(shard) as tar:
                    contents = [(entry.name, tar.extractfile(entry).read()) for entry in tar]  # type: ignore[union-attr]
                for (_, record), (name, data) in zip(contents[::2], contents[1::2], strict=True):
                    writer.write({"json": record, "member": name.partition(".")[2], "data": data})
    return str(package.__version__)


class _Unused(types.ModuleType):
    """Replaces `streaming.vision`, which needs torchvision and is not used here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def import_streaming(folder: str | None) -> Any:
    """MosaicML Streaming without its datasets of pictures, from a folder of packages or this environment."""
    if folder:
        sys.path.append(folder)  # behind everything else, so that it adds packages and replaces none
    sys.modules["streaming.vision"] = _Unused("streaming.vision")
    import streaming  # type: ignore[import-not-found]

    return streaming


CONTENDERS: dict[str, Callable[[Run], Result]] = {
    "bare": run_bare,
    "reader": run_reader,
    "ray": run_ray,
    "webdataset": run_webdataset,
    "streaming": run_streaming,
}
