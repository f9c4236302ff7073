"""The ways to feed two consumers that are compared. Each turn of a way starts it anew, and ends it.

    bare        two processes, each: read a file's bytes out of the tar, decode, forget
    reader      two processes, each: `Reader.batch` over the steps of the plan; no Ray
    webdataset  webdataset in a torch DataLoader with two workers
    streaming   MosaicML Streaming in a torch DataLoader with two workers
    ray, raydata, stages: `ray_contenders.py`

All decode the same samples to the same pixels, epoch after epoch. Bare loop, reader and our feed go through them in the
order of the plan. The others, for whom it is cheaper, take the order of the files, without a shuffle buffer.
"""

from __future__ import annotations

import bisect
import itertools
import multiprocessing
import os
import sys
import tarfile
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.config import DataConfig, MixtureConfig
from pipelines.feed.reader import Reader
from pipelines.media.decode import decode_sample
from pipelines.plan.build import build_plan
from pipelines.plan.plan import Plan
from pipelines.samples import DecodedSample, Members, Sample

WORKERS = 2
NUM_STEPS = 20_000
MDS = "mds"

Counts = Callable[["Run", int, Any], Iterator[int]]  # (run, rank, argument) -> sizes of batches


@dataclass(frozen=True)
class Run:
    """What to measure. `root` holds one source, `kind`; `streaming` is a folder of packages for that way alone.

    Batches are timed for `measured_s` seconds, which begin `warm_s` after the first batch.
    """

    way: str
    root: str
    kind: str
    endpoint: str | None = None
    warm_s: float = 2.0
    measured_s: float = 4.0
    samples_per_worker: int = 32
    feed: dict[str, Any] = field(default_factory=dict)
    streaming: str | None = None


@dataclass(frozen=True)
class Result:
    """Wall and CPU seconds at steady state, and the samples that came in them; apart, those up to the first batch."""

    samples: int
    wall_s: float
    cpu_s: float
    first_batch_s: float
    first_batch_cpu_s: float

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


def consume(run: Run, counts: Iterable[int]) -> list[Delivered]:
    """Takes batches of (decoded) samples and only counts them, until the time to measure is over."""
    delivered: list[Delivered] = []
    for count in counts:
        delivered.append(Delivered(time.monotonic(), machine_cpu_s(), count))
        if delivered[-1].time_s > delivered[0].time_s + run.warm_s + run.measured_s:
            break
    return delivered


def begin() -> Delivered:
    """When a way is asked for its first batch."""
    return Delivered(time.monotonic(), machine_cpu_s(), 0)


def result(run: Run, asked: Delivered, consumers: list[list[Delivered]]) -> Result:
    """What all consumers got in the time to measure, from one batch to another.

    A consumer that is ahead ends earlier, and the time ends with it: the others then have the machine for themselves.
    """
    delivered = sorted(itertools.chain.from_iterable(consumers))
    times_s = [batch.time_s for batch in delivered]
    first, last_s = delivered[0], min(consumer[-1].time_s for consumer in consumers)
    start = bisect.bisect_left(times_s, first.time_s + run.warm_s)
    stop = bisect.bisect_right(times_s, last_s) - 1
    if times_s[stop] - times_s[start] < run.measured_s / 2:
        raise RuntimeError(f"{run.way} gave batches for {times_s[stop] - first.time_s:.1f} s only")
    return Result(
        samples=sum(batch.samples for batch in delivered[start + 1 : stop + 1]),
        wall_s=times_s[stop] - times_s[start],
        cpu_s=delivered[stop].cpu_s - delivered[start].cpu_s,
        first_batch_s=first.time_s - asked.time_s,
        first_batch_cpu_s=first.cpu_s - asked.cpu_s,
    )


def machine_cpu_s() -> float:
    """CPU seconds of all processes so far. Summed by process, those of a Ray worker that ends would be lost."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def in_processes(run: Run, counts: Counts, argument: Any) -> Result:
    """Two forked processes, each consuming what it makes itself."""
    asked = begin()
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("fork")) as pool:
        made = [pool.submit(_consume_own, run, counts, rank, argument) for rank in range(WORKERS)]
        return result(run, asked, [future.result() for future in made])


def _consume_own(run: Run, counts: Counts, rank: int, argument: Any) -> list[Delivered]:
    return consume(run, counts(run, rank, argument))


def planned(run: Run) -> tuple[Plan, Reader]:
    """More epochs than fit into the time."""
    # The files are our own, and no peer has a sandbox.
    reader = Reader(DataConfig(root=run.root, endpoint=run.endpoint, trusted=True))
    global_batch = WORKERS * run.samples_per_worker
    return build_plan(reader.tables(), MixtureConfig(), global_batch=global_batch, steps=NUM_STEPS), reader


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


def shards(run: Run) -> list[Path]:
    """The tars on disk, in order."""
    return sorted(Path(run.root, "train", run.kind).glob("*.tar"))


def shard_urls(run: Run) -> list[str]:
    """Paths of the tars, or what an HTTP client reads them by."""
    if run.endpoint is None:
        return [str(path) for path in shards(run)]
    bucket = run.root.removeprefix("s3://")
    names = [shard.path for shard in planned(run)[1].source(run.kind).shards]
    return [f"{run.endpoint}/{bucket}/{name}" for name in names]


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

    dataset = wds.WebDataset(shard_urls(run), shardshuffle=False).repeat().map(decode)
    dataset = dataset.batched(run.samples_per_worker, collation_fn=as_list, partial=False)
    asked = begin()
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=None, num_workers=WORKERS)
    return result(run, asked, [consume(run, map(len, loader))])


def run_streaming(run: Run) -> Result:
    from torch.utils.data import DataLoader

    class Mds(import_streaming(run.streaming).StreamingDataset):  # type: ignore[misc]
        """The samples as `convert` wrote them."""

        def __getitem__(self, at: Any) -> list[Any]:
            stored = super().__getitem__(at)
            return decoded(stored["json"], {stored["member"]: stored["data"]})

    import_streaming(run.streaming).base.util.clean_stale_shared_memory()  # of the turn before
    dataset = Mds(local=str(Path(run.root, MDS)), shuffle=False, batch_size=run.samples_per_worker)
    asked = begin()
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=run.samples_per_worker, num_workers=WORKERS, collate_fn=as_list, persistent_workers=True
    )
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    return result(run, asked, [consume(run, map(len, epochs))])


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


def upload(run: Run) -> str:
    """Copy the files on disk to a new bucket, and return its URL."""
    import boto3

    client = boto3.client("s3", endpoint_url=run.endpoint)
    client.create_bucket(Bucket=run.kind)
    root = Path(run.root)
    for path in sorted(path for path in root.rglob("*") if path.is_file() and MDS not in path.parts):
        client.upload_file(str(path), run.kind, str(path.relative_to(root)))
    return f"s3://{run.kind}"


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
    "webdataset": run_webdataset,
    "streaming": run_streaming,
}
