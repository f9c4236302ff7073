"""What a job tells while it runs: bars on a terminal, one readable line every so often in a log."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)
_LINES = 5  # of a piece of work, where nobody asks for another interval
_STATES = {"queued": "dim", "starting": "", "running": "", "restart": "yellow", "finished": "green", "failed": "red"}


def say(text: str, style: str = "") -> None:
    """One line, without markup."""
    console.print(text, style=style, markup=False)


class _Throughput:
    """How fast one piece of work goes since it was first seen, and when a log is due another line of it."""

    def __init__(self, done: int) -> None:
        self._began_s, self._begun = time.monotonic(), done
        self._told: int | None = None

    def rate(self, done: int) -> float:
        elapsed_s = time.monotonic() - self._began_s
        return (done - self._begun) / elapsed_s if elapsed_s > 0 else 0.0

    def left(self, done: int, total: int) -> str:
        rate = self.rate(done)
        return duration((total - done) / rate) if rate and done < total else ""

    def log(self, name: str, unit: str, done: int, total: int, note: str, every: int) -> None:
        """Prints a line every `every` (0: every fifth of `total`)."""
        every = every or max(1, total // _LINES)
        if self._told is None:
            self._told = self._begun // every
        mark = done // every if done < total else total + 1
        if mark > self._told:
            self._told = mark
            left = self.left(done, total)
            rate = self.rate(done)
            speed = f" ({rate:.1f}/s{f', {left} left' if left else ''})" if rate else ""
            note = f"  {note}" if note else ""
            say(f"  {name}: {unit} {done:,}/{total:,}{speed}{note}")


class Bars:
    """Several pieces of work, each with a name, so many of so many done, and a note."""

    def __init__(self) -> None:
        self._progress = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", style="dim"),
            TimeElapsedColumn(),
            TextColumn("left", style="dim"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._bars: dict[str, Any] = {}
        self._paces: dict[str, _Throughput] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, name: str, done: int, total: int, unit: str = "samples", note: str = "") -> None:
        """`done` of `total` so far. Without a terminal, there are a few lines in all."""
        pace = self._paces.setdefault(name, _Throughput(done))
        if not console.is_terminal:
            pace.log(name, unit, done, total, note, every=0)
            return
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=total, completed=done, rate="", note="")
        rate = pace.rate(done)
        rate_text = f"{rate:.1f} {unit}/s" if rate else ""
        self._progress.update(self._bars[name], completed=done, total=total, rate=rate_text, note=note)


class RunTable:
    """Training runs side by side: a table on a terminal, lines in a log."""

    def __init__(self, names: Sequence[str]) -> None:
        self._states = dict.fromkeys(names, "queued")
        self._news: dict[str, Progress] = {}
        self._paces: dict[str, _Throughput] = {}
        self._lock = Lock()
        self._live = Live(get_renderable=self._table, console=console, refresh_per_second=4)

    def __enter__(self) -> Self:
        if console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._live.stop()

    def set_state(self, name: str, state: str, reason: str = "") -> None:
        """A run has come to another state, from any thread."""
        with self._lock:
            self._states[name] = state
            self._paces.pop(name, None)  # a start that takes a minute is not part of its speed
        if len(self._states) > 1 and (reason or not console.is_terminal):
            say(f"  {name}: {state}{f': {reason}' if reason else ''}", "red" if state == "failed" else "dim")

    def update(self, name: str, news: Progress, every: int) -> None:
        """What a run has posted. Without a terminal, a line is printed every `every` steps."""
        with self._lock:
            before, self._news[name] = self._news.get(name), news
            if news == before:
                return
            self._states[name] = "running"
            pace = self._paces.setdefault(name, _Throughput(news.done))
        if not console.is_terminal:
            pace.log(
                name, "steps", news.done, news.total, "  ".join(f"{k} {v}" for k, v in news.figures.items()), every
            )

    def states(self) -> dict[str, int]:
        """How many runs are in each state."""
        with self._lock:
            found = Counter(state.partition(" ")[0] for state in self._states.values())
        return {state: found[state] for state in _STATES}

    def _table(self) -> Table:
        with self._lock:
            states, news, paces = dict(self._states), dict(self._news), dict(self._paces)
        figures = list(dict.fromkeys(name for some in news.values() for name in some.figures))
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("run", "state", "", "step", *figures, "left"):
            table.add_column(title, no_wrap=True, justify="left" if title in ("run", "state", "") else "right")
        for name, state in states.items():
            some = news.get(name, Progress(0, 0))
            bar = ProgressBar(total=some.total or 1, completed=some.done, width=16)
            step = f"{some.done:,}/{some.total:,}" if some.total else ""
            left = paces[name].left(some.done, some.total) if name in paces else ""
            shown = (Text(some.figures.get(figure, "")) for figure in figures)
            table.add_row(Text(name), Text(state, _STATES[state.partition(" ")[0]]), bar, step, *shown, left)
        return table


def duration(seconds: float) -> str:
    """`7 s`, `1:05`, `2:03:09`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far some remote work is."""

    done: int
    total: int
    note: str = ""
    figures: Mapping[str, str] = field(default_factory=dict)
    """What one watches, by name."""


class ProgressTracker:
    """Where remote work leaves word of itself. Made into an actor by whoever needs one."""

    def __init__(self) -> None:
        self._news: dict[str, Progress] = {}
        self._stopping = False

    def post(self, name: str, news: Progress) -> None:
        """Replaces the news of `name`."""
        self._news[name] = news

    def stop(self) -> None:
        """Whoever waits for the work is about to go."""
        self._stopping = True

    def is_stopping(self) -> bool:
        """Whether `stop` was called: time for a checkpoint."""
        return self._stopping

    def news(self) -> dict[str, Progress]:
        """The newest of each name."""
        return self._news
