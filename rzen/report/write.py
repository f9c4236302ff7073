"""The page of a search: hits, scores, plots, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.samples import MODALITIES
from rzen.report.hits import Search
from rzen.report.render import make_card, make_query_card, write_html
from rzen.report.scores import score_tables
from rzen.report.thumbnails import ThumbnailPool


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

    `results` is the content of results.json (`rows`, `settings`), which is embedded
    whole. `plots` maps a caption to SVG text, `facts` a setting to its value. Raises `UserError` for a plot that is
    not SVG and `ValueError` for results that JSON cannot hold (NaN).
    """
    pool = ThumbnailPool()
    sheets = [
        (search.query, make_query_card(search, pool), [make_card(hit, pool) for hit in search.hits])
        for search in searches
    ]
    found = {hit.modality for search in searches for hit in search.hits}
    tables = score_tables(results.get("rows", []))
    write_html(
        path,
        "page.html.jinja",
        title=title,
        sections={"searches": sheets, "evaluation": tables, "plots": plots, "settings": facts},
        sheets=sheets,
        modalities=[modality for modality in MODALITIES if modality in found],
        tables=tables,
        results=results,
        plots=plots,
        facts=facts,
        pool=pool,
    )
