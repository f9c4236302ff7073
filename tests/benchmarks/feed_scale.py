"""How many tasks the control path of the feed bears: the coordinator of Ray Data, and the object store's bookkeeping.

Nothing is decoded: a task returns small batches at once, so that tasks come as fast as the control path lets them. The
ranks are threads of one process. Each has its own iterator, as a training worker has. There are as many decoding
processes as this machine holds. More of them change only how many tasks wait at the same time.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from pipelines.feed.batch import FeedBatch, FeedBlock, ResumePoint
from tests.benchmarks.turns import Host, say

RANKS = (2, 8, 64)
SAMPLES = 128  # of a task, as in `FeedConfig`
PAYLOAD_BYTES = 4096  # of a task
SECONDS = 6.0
SLOW_BYTES, SLOW_S, FILL_S = 4 << 20, 0.5, 15.0
"""Of the run whose ranks are slow: bytes of a task, seconds of a step, and seconds until the object store is full."""
DECODERS = 500  # CPUs that are asked for
PER_CPU_S = 450  # images that one of them decodes in a second, from the table of files on disk
PROCESSES = ("coordinator", "tasks", "raylet and GCS", "ranks")
_STORE_MB = 500
_STEPS = 1_000_000


@dataclass(frozen=True)
class FakePlan:
    """A plan of one source, whose batches give a rank one task's samples."""

    world_size: int
    num_steps: int = _STEPS

    @property
    def sources(self) -> tuple[Any, ...]:
        return (SimpleNamespace(batch=SAMPLES * self.world_size),)

    def check_world_size(self, world_size: int) -> None:
        assert world_size == self.world_size


@dataclass(frozen=True)
class FakeReader:
    """Gives batches of zeros."""

    num_bytes: int

    def batch(self, plan: FakePlan, step: int, rank: int, world_size: int) -> FeedBatch:
        block = FeedBlock("images", "text_image", 0, SAMPLES)
        return FeedBatch(step, rank, (block,), np.zeros(self.num_bytes, np.uint8), ())


def _start() -> ResumePoint:
    return ResumePoint(0)


def measure(question: tuple[int, bool]) -> dict[str, float]:
    """Tasks a second of all ranks, and CPU milliseconds a second by process, for (number of ranks, are they slow)."""
    from pipelines.config import FeedConfig
    from pipelines.feed.feed import PlannedFeed, batches, start_reading

    ranks, are_slow = question
    plan: Any = FakePlan(ranks)
    reader: Any = FakeReader(SLOW_BYTES if are_slow else PAYLOAD_BYTES)
    shards = PlannedFeed(plan, reader, _start, FeedConfig(samples_per_task=SAMPLES)).shards(ranks)
    taken = [0] * ranks
    stop = threading.Event()

    def consume(rank: int) -> None:
        with closing(batches(start_reading(shards[rank]), plan, rank=rank, world_size=ranks)) as fed:
            for _ in fed:
                taken[rank] += 1
                if stop.wait(SLOW_S if are_slow else 0):
                    return

    threads = [threading.Thread(target=consume, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    while min(taken) < 2:
        time.sleep(0.05)
    time.sleep(FILL_S if are_slow else 2.0)
    before, cpu_before, begun_s = sum(taken), _cpu_s(), time.monotonic()
    time.sleep(SECONDS)
    count, cpu_after, elapsed_s = sum(taken) - before, _cpu_s(), time.monotonic() - begun_s
    uneven = max(taken) - min(taken)
    stop.set()
    for thread in threads:
        thread.join()
    spent = {name: 1000 * (cpu_after[name] - cpu_before.get(name, 0.0)) / elapsed_s for name in cpu_after}
    return {"per_s": count / elapsed_s, "uneven": uneven} | spent


def _cpu_s() -> dict[str, float]:
    """CPU seconds so far of the processes of this Ray, which are our descendants, by what they do."""
    stats = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
            command = path.with_name("cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # it has ended
        fields = text[text.rindex(")") + 2 :].split()
        ticks = int(fields[11]) + int(fields[12])
        stats[int(path.parent.name)] = int(fields[1]), ticks / os.sysconf("SC_CLK_TCK"), command
    found = dict.fromkeys(PROCESSES, 0.0)
    for number, (_, cpu_s, command) in stats.items():
        if not _descends(number, stats):
            continue
        if "SplitCoordinator" in command:
            found["coordinator"] += cpu_s
        elif "_make" in command or "ray::IDLE" in command:
            found["tasks"] += cpu_s
        elif "raylet" in command or "gcs_server" in command:
            found["raylet and GCS"] += cpu_s
        elif number == os.getpid():
            found["ranks"] += cpu_s
    return found


def _descends(number: int, stats: dict[int, tuple[int, float, str]]) -> bool:
    while number in stats and number != os.getpid():
        number = stats[number][0]
    return number == os.getpid()


def section() -> list[str]:
    """Markdown: what each number of ranks bears."""
    variables = {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    lines = []
    with Host("tests.benchmarks.feed_scale", **variables) as host:
        for ranks in RANKS:
            found = host.ask((ranks, False))
            say(f"{ranks} ranks: {found}")
            found |= {name: found[name] / found["per_s"] for name in PROCESSES}
            limit = 1000 / found["coordinator"]
            lines.append(
                f"| {ranks} | {found['per_s']:.0f} | {found['uneven']:.0f} | {found['coordinator']:.2f}"
                f" | {found['raylet and GCS']:.2f} | {found['tasks']:.2f} | {found['ranks']:.2f} | {limit:.0f}"
                f" | {limit * SAMPLES:,.0f} |"
            )
        slow = {name: ms / 1000 for name, ms in host.ask((2, True)).items()}
    needed = DECODERS * PER_CPU_S
    return [
        f"Tasks of {SAMPLES} samples that decode nothing and return {PAYLOAD_BYTES // 1024} KB. The coordinator is one"
        " process with one thread, so that its CPU a task is the limit of a whole cluster (last columns).",
        f"{DECODERS} CPUs that decode {PER_CPU_S} images a second each need {needed / SAMPLES:,.0f} tasks a second of"
        f" {SAMPLES} samples, or {needed / 1024:,.0f} of 1024.",
        "",
        "| ranks | tasks/s on this machine | largest lead of a rank, tasks | coordinator, ms/task | raylet and GCS"
        " | tasks | all ranks | coordinator's limit, tasks/s | samples/s |",
        "|---|---|---|---|---|---|---|---|---|",
        *lines,
        "",
        f"Two ranks that take {SLOW_S:g} s for a step, with tasks of {SLOW_BYTES >> 20} MB and a full object store: the"
        f" coordinator takes {slow['coordinator']:.2f} of a core, and raylet and GCS {slow['raylet and GCS']:.2f}.",
    ]


def main() -> None:
    """Answers the numbers of ranks that `section` asks for."""
    from jobs.runtime.cluster import set_environment

    set_environment()
    from tests.benchmarks.ray_contenders import own_ray

    Host.serve(measure, own_ray(_STORE_MB << 20))


if __name__ == "__main__":
    main()
