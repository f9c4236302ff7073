"""Where and when a table was measured."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

from jobs.runtime.revision import revision


def describe_machine(device: str | None = None) -> str:
    """One line: date, revision, processor, cores, memory; with a device of torch its name, and the version of torch."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory_kb = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    cores = len(os.sched_getaffinity(0))
    today = datetime.date.today().isoformat()
    machine = f"{today}, revision {revision()}, {cores} shared cores of {cpu}, {memory_kb / 1e6:.0f} GB"
    return machine if device is None else f"{machine}, {_describe(device)}"


def _describe(device: str) -> str:
    import torch

    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
