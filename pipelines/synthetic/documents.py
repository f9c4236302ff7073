"""Visual documents: PDF reports with a text layer. A page has a banner with heading and text, a chart and a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random

from pipelines.synthetic.canvas import WHITE, Canvas, Ink, PdfLibrary, Position, open_canvas
from pipelines.synthetic.shapes import COLOURS, RGB, Combinations, a

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
PAGE_WIDTH, PAGE_HEIGHT = 420, 595
_LEFT, _RIGHT = 24, 396
_HEADING_BASELINE, _PARAGRAPH_BASELINE, _FOOTER_BASELINE = 58, 84, 582
_UPPER, _LOWER = 122, 350
_BANNER_HEIGHT = 112
_BLOCK_HEIGHT = 212
_INK, _GREY = (0.13, 0.14, 0.18), (0.5, 0.5, 0.54)


@dataclass(frozen=True, slots=True)
class Page:
    """What is on a page. The numbers are drawn later, and are the same in the chart, the table and the text."""

    topic: str
    chart: str
    banner: str
    chart_colour: str
    table_colour: str
    chart_first: bool

    @property
    def heading(self) -> str:
        """The topic with a capital letter, as printed."""
        return self.topic.capitalize()

    def wordings(self) -> list[str]:
        """Return all captions of the page. Each describes it completely."""
        chart, table = a(f"{self.chart_colour} {self.chart} chart"), a(f"{self.table_colour} table")
        banner = a(f"{self.banner} banner")
        upper, lower = (chart, table) if self.chart_first else (table, chart)
        return [
            f"report on {self.topic} with {upper} above {lower} and {banner}",
            f"page about {self.topic} with {banner}: {lower} below {upper}",
            f"{banner}, {upper} above {lower} in a report on {self.topic}",
        ]


def all_pages() -> Combinations[Page]:
    """Return every page once: 12 topics, 3 charts, 8 * 7 * 6 colors of banner, chart and table, 2 orders."""
    return Combinations(_page, [*TOPICS], CHARTS, [*permutations(COLOURS, 3)], (True, False))


def _page(topic: str, chart: str, colours: tuple[str, str, str], chart_first: bool) -> Page:
    return Page(topic, chart, *colours, chart_first)


def draw_document(pages: Sequence[Page], title: str, rng: Random, library: PdfLibrary) -> bytes:
    """Return a PDF file with a text layer. Equal arguments give equal bytes, with equal versions of the library."""
    canvas = open_canvas(library, title)
    for number, page in enumerate(pages, start=1):
        canvas.add_page(PAGE_WIDTH, PAGE_HEIGHT)
        _draw_page(canvas, page, f"{title}, page {number} of {len(pages)}", rng)
    return canvas.finish()


def _draw_page(canvas: Canvas, page: Page, footer: str, rng: Random) -> None:
    counts = [rng.randint(40, 99) for _ in QUARTERS]
    canvas.rectangle(0, 0, PAGE_WIDTH, _BANNER_HEIGHT, _tint(COLOURS[page.banner]))
    ink = _readable_on(COLOURS[page.banner])
    _text(canvas, _LEFT, _HEADING_BASELINE, page.heading, size=42, bold=True, ink=ink)
    _text(canvas, _LEFT, _PARAGRAPH_BASELINE, *_paragraph(page.topic, counts), size=12, ink=ink)
    chart_top, table_top = (_UPPER, _LOWER) if page.chart_first else (_LOWER, _UPPER)
    _CHART_PAINTERS[page.chart](canvas, chart_top, counts, COLOURS[page.chart_colour])
    _draw_table(canvas, table_top, TOPICS[page.topic], counts, COLOURS[page.table_colour])
    _text(canvas, _LEFT, _FOOTER_BASELINE, footer, size=9, ink=_GREY)


def _paragraph(topic: str, counts: list[int]) -> tuple[str, str]:
    best = max(range(len(counts)), key=counts.__getitem__)
    change = counts[-1] - counts[0]
    if change > 0:
        verdict = f"rose by {change}"
    elif change < 0:
        verdict = f"fell by {-change}"
    else:
        verdict = "did not change"
    return (
        f"This page sums up a year of {topic}, quarter by quarter.",
        f"The best was {QUARTERS[best]} with {counts[best]} {TOPICS[topic]}; over the year they {verdict}.",
    )


def _draw_table(canvas: Canvas, top: float, unit: str, counts: list[int], colour: RGB) -> None:
    """Draw a header and a first column in full color, and rows in tints of it."""
    height, edges = _BLOCK_HEIGHT / (len(counts) + 1), (_LEFT, 148, 272, _RIGHT)
    canvas.rectangle(_LEFT, top, _RIGHT, top + height, _tint(colour))
    canvas.rectangle(_LEFT, top + height, edges[1], top + _BLOCK_HEIGHT, _tint(colour))
    for i in range(1, len(counts) + 1):
        tint = _tint(colour, 0.55 if i % 2 else 0.25)
        canvas.rectangle(edges[1], top + i * height, _RIGHT, top + (i + 1) * height, tint)
    shares = [f"{100 * count / sum(counts):.0f}%" for count in counts]
    columns = {"Quarter": QUARTERS, unit.capitalize(): [str(count) for count in counts], "Share": shares}
    for i, (title, cells) in enumerate(columns.items()):
        x, baseline = edges[i] + 12, top + height / 2 + 6
        _text(canvas, x, baseline, title, size=16, bold=True, ink=_readable_on(colour))
        ink = _readable_on(colour) if i == 0 else _INK
        _text(canvas, x, baseline + height, *cells, size=16, pitch=height, ink=ink)


def _draw_bars(canvas: Canvas, top: float, counts: list[int], colour: RGB) -> None:
    pitch, bottom = (_RIGHT - _LEFT) / len(counts), top + _BLOCK_HEIGHT - 22
    for i, count in enumerate(counts):
        left, height = _LEFT + i * pitch + 8, count / 100 * (_BLOCK_HEIGHT - 22)
        canvas.rectangle(left, bottom - height, left + pitch - 16, bottom, _tint(colour))
        _text(canvas, left + 8, bottom - 8, str(count), size=14, bold=True, ink=_readable_on(colour))
    _draw_axis(canvas, bottom)


def _draw_line(canvas: Canvas, top: float, counts: list[int], colour: RGB) -> None:
    """Draw a thick line with dots over a tinted area."""
    pitch, bottom = (_RIGHT - _LEFT) / len(counts), top + _BLOCK_HEIGHT - 22
    points: list[Position] = []
    for i, count in enumerate(counts):
        points.append((_LEFT + (i + 0.5) * pitch, bottom - count / 100 * (_BLOCK_HEIGHT - 46)))
    area = [(points[0][0], bottom), *points, (points[-1][0], bottom)]
    canvas.polygon(area, _tint(colour, 0.3))
    canvas.polyline(points, _tint(colour), width=14)
    for (x, y), count in zip(points, counts, strict=True):
        canvas.disc((x, y), 13, _tint(colour))
        _text(canvas, x - 9, y - 18, str(count), size=14, bold=True)
    _draw_axis(canvas, bottom)


def _draw_axis(canvas: Canvas, bottom: float) -> None:
    canvas.line((_LEFT, bottom), (_RIGHT, bottom), _INK, width=2)
    pitch = (_RIGHT - _LEFT) / len(QUARTERS)
    for i, quarter in enumerate(QUARTERS):
        _text(canvas, _LEFT + (i + 0.5) * pitch - 10, bottom + 18, quarter, size=14)


def _draw_pie(canvas: Canvas, top: float, counts: list[int], colour: RGB) -> None:
    """Draw sectors with white edges, in tints of one color."""
    (x, y), radius = (PAGE_WIDTH / 2, top + _BLOCK_HEIGHT / 2), _BLOCK_HEIGHT / 2 - 2
    rim, total = (x, y - radius), sum(counts)
    # Sectors are filled in two parts, and some renderers let a hairline through between them.
    canvas.disc((x, y), radius - 1, _tint(colour, 0.85))
    for quarter, count, strength in zip(QUARTERS, counts, (1.0, 0.8, 0.9, 0.7), strict=True):
        degrees = 360 * count / total
        end = canvas.sector((x, y), rim, degrees, _tint(colour, strength))
        angle, reach = math.atan2(rim[1] - y, rim[0] - x) + math.radians(degrees / 2), radius * 0.62
        label_x, baseline = x + reach * math.cos(angle) - 10, y + reach * math.sin(angle) + 5
        _text(canvas, label_x, baseline, quarter, size=14, bold=True, ink=_readable_on(colour))
        rim = end


_CHART_PAINTERS: dict[str, Callable[[Canvas, float, list[int], RGB], None]] = {
    "bar": _draw_bars,
    "line": _draw_line,
    "pie": _draw_pie,
}


def _text(
    canvas: Canvas,
    x: float,
    baseline: float,
    *lines: str,
    size: int,
    pitch: float = 16,
    bold: bool = False,
    ink: Ink = _INK,
) -> None:
    canvas.text((x, baseline), lines, size, pitch, bold, ink)


def _tint(colour: RGB, strength: float = 1.0) -> Ink:
    """Return the color in [0, 1], mixed with white unless `strength` is 1."""
    red, green, blue = (1 - strength * (1 - channel / 255) for channel in colour)
    return (red, green, blue)


def _readable_on(colour: RGB) -> Ink:
    """Return white for a dark background and dark for a light one, by the luma of ITU-R BT.601."""
    red, green, blue = colour
    return WHITE if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else _INK
