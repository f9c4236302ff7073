"""Fills the template: everything from outside is escaped, nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from rzen.page.hits import MODALITIES, Hit, Search
from rzen.page.plots import inline_svg
from rzen.page.scores import score_tables
from rzen.page.thumbnails import Thumbnail, ThumbnailPool


@dataclass(frozen=True, slots=True)
class Card:
    """A hit with its pictures encoded, laid out as a contact sheet of `columns` by `rows`."""

    hit: Hit
    thumbnails: list[Thumbnail]
    columns: int
    rows: int


def write_page(
    path: Path,
    *,
    title: str,
    searches: Sequence[Search],
    results: Mapping[str, Any],
    plots: Mapping[str, str],
    facts: Mapping[str, str],
) -> None:
    """Write one HTML file that needs no network, no script and no other file. Equal input gives equal bytes.

    `results` is the content of results.json (`rows`, `settings`), which is expected beside `path` and is embedded
    whole. `plots` maps a caption to SVG text, `facts` a setting to its value. Raises `UserError` for a plot that is
    not SVG and `ValueError` for results that JSON cannot hold (NaN).
    """
    pool = ThumbnailPool()
    sheets = [(search.query, [_card(hit, pool) for hit in search.hits]) for search in searches]
    found = {hit.modality for search in searches for hit in search.hits}
    html = (
        _environment()
        .get_template("page.html.jinja")
        .render(
            title=title,
            sheets=sheets,
            modalities=[modality for modality in MODALITIES if modality in found],
            tables=score_tables(results.get("rows", [])),
            results=results,
            plots={name: inline_svg(svg, name, f"plot-{i}-") for i, (name, svg) in enumerate(plots.items())},
            facts=facts,
            thumbnails=pool.all(),
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # File names that are not UTF-8 reach us as lone surrogates, which no encoding holds.
    path.write_text(html, encoding="utf-8", errors="replace", newline="\n")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rzen.page", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment


def _card(hit: Hit, pool: ThumbnailPool) -> Card:
    num_frames = len(hit.thumbnails)
    columns = num_frames if num_frames <= 6 else min(8, (num_frames + 1) // 2)
    rows = -(-num_frames // max(columns, 1))
    return Card(hit, [pool.add(pixels) for pixels in hit.thumbnails], columns, rows)
