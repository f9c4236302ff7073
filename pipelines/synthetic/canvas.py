"""Pages of a PDF with text, drawn with pymupdf or with reportlab. Coordinates are points from the top left corner."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from pipelines.media.libraries import import_optional

Ink = tuple[float, float, float]
"""Red, green and blue in [0, 1]."""
Position = tuple[float, float]
PdfLibrary = Literal["pymupdf", "reportlab"]

WHITE: Ink = (1.0, 1.0, 1.0)


class Canvas(Protocol):
    """A document to which pages are added; every drawing goes to the last page."""

    def add_page(self, width: float, height: float) -> None:
        """Begin a page."""

    def rectangle(self, left: float, top: float, right: float, bottom: float, ink: Ink) -> None:
        """Fill a rectangle."""

    def polygon(self, points: Sequence[Position], ink: Ink) -> None:
        """Fill the area inside the points."""

    def polyline(self, points: Sequence[Position], ink: Ink, width: float) -> None:
        """Stroke a line with round joins and ends."""

    def line(self, start: Position, end: Position, ink: Ink, width: float) -> None:
        """Stroke a straight line."""

    def disc(self, center: Position, radius: float, ink: Ink) -> None:
        """Fill a circle."""

    def sector(self, center: Position, start: Position, degrees: float, ink: Ink) -> Position:
        """Fill a sector with a white edge, clockwise from the point `start` of its arc. Return the end of the arc."""

    def text(self, at: Position, lines: Sequence[str], size: int, pitch: float, bold: bool, ink: Ink) -> None:
        """Write lines in Helvetica. `at` is the start of the first baseline, `pitch` the distance of baselines."""

    def finish(self) -> bytes:
        """Return the PDF file, equal for equal drawings: it has no date and no random identifier."""


def open_canvas(library: PdfLibrary, title: str) -> Canvas:
    """Begin a document. Both libraries draw the same pages, in different bytes."""
    return _MupdfCanvas(title) if library == "pymupdf" else _ReportlabCanvas(title)


class _MupdfCanvas:
    def __init__(self, title: str) -> None:
        pymupdf = import_optional("pymupdf", "corpus.pdf_library", "reportlab")
        self._document: Any = pymupdf.open()
        self._document.set_metadata({"title": title})
        self._rect: Any = pymupdf.Rect
        self._shape: Any = None

    def add_page(self, width: float, height: float) -> None:
        self._commit()
        self._shape = self._document.new_page(width=width, height=height).new_shape()

    def _commit(self) -> None:
        if self._shape:
            self._shape.commit()

    def rectangle(self, left: float, top: float, right: float, bottom: float, ink: Ink) -> None:
        self._shape.draw_rect(self._rect(left, top, right, bottom))
        self._shape.finish(fill=ink, color=None)

    def polygon(self, points: Sequence[Position], ink: Ink) -> None:
        self._shape.draw_polyline(points)
        self._shape.finish(fill=ink, color=None, closePath=True)

    def polyline(self, points: Sequence[Position], ink: Ink, width: float) -> None:
        self._shape.draw_polyline(points)
        self._shape.finish(color=ink, width=width, lineJoin=1, lineCap=1, closePath=False)

    def line(self, start: Position, end: Position, ink: Ink, width: float) -> None:
        self._shape.draw_line(start, end)
        self._shape.finish(color=ink, width=width)

    def disc(self, center: Position, radius: float, ink: Ink) -> None:
        self._shape.draw_circle(center, radius)
        self._shape.finish(fill=ink, color=None)

    def sector(self, center: Position, start: Position, degrees: float, ink: Ink) -> Position:
        # A positive angle of this library runs counterclockwise.
        end = self._shape.draw_sector(center, start, -degrees, fullSector=True)
        self._shape.finish(fill=ink, color=WHITE, width=3, closePath=False)
        return end.x, end.y

    def text(self, at: Position, lines: Sequence[str], size: int, pitch: float, bold: bool, ink: Ink) -> None:
        # One call for all lines: the library looks up the font in each call.
        font = "hebo" if bold else "helv"
        self._shape.insert_text(at, lines, fontsize=size, lineheight=pitch / size, fontname=font, color=ink)

    def finish(self) -> bytes:
        self._commit()
        data: bytes = self._document.tobytes(deflate=True, no_new_id=True)
        self._document.close()
        return data


class _ReportlabCanvas:
    def __init__(self, title: str) -> None:
        from reportlab.pdfgen.canvas import Canvas as ReportlabCanvas

        self._buffer = io.BytesIO()
        self._canvas: Any = ReportlabCanvas(self._buffer, pageCompression=1, invariant=1)
        self._canvas.setTitle(title)
        self._height: float | None = None  # of the page; this library counts upwards from its bottom

    def add_page(self, width: float, height: float) -> None:
        if self._height is not None:
            self._canvas.showPage()
        self._height = height
        self._canvas.setPageSize((width, height))

    def _flip(self, point: Position) -> Position:
        assert self._height is not None
        return point[0], self._height - point[1]

    def _path(self, points: Sequence[Position]) -> Any:
        path = self._canvas.beginPath()
        path.moveTo(*self._flip(points[0]))
        for point in points[1:]:
            path.lineTo(*self._flip(point))
        return path

    def rectangle(self, left: float, top: float, right: float, bottom: float, ink: Ink) -> None:
        self._canvas.setFillColorRGB(*ink)
        self._canvas.rect(*self._flip((left, bottom)), right - left, bottom - top, stroke=0, fill=1)

    def polygon(self, points: Sequence[Position], ink: Ink) -> None:
        self._canvas.setFillColorRGB(*ink)
        path = self._path(points)
        path.close()
        self._canvas.drawPath(path, stroke=0, fill=1)

    def polyline(self, points: Sequence[Position], ink: Ink, width: float) -> None:
        self._canvas.setStrokeColorRGB(*ink)
        self._canvas.setLineWidth(width)
        self._canvas.setLineJoin(1)
        self._canvas.setLineCap(1)
        self._canvas.drawPath(self._path(points), stroke=1, fill=0)
        self._canvas.setLineJoin(0)
        self._canvas.setLineCap(0)

    def line(self, start: Position, end: Position, ink: Ink, width: float) -> None:
        self._canvas.setStrokeColorRGB(*ink)
        self._canvas.setLineWidth(width)
        self._canvas.line(*self._flip(start), *self._flip(end))

    def disc(self, center: Position, radius: float, ink: Ink) -> None:
        self._canvas.setFillColorRGB(*ink)
        self._canvas.circle(*self._flip(center), radius, stroke=0, fill=1)

    def sector(self, center: Position, start: Position, degrees: float, ink: Ink) -> Position:
        (x, y), (start_x, start_y) = self._flip(center), self._flip(start)
        radius = math.hypot(start_x - x, start_y - y)
        start_degrees = math.degrees(math.atan2(start_y - y, start_x - x))
        self._canvas.setFillColorRGB(*ink)
        self._canvas.setStrokeColorRGB(*WHITE)
        self._canvas.setLineWidth(3)
        box = (x - radius, y - radius, x + radius, y + radius)
        self._canvas.wedge(*box, start_degrees, -degrees, stroke=1, fill=1)
        end = math.radians(start_degrees - degrees)
        return self._flip((x + radius * math.cos(end), y + radius * math.sin(end)))

    def text(self, at: Position, lines: Sequence[str], size: int, pitch: float, bold: bool, ink: Ink) -> None:
        self._canvas.setFillColorRGB(*ink)
        self._canvas.setFont("Helvetica-Bold" if bold else "Helvetica", size)
        for number, line in enumerate(lines):
            self._canvas.drawString(*self._flip((at[0], at[1] + number * pitch)), line)

    def finish(self) -> bytes:
        self._canvas.save()
        return self._buffer.getvalue()
