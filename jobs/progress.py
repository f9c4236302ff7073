"""What a job tells while it runs: bars on a terminal, one readable line every so often in a log."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)
_LINES = 5  # of a piece of work, where nobody asks for another interval


def say(text: str, style: str = "") -> None:
    """One line, without markup."""
    console.print(text, style=style, markup=False)


class Bars:
    """Several pieces of work, each with a name, so many of so many done, and a note."""

    def __init__(self) -> None:
        self._progress = Progress(
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
        self._started_at: dict[str, tuple[float, int]] = {}
        self._told: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, name: str, done: int, total: int, unit: str = "samples", note: str = "", every: int = 0) -> None:
        """`done` of `total` so far. Without a terminal, a line is printed every `every` (0: every fifth of `total`)."""
        begun_s, begun = self._started_at.setdefault(name, (time.monotonic(), done))
        elapsed_s = time.monotonic() - begun_s
        rate = (done - begun) / elapsed_s if elapsed_s > 0 else 0.0
        if console.is_terminal:
            if name not in self._bars:
                self._bars[name] = self._progress.add_task(name, total=total, completed=done, rate="", note="")
            rate_text = f"{rate:.1f} {unit}/s" if rate else ""
            self._progress.update(self._bars[name], completed=done, total=total, rate=rate_text, note=note)
            return
        mark = done // (every or max(1, total // _LINES)) if done < total else total + 1
        if mark > self._told.setdefault(name, done // (every or max(1, total // _LINES))):
            self._told[name] = mark
            left = f", {duration((total - done) / rate)} left" if rate and done < total else ""
            speed = f" ({rate:.1f}/s{left})" if rate else ""
            note = f"  {note}" if note else ""
            say(f"  {name}: {unit} {done:,}/{total:,}{speed}{note}")


def duration(seconds: float) -> str:
    """`7 s`, `1:05`, `2:03:09`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass(frozen=True, slots=True)
class News:
    """How far some remote work is."""

    done: int
    total: int
    note: str = ""


class Board:
    """Where remote work leaves word of itself. Made into an actor by whoever needs one."""

    def __init__(self) -> None:
        self._news: dict[str, News] = {}

    def post(self, name: str, done: int, total: int, note: str = "") -> None:
        """Replaces the news of `name`."""
        self._news[name] = News(done, total, note)

    def news(self) -> dict[str, News]:
        """The newest of each name."""
        return self._news
