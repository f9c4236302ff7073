"""Visual documents: PDF reports whose pages hold a heading, a paragraph, a chart and a table, all of it real text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from random import Random
from typing import Any

import pymupdf

from pipelines.synthetic.shapes import COLOURS, RGB, a

# What each report counts.
TOPICS: dict[str, str] = {
    "harbour traffic": "ships",
    "bird migration": "storks",
    "night trains": "riders",
    "wild honey": "jars",
    "tea exports": "crates",
    "museum visits": "visitors",
    "city cycling": "cyclists",
    "solar power": "panels",
    "river fish": "salmon",
    "apple harvest": "baskets",
    "book loans": "novels",
    "mountain huts": "guests",
}
CHARTS = ("bar", "line", "pie")
QUARTERS = ("Q1", "Q2", "Q3", "Q4")

# Points (1/72 inch). Blocks are large, so that a page of 100 pixels still shows them.
PAGE = pymupdf.Rect(0, 0, 420, 595)
_LEFT, _RIGHT = 24, 396
_HEADING_BASELINE, _PARAGRAPH_BASELINE, _FOOTER_BASELINE = 58, 84, 582
_UPPER, _LOWER = 122, 350
_BLOCK_HEIGHT = 212
_REGULAR, _BOLD = "helv", "hebo"
_INK, _GREY, _WHITE = (0.13, 0.14, 0.18), (0.5, 0.5, 0.54), (1.0, 1.0, 1.0)

Ink = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Page:
    """What is on a page; the numbers in it are drawn later and are in the chart, the table and the text alike."""

    topic: str
    chart: str
    chart_colour: str
    table_colour: str
    chart_first: bool

    @property
    def heading(self) -> str:
        """The topic with a capital, as printed."""
        return self.topic.capitalize()

    def wordings(self) -> list[str]:
        """All captions of the page. Each tells the whole of it."""
        chart, table = a(f"{self.chart_colour} {self.chart} chart"), a(f"{self.table_colour} table")
        upper, lower = (chart, table) if self.chart_first else (table, chart)
        return [
            f"report on {self.topic} with {upper} above {lower}",
            f"page about {self.topic}: {lower} below {upper}",
            f"{upper} above {lower} in a report on {self.topic}",
        ]


def all_pages() -> Iterator[Page]:
    """Every page once: 12 topics, 3 charts, 8 * 7 pairs of colours, 2 orders."""
    for topic, chart, colours, chart_first in product(TOPICS, CHARTS, permutations(COLOURS, 2), (True, False)):
        yield Page(topic, chart, *colours, chart_first)


def draw_document(pages: Sequence[Page], title: str, rng: Random) -> bytes:
    """The bytes of a PDF file with a text layer, equal for equal arguments: no date, no random file identifier."""
    with pymupdf.open() as document:
        document.set_metadata({"title": title})
        for number, page in enumerate(pages, start=1):
            _draw_page(document, page, f"{title}, page {number} of {len(pages)}", rng)
        data: bytes = document.tobytes(deflate=True, no_new_id=True)
    return data


def _draw_page(document: Any, page: Page, footer: str, rng: Random) -> None:
    counts = [rng.randint(40, 99) for _ in QUARTERS]
    canvas = document.new_page(width=PAGE.width, height=PAGE.height).new_shape()
    _text(canvas, _LEFT, _HEADING_BASELINE, page.heading, size=42, bold=True)
    _text(canvas, _LEFT, _PARAGRAPH_BASELINE, *_paragraph(page.topic, counts), size=12)
    chart_top, table_top = (_UPPER, _LOWER) if page.chart_first else (_LOWER, _UPPER)
    _CHART_PAINTERS[page.chart](canvas, chart_top, counts, COLOURS[page.chart_colour])
    _draw_table(canvas, table_top, TOPICS[page.topic], counts, COLOURS[page.table_colour])
    _text(canvas, _LEFT, _FOOTER_BASELINE, footer, size=9, colour=_GREY)
    canvas.commit()


def _paragraph(topic: str, counts: list[int]) -> tuple[str, str]:
    best = max(range(len(counts)), key=counts.__getitem__)
    change = counts[-1] - counts[0]
    verdict = f"rose by {change}" if change > 0 else f"fell by {-change}" if change < 0 else "did not change"
    return (
        f"This page sums up a year of {topic}, quarter by quarter.",
        f"The best was {QUARTERS[best]} with {counts[best]} {TOPICS[topic]}; over the year they {verdict}.",
    )


def _draw_table(canvas: Any, top: float, unit: str, counts: list[int], colour: RGB) -> None:
    """A header and a first column in full colour, rows in tints of it."""
    height, edges = _BLOCK_HEIGHT / (len(counts) + 1), (_LEFT, 148, 272, _RIGHT)
    _fill(canvas, pymupdf.Rect(_LEFT, top, _RIGHT, top + height), colour)
    _fill(canvas, pymupdf.Rect(_LEFT, top + height, edges[1], top + _BLOCK_HEIGHT), colour)
    for i in range(1, len(counts) + 1):
        row = pymupdf.Rect(edges[1], top + i * height, _RIGHT, top + (i + 1) * height)
        _fill(canvas, row, colour, 0.55 if i % 2 else 0.25)
    shares = [f"{100 * count / sum(counts):.0f}%" for count in counts]
    columns = {"Quarter": QUARTERS, unit.capitalize(): [str(count) for count in counts], "Share": shares}
    for i, (title, cells) in enumerate(columns.items()):
        x, baseline = edges[i] + 12, top + height / 2 + 6
        _text(canvas, x, baseline, title, size=16, bold=True, colour=_on(colour))
        ink = _on(colour) if i == 0 else _INK
        _text(canvas, x, baseline + height, *cells, size=16, pitch=height, colour=ink)


def _draw_bars(canvas: Any, top: float, counts: list[int], colour: RGB) -> None:
    pitch, bottom = (_RIGHT - _LEFT) / len(counts), top + _BLOCK_HEIGHT - 22
    for i, count in enumerate(counts):
        left, height = _LEFT + i * pitch + 8, count / 100 * (_BLOCK_HEIGHT - 22)
        _fill(canvas, pymupdf.Rect(left, bottom - height, left + pitch - 16, bottom), colour)
        _text(canvas, left + 8, bottom - 8, str(count), size=14, bold=True, colour=_on(colour))
    _draw_axis(canvas, bottom)


def _draw_line(canvas: Any, top: float, counts: list[int], colour: RGB) -> None:
    """A thick line with dots over a tinted area."""
    pitch, bottom = (_RIGHT - _LEFT) / len(counts), top + _BLOCK_HEIGHT - 22
    points = [
        pymupdf.Point(_LEFT + (i + 0.5) * pitch, bottom - count / 100 * (_BLOCK_HEIGHT - 46))
        for i, count in enumerate(counts)
    ]
    canvas.draw_polyline([(points[0].x, bottom), *points, (points[-1].x, bottom)])
    canvas.finish(fill=_ink(colour, 0.3), color=None, closePath=True)
    canvas.draw_polyline(points)
    canvas.finish(color=_ink(colour), width=14, lineJoin=1, lineCap=1, closePath=False)
    for point, count in zip(points, counts, strict=True):
        canvas.draw_circle(point, 13)
        canvas.finish(fill=_ink(colour), color=None)
        _text(canvas, point.x - 9, point.y - 18, str(count), size=14, bold=True)
    _draw_axis(canvas, bottom)


def _draw_axis(canvas: Any, bottom: float) -> None:
    canvas.draw_line((_LEFT, bottom), (_RIGHT, bottom))
    canvas.finish(color=_INK, width=2)
    pitch = (_RIGHT - _LEFT) / len(QUARTERS)
    for i, quarter in enumerate(QUARTERS):
        _text(canvas, _LEFT + (i + 0.5) * pitch - 10, bottom + 18, quarter, size=14)


def _draw_pie(canvas: Any, top: float, counts: list[int], colour: RGB) -> None:
    """Sectors parted by white lines, in tints of one colour."""
    centre, radius = pymupdf.Point(PAGE.width / 2, top + _BLOCK_HEIGHT / 2), _BLOCK_HEIGHT / 2 - 2
    rim, total = centre - (0, radius), sum(counts)
    # Sectors are filled in two parts, and some renderers let a hairline through between them.
    canvas.draw_circle(centre, radius - 1)
    canvas.finish(fill=_ink(colour, 0.85), color=None)
    for quarter, count, strength in zip(QUARTERS, counts, (1.0, 0.8, 0.9, 0.7), strict=True):
        turn = 360 * count / total
        # A positive angle runs against the clock; the sector function returns where its arc ends.
        end = canvas.draw_sector(centre, rim, -turn, fullSector=True)
        canvas.finish(fill=_ink(colour, strength), color=_WHITE, width=3, closePath=False)
        angle, reach = math.atan2(rim.y - centre.y, rim.x - centre.x) + math.radians(turn / 2), radius * 0.62
        x, baseline = centre.x + reach * math.cos(angle) - 10, centre.y + reach * math.sin(angle) + 5
        _text(canvas, x, baseline, quarter, size=14, bold=True, colour=_on(colour))
        rim = end


_CHART_PAINTERS = {"bar": _draw_bars, "line": _draw_line, "pie": _draw_pie}


def _fill(canvas: Any, area: Any, colour: RGB, strength: float = 1.0) -> None:
    canvas.draw_rect(area)
    canvas.finish(fill=_ink(colour, strength), color=None)


def _text(
    canvas: Any,
    x: float,
    baseline: float,
    *lines: str,
    size: int,
    pitch: float = 16,
    bold: bool = False,
    colour: Ink = _INK,
) -> None:
    """Lines of text, `pitch` points apart. One call for all of them: the library looks the font up in each."""
    font = _BOLD if bold else _REGULAR
    canvas.insert_text((x, baseline), lines, fontsize=size, lineheight=pitch / size, fontname=font, color=colour)


def _ink(colour: RGB, strength: float = 1.0) -> Ink:
    """The colour in [0, 1], thinned with white."""
    red, green, blue = (1 - strength * (1 - channel / 255) for channel in colour)
    return (red, green, blue)


def _on(colour: RGB) -> Ink:
    """White on dark colours, dark on light ones (luma of ITU-R BT.601)."""
    red, green, blue = colour
    return _WHITE if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else _INK
