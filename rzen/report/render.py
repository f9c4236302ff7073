"""Fills a template: everything from outside is escaped, nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from pipelines.errors import UserError
from pipelines.samples import Modality
from rzen.report.hits import Hit, Search
from rzen.report.plots import inline_svg
from rzen.report.thumbnails import Thumbnail, ThumbnailPool

_GENERATOR = b'<meta name="generator" content="rzen">'
_HEAD_BYTES = 1000


@dataclass(frozen=True, slots=True)
class Card:
    """A hit with its pictures encoded, laid out as a contact sheet of `columns` by `rows`."""

    hit: Hit
    thumbnails: list[Thumbnail]
    columns: int
    rows: int


def write_html(
    path: Path,
    template: str,
    *,
    plots: Mapping[str, str],
    facts: Mapping[str, str],
    pool: ThumbnailPool,
    **content: Any,
) -> None:
    """Write what `render_html` returns to a file. Raises `UserError` for a file that is there and is no report."""
    html = render_html(template, plots=plots, facts=facts, pool=pool, **content)
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(html)


def render_html(
    template: str,
    *,
    plots: Mapping[str, str],
    facts: Mapping[str, str],
    pool: ThumbnailPool,
    refresh_s: int = 0,
    **content: Any,
) -> bytes:
    """One HTML file that needs no network, no script and no other file. Equal input gives equal bytes.

    `plots` maps a caption to SVG text, `facts` a setting to its value, `pool` holds all pictures of the page. A browser
    reads the page again after `refresh_s` seconds, and never if that is 0. Raises `UserError` for a plot that is not
    SVG and `ValueError` for numbers that JSON cannot hold (NaN).
    """
    svgs = {name: inline_svg(svg, name, f"plot-{i}-") for i, (name, svg) in enumerate(plots.items())}
    rendered = _environment().get_template(template)
    html = rendered.render(plots=svgs, facts=facts, thumbnails=pool.all(), refresh_s=refresh_s, **content)
    # File names that are not UTF-8 reach us as lone surrogates, which no encoding holds.
    return html.encode("utf-8", errors="replace")


def check_replaceable(path: Path) -> None:
    """Raise `UserError` for a file that is there and is no report of ours."""
    if path.is_file() and _GENERATOR not in path.read_bytes()[:_HEAD_BYTES]:
        raise UserError(str(path), "is a file that rzen did not write", "name a new file, or move this one away")


def make_card(hit: Hit, pool: ThumbnailPool) -> Card:
    """A hit with its pictures in the pool."""
    num_frames = len(hit.thumbnails)
    columns = num_frames if num_frames <= 6 else min(8, (num_frames + 1) // 2)
    rows = -(-num_frames // max(columns, 1))
    return Card(hit, [pool.add(pixels) for pixels in hit.thumbnails], columns, rows)


def make_query_card(search: Search, pool: ThumbnailPool) -> Card | None:
    """What the query of a search shows, with its pictures in the pool; None for words alone."""
    if not search.thumbnails:
        return None
    modality: Modality = "image" if len(search.thumbnails) == 1 else "video"
    return make_card(Hit(0, None, modality, search.query, "", search.thumbnails), pool)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rzen.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment
