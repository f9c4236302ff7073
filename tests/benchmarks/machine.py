"""Where and when a table was measured."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

from jobs.runs import revision


def describe_machine() -> str:
    """One line: date, revision, processor, cores, memory."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory_kb = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    cores = len(os.sched_getaffinity(0))
    today = datetime.date.today().isoformat()
    return f"{today}, revision {revision()}, {cores} shared cores of {cpu}, {memory_kb / 1e6:.0f} GB"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
