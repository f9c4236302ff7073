"""The page of a curation: counts, explanations and examples, whatever the texts are."""

import io
import re
from dataclasses import replace

import numpy as np
from rich.console import Console

from pipelines.curate import exact, filters, leakage, near, semantic
from rzen.report.curation import REASONS, CurationReport, DropExample, counts_table, render_curation
from rzen.report.hits import Hit

EVIL = "<script>alert(1)</script>"
PICTURE = np.full((20, 30, 3), 90, np.uint8)
REPORT = CurationReport(
    title=f"Curation of {EVIL}",
    samples={"a": 1200, EVIL: 30, "c": 7},
    dropped={"near_media": {"a": 1000, EVIL: 2}, "leak_text": {"a": 1}},
    compared_with={f"bench {EVIL}": 12},
    examples={
        "near_media": [DropExample(f"a/{EVIL}", "a/0", 0.25, [Hit(0, None, "image", EVIL, EVIL, [PICTURE])])],
        "leak_text": [DropExample("a/1", EVIL, 0.0, [Hit(0, None, "text", EVIL, "query")])],
    },
    facts={"near.of": EVIL},
)


def test_texts_are_escaped_and_nothing_is_fetched() -> None:
    page = render_curation(REPORT).decode()
    assert "<script" not in page
    assert not re.search(r"""(src|href)=["']https?:""", page)
    assert page.count("&lt;script&gt;") > 8
    assert "A sample that was kept shows nearly the same" in page
    assert "1,002" in page
    assert "0.25" in page
    assert page.count('<image id="thumbnail-') == 1


def test_equal_reports_are_equal_bytes() -> None:
    assert render_curation(REPORT) == render_curation(replace(REPORT))
    assert render_curation(replace(REPORT, dropped={}, examples={}, compared_with={}))


def test_the_terminal_shows_sources_with_drops() -> None:
    console = Console(width=120, color_system=None, file=io.StringIO())
    console.print(counts_table(REPORT))
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert lines == [
        ["left", "out", "for", "a", EVIL, "all"],
        ["near_media", "1,000", "2", "1,002"],
        ["leak_text", "1", "0", "1"],
    ]


def test_every_reason_is_explained() -> None:
    known = {exact.PAIR, exact.TARGET, near.MEDIA, near.TEXT, leakage.FILE, leakage.MEDIA, leakage.TEXT}
    known |= {semantic.MISALIGNED, semantic.DUPLICATE, semantic.FULL, *filters.REASONS}
    assert known == REASONS.keys()
