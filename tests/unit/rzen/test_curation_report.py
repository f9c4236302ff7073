"""The page of a curation: counts, explanations and examples, whatever the texts are."""

import io
import re
from dataclasses import replace

import numpy as np
from rich.console import Console

from pipelines.curate import exact, filters, leakage, near, semantic
from rzen.report.curation import (
    REASONS,
    ClusterExample,
    CurationReport,
    DropExample,
    SourceWeights,
    counts_table,
    render_curation,
)
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


def test_weights_have_a_table_a_plot_for_each_source_and_their_clusters() -> None:
    weights = np.array([0.1] * 30 + [0.25] * 1000 + [0.5] * 10, np.float32)
    cluster = ClusterExample(1200, ["a", EVIL], 0.1, [Hit(0, None, "image", EVIL, EVIL, [PICTURE])])
    report = replace(
        REPORT, weights={"a": SourceWeights(weights, 258), EVIL: SourceWeights(weights[:5], 0)}, clusters=[cluster]
    )
    page = render_curation(replace(report, num_clusters=40)).decode()
    (table,) = re.findall(r'<table aria-labelledby="weights-title">.*?</table>', page, re.DOTALL)
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert rows == [["1,200", "1,040", "258", "0.1", "0.25", "0.5"], ["30", "5", "0", "0.1", "0.1", "0.1"]]
    assert page.count("<figure>") == 2
    assert "Weights, a" in page
    assert "1 of 40 full clusters" in page
    assert "1,200 samples of <bdi>a</bdi>, <bdi>&lt;script&gt;" in page
    assert "<script" not in page
    assert 'href="#weights"' in page
    assert 'id="weights"' not in render_curation(REPORT).decode()


def test_the_terminal_shows_sources_with_drops() -> None:
    console = Console(width=120, color_system=None, file=io.StringIO())
    console.print(counts_table(REPORT.samples, REPORT.dropped))
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
