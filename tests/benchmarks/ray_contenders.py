"""The ways of the feed benchmark that need Ray, and the stages of our feed one by one. All turns use one Ray.

ray         `PlannedFeed` with two CPUs; two actors receive and count
raydata     `read_webdataset`, `map`, `streaming_split`; two actors iterate by `iter_torch_batches` and count
stages      one process: read, decode, encode, ship and receive, with the CPU of each
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data

from pipelines.config import FeedConfig
from pipelines.feed.batch import ResumePoint
from pipelines.feed.feed import PlannedFeed, _pack, _unpack, batches, disable_malloc_trim, start_reading
from pipelines.plan.plan import Plan
from tests.benchmarks.contenders import WORKERS, Delivered, Result, Run, begin, consume, decoded, planned, result

_STAGE_STEPS = 8
_OTHER_STEP = 1000  # that is not measured
_EPOCHS = 200
_STAGES = ("read", "decode", "encode", "ship, new memory", "ship, used memory", "receive")


@contextmanager
def own_ray(object_store_bytes: int) -> Iterator[None]:
    """Run a local Ray with two CPUs for the block. It keeps idle processes from one turn of a way to the next."""
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "120000")
    folder = tempfile.mkdtemp(prefix="rz", dir="/tmp")  # sockets lie in it, and their paths must be short
    ray.init(
        num_cpus=WORKERS,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=object_store_bytes,
        _temp_dir=folder,
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


class Zero:
    """Where the feed starts."""

    def __call__(self) -> ResumePoint:
        return ResumePoint(0)


class Worker:
    """Stands where a training worker would."""

    def ready(self) -> None:
        pass

    def consume(self, run: Run, shard: Any, plan: Plan, rank: int, prefetch: int) -> list[Delivered]:
        with closing(batches(start_reading(shard, prefetch), plan, rank=rank, world_size=WORKERS)) as fed:
            return consume(run, (batch.num_samples for batch in fed))

    def consume_tensors(self, run: Run, shard: Any) -> list[Delivered]:
        counts = shard.iter_torch_batches(
            batch_size=run.samples_per_worker, collate_fn=_tensors, prefetch_batches=2, drop_last=True
        )
        return consume(run, counts)


@contextmanager
def _workers() -> Iterator[list[Any]]:
    workers = [ray.remote(num_cpus=0)(Worker).remote() for _ in range(WORKERS)]
    ray.get([worker.ready.remote() for worker in workers])
    yield workers
    for worker in workers:
        ray.kill(worker)


def run_ray(run: Run) -> Result:
    with _workers() as workers:
        plan, reader = planned(run)
        config = FeedConfig(**run.feed)
        asked = begin()
        split = PlannedFeed(plan, reader, Zero(), config).shards(WORKERS)
        consumed = [
            worker.consume.remote(run, shard, plan, rank, config.prefetch_tasks)
            for rank, (worker, shard) in enumerate(zip(workers, split, strict=True))
        ]
        return result(run, asked, ray.get(consumed))


def _pixels(row: dict[str, Any]) -> dict[str, Any]:
    """The pixels of a sample, which has one medium."""
    (tensor,) = decoded(row["json"], {name: data for name, data in row.items() if name.startswith("p")})
    return {"pixels": tensor.numpy()}


def _tensors(columns: dict[str, Any]) -> int:
    """Samples of different sizes cannot be stacked: as many tensors as there are samples."""
    import torch

    return len([torch.as_tensor(pixels) for pixels in columns["pixels"]])


def run_raydata(run: Run) -> Result:
    paths = [f"{run.root.removeprefix('s3://')}/{name.path}" for name in planned(run)[1].source(run.kind).shards]
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    with _workers() as workers:
        asked = begin()
        rows = ray.data.read_webdataset(paths * _EPOCHS, filesystem=_filesystem(run), decoder=None)
        split = rows.map(_pixels).streaming_split(WORKERS, equal=False)
        consumed = [worker.consume_tensors.remote(run, shard) for worker, shard in zip(workers, split, strict=True)]
        return result(run, asked, ray.get(consumed))


def _filesystem(run: Run) -> Any:
    if run.endpoint is None:
        return None
    from pyarrow.fs import S3FileSystem

    scheme, _, host = run.endpoint.partition("://")
    return S3FileSystem(endpoint_override=host, scheme=scheme)


def run_stages(run: Run) -> dict[str, float]:
    """CPU milliseconds a sample of each stage, in this process, with the encoder of a tiny model.

    A block is shipped to new shared memory if the ones before are still held.
    """
    from rzen.config import PromptConfig
    from rzen.inputs.pairs import PairEncoder
    from rzen.inputs.processor import Processor
    from tests.tiny import tiny_checkpoint

    disable_malloc_trim()
    plan, reader = planned(run)
    spent_s = dict.fromkeys(_STAGES, 0.0)
    num_samples = 0
    with tempfile.TemporaryDirectory() as folder:
        reader.encoder = PairEncoder(Processor(tiny_checkpoint(Path(folder)), PromptConfig()))
        reader.batch(plan, _OTHER_STEP, 0, WORKERS)  # libraries and files are opened
        held = []
        for step in range(_STAGE_STEPS):
            rows = plan.batch(step, 0, WORKERS).rows
            with _timed(spent_s, "read"):
                stored = [item for _, item in reader._rows.read(rows)]
            with _timed(spent_s, "decode"):
                samples = [reader._decode(item) for item in stored]
            with _timed(spent_s, "encode"):
                pairs = reader.encoder.collate([reader.encoder.sample(sample) for sample in samples])
            with _timed(spent_s, "ship, new memory"):
                held.append(ray.put(_pack([pairs])))
            num_samples += len(rows)
        for block in held[:2]:
            ray.get(block)  # maps the memory into this process
        del held[:]
        time.sleep(2)  # Ray frees it
        for _ in range(_STAGE_STEPS):
            with _timed(spent_s, "ship, used memory"):
                reference = ray.put(_pack([pairs]))
            with _timed(spent_s, "receive"):
                _unpack(ray.get(reference))
            del reference
            time.sleep(0.3)
    return {name: 1000 * seconds / num_samples for name, seconds in spent_s.items()}


@contextmanager
def _timed(spent_s: dict[str, float], name: str) -> Iterator[None]:
    begun_s = time.process_time()
    yield
    spent_s[name] += time.process_time() - begun_s
