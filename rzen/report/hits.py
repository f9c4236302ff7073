"""What a search found, and how a terminal shows it."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.table import Table
from rich.text import Text

from pipelines.samples import Modality, UInt8Array


@dataclass(frozen=True, slots=True)
class Hit:
    """One result of a search.

    `rank` counts from 1, `score` is the cosine with the query, None where it is not known. `title` is the caption, or
    the text itself for a text, `origin` the file (and page or line in it). `thumbnails` are uint8 RGB `[H, W, 3]` of
    any size: one for an image or a page, the frames of a video in order, none for a text. `relevant` marks a right
    answer, where it is known which these are.
    """

    rank: int
    score: float | None
    modality: Modality
    title: str
    origin: str
    thumbnails: list[UInt8Array] = field(default_factory=list)
    relevant: bool = False


@dataclass(frozen=True, slots=True)
class Search:
    """A query and its hits, best first. `thumbnails` are those of a query that shows something."""

    query: str
    hits: list[Hit]
    thumbnails: list[UInt8Array] = field(default_factory=list)


def terminal_hits(search: Search) -> Table:
    """The ranked hits of `search` as a table for `rich.console.Console.print`."""
    table = Table(title=_plain(search.query), title_justify="left", box=None, pad_edge=False)
    for name, justify in (("rank", "right"), ("score", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name in ("modality", "title", "origin"):
        table.add_column(name, overflow="fold")
    for hit in search.hits:
        table.add_row(
            str(hit.rank),
            "" if hit.score is None else f"{hit.score:.3f}",
            hit.modality,
            _plain(f"{hit.title} (the right answer)" if hit.relevant else hit.title),
            _plain(hit.origin, style="dim"),
        )
    return table


def _plain(text: str, style: str = "") -> Text:
    """`text` without rich markup and without control characters, which a terminal would obey."""
    return Text("".join(char if char.isprintable() else " " for char in text), style=style)
