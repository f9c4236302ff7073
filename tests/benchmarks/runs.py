"""Runs as lines of a file, which a repeated command completes, and tables of what they found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tests.benchmarks.turns import say

Run = dict[str, Any]
"""What a run found, as JSON, with its `cell` and its `seed`."""
T = TypeVar("T")


class RunFile:
    """A file of runs, one a line. A killed command leaves half a line, which is dropped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        self._half: str | None = "".join(whole) if len(whole) < len(lines) else None
        self.runs: dict[tuple[str, int], Run] = {(run["cell"], run["seed"]): run for run in map(json.loads, whole)}

    def missing(self, wanted: Mapping[tuple[str, int], T], *, only_read: bool = False) -> list[T]:
        """Return what is wanted and not in the file, in its order. Exits if something is, and `only_read`."""
        found = [some for place, some in wanted.items() if place not in self.runs]
        say(f"{len(wanted)} runs, {len(found)} to do")
        if found and only_read:
            raise SystemExit(
                f"{self._path}: {len(found)} of {len(wanted)} runs are missing; leave out --report to do them"
            )
        return found

    def add(self, run: Run) -> None:
        """Add a run, and write it at once."""
        if self._half is not None:
            self._path.write_text(self._half)
            self._half = None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(run) + "\n")
        self.runs[run["cell"], run["seed"]] = run


def points(found: tuple[float, float, float] | None) -> str:
    """Return a difference with its interval in points, bold where 0 is outside. None is an empty cell."""
    if found is None:
        return ""
    mean, low, high = (100 * value for value in found)
    text = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def percent(value: float | None) -> str:
    """Return a share in percent. None is an empty cell."""
    return "" if value is None else f"{100 * value:.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, and an empty one."""
    return [
        f"| {' | '.join(head)} |",
        f"|---|{'---:|' * (len(head) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
