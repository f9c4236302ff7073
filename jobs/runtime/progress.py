"""What a job prints while it runs: progress bars on a terminal, a line from time to time in a log."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from types import TracebackType
from typing import Any, Self

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from pipelines.redaction import printable, redact_text


class _SafeConsole(Console):
    """Prints what it is given without the control characters in it: names of files and captions come from others."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of a renderable. Rich's own control codes are not part of their text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(redact_text(segment.text)), segment.style)


console = _SafeConsole(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)
_LINES = 5  # of a piece of work in a log, unless another interval is given
_STATES = {"queued": "dim", "starting": "", "running": "", "restart": "yellow", "finished": "green", "failed": "red"}


_ERROR = "red"
_is_quiet = False


@contextmanager
def quiet() -> Iterator[None]:
    """Print errors and results only while the block runs: no progress and no lines of `say` that are not red.

    What a job prints with `console` itself, such as a table of scores, is a result.
    """
    global _is_quiet
    before, _is_quiet = _is_quiet, True
    try:
        yield
    finally:
        _is_quiet = before


def is_quiet() -> bool:
    """Return whether only errors and results are printed."""
    return _is_quiet


def say(text: str, style: str = "") -> None:
    """Print one line about the progress of a job, without markup. Red ones are errors."""
    if not _is_quiet or style == _ERROR:
        console.print(text, style=style, markup=False)


class _Throughput:
    """Measures the rate of one piece of work since it was first seen, and prints log lines of it."""

    def __init__(self, done: int) -> None:
        self._began_s, self._begun = time.monotonic(), done
        self._printed: int | None = None

    def rate(self, done: int) -> float:
        elapsed_s = time.monotonic() - self._began_s
        return (done - self._begun) / elapsed_s if elapsed_s > 0 else 0.0

    def left(self, done: int, total: int) -> str:
        rate = self.rate(done)
        return duration((total - done) / rate) if rate and done < total else ""

    def log(self, name: str, unit: str, done: int, total: int, note: str, every: int) -> None:
        """Print a line every `every` units (0: every fifth of `total`)."""
        every = every or max(1, total // _LINES)
        if self._printed is None:
            self._printed = self._begun // every
        mark = done // every if done < total else total + 1
        if mark > self._printed:
            self._printed = mark
            left = self.left(done, total)
            rate = self.rate(done)
            speed = f" ({rate:.1f}/s{f', {left} left' if left else ''})" if rate else ""
            note = f"  {note}" if note else ""
            say(f"  {name}: {unit} {done:,}/{total:,}{speed}{note}")


class Bars:
    """Progress of several pieces of work, each with a name, the number done, the total and a note."""

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
            disable=not console.is_terminal or _is_quiet,
        )
        self._bars: dict[str, Any] = {}
        self._paces: dict[str, _Throughput] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, name: str, done: int, total: int, unit: str = "samples", note: str = "") -> None:
        """Show that `done` of `total` are done. Without a terminal, print a few lines in all."""
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
    """Progress of parallel training runs: a table on a terminal, lines in a log."""

    def __init__(self, names: Sequence[str]) -> None:
        self._states = dict.fromkeys(names, "queued")
        self._news: dict[str, Progress] = {}
        self._paces: dict[str, _Throughput] = {}
        self._lock = Lock()
        self._live = Live(get_renderable=self._table, console=console, refresh_per_second=4)

    def __enter__(self) -> Self:
        if console.is_terminal and not _is_quiet:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._live.stop()

    def set_state(self, name: str, state: str, reason: str = "") -> None:
        """Change the state of a run. Any thread may call this."""
        with self._lock:
            self._states[name] = state
            self._paces.pop(name, None)  # the start, which takes up to a minute, is not part of the rate
        if len(self._states) > 1 and (reason or not console.is_terminal):
            say(f"  {name}: {state}{f': {reason}' if reason else ''}", _ERROR if state == "failed" else "dim")

    def update(self, name: str, news: Progress, every: int) -> None:
        """Show the progress of a run. Without a terminal, print a line every `every` steps."""
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
        """Return the number of runs in each state."""
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
    """Return seconds as text: `7 s`, `1:05`, `2:03:09`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a piece of remote work."""

    done: int
    total: int
    figures: Mapping[str, str] = field(default_factory=dict)
    """Figures to show, by name."""


class ProgressTracker:
    """Collects the progress of remote work. Its users make it a Ray actor."""

    def __init__(self) -> None:
        self._progress: dict[str, Progress] = {}
        self._stopping = False
        self._notes: list[tuple[str, str]] = []

    def post(self, name: str, progress: Progress) -> None:
        """Replace the progress of `name`."""
        self._progress[name] = progress

    def note(self, name: str, text: str) -> None:
        """Keep what the user should know of `name` until the driver takes it."""
        self._notes.append((name, text))

    def take_notes(self) -> list[tuple[str, str]]:
        """Return name and text of each note since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def stop(self) -> None:
        """Announce that the job is about to end."""
        self._stopping = True

    def is_stopping(self) -> bool:
        """Return whether `stop` was called and a last checkpoint is due."""
        return self._stopping

    def progress(self) -> dict[str, Progress]:
        """Return the newest progress of each name."""
        return self._progress
