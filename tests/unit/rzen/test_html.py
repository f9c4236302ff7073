import base64
import io
import json
import re
from html.parser import HTMLParser
from importlib import resources

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from pipelines.errors import UserError
from pipelines.samples import MODALITIES
from rzen.report.hits import Hit, Search, terminal_hits
from rzen.report.plots import inline_svg
from rzen.report.scores import score_tables, task_label
from rzen.report.thumbnails import ThumbnailPool
from rzen.report.write import write_page

HOSTILE = "</script><script>alert(1)</script> \"' onload=x & <img src=//evil.example/a.png>"
CSS = resources.files("rzen.report").joinpath("page.css").read_text()
VOID = {"meta", "input", "br", "img", "link", "hr"}


class Page(HTMLParser):
    """Collects elements and text, and fails on a tag that is not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.script = data
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def picture(seed, height=90, width=120):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def row(model, value, task="text_image", metric="hit@1", **more):
    return {
        "model": model, "task": task, "metric": metric, "value": value, "num_queries": 49, "num_candidates": 70, **more
    }  # fmt: skip


def plot():
    figure = Figure(figsize=(3, 2))
    axes = figure.subplots()
    axes.plot([3, 1, 2])
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "rzen"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def write(path, **parts):
    hits = [
        Hit(1, 0.91, "image", "a red ball", "a.png", [picture(1)]),
        Hit(2, 0.5, "video", "a blue box", "b.mp4", [picture(i) for i in (2, 3, 1, 2, 4, 5, 6)]),
        Hit(3, 0.25, "page", "a report", "c.pdf page 3", [picture(7, 211, 149)]),
        Hit(4, -0.1, "text", "words alone", "d.jsonl line 4"),
    ]
    given = {
        "title": "demo",
        "searches": [Search("red things", hits)],
        "results": {"rows": [row("before", 0.02, chance=1 / 70), row("soup", 0.75, chance=1 / 70)], "settings": {}},
        "plots": {"loss": plot(), "scores": plot()},
        "facts": {"seed": "7"},
    }
    write_page(path, **(given | parts))
    return path.read_text(encoding="utf-8")


def test_a_full_page_and_an_empty_one_are_balanced_with_unique_ids_and_resolved_references(tmp_path):
    for html in (
        write(tmp_path / "full.html"),
        write(tmp_path / "empty.html", searches=[], results={"rows": []}, plots={}, facts={}),
    ):
        elements = Page(html).elements
        ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
        links = [attributes.get("href", "") for _, attributes in elements]
        assert len(ids) == len(set(ids))
        assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
        for reference in re.findall(r"url\(#([^)]+)\)", html):
            assert reference in ids


def test_sections_follow_what_is_given(tmp_path):
    full = [s["id"] for s in Page(write(tmp_path / "a.html")).all("section")]
    bare = [s["id"] for s in Page(write(tmp_path / "b.html", searches=[], plots={})).all("section")]
    assert full == ["searches", "evaluation", "plots", "settings"]
    assert bare == ["evaluation", "settings"]


def test_nothing_is_fetched_and_no_script_runs(tmp_path):
    html = write(tmp_path / "page.html")
    page = Page(html)
    assert not re.search(r"(https?:)?//[\w.]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", html))
    assert all(s == {"type": "application/json", "id": "results"} for s in page.all("script"))
    assert page.all("link") == page.all("img") == []
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_hostile_text_stays_text_everywhere(tmp_path):
    hits = [
        Hit(1, 0.5, kind, HOSTILE, HOSTILE, [picture(1)] * n) for kind, n in (("image", 1), ("video", 3), ("text", 0))
    ]
    html = write(
        tmp_path / "page.html",
        title=HOSTILE,
        searches=[Search(HOSTILE, hits)],
        results={"rows": [row(HOSTILE, 0.5, task=HOSTILE, metric=HOSTILE)], "settings": {HOSTILE: HOSTILE}},
        plots={HOSTILE: plot()},
        facts={HOSTILE: HOSTILE},
    )
    page = Page(html)
    assert "<img" not in html
    assert html.count("<script") == html.count("</script") == 1
    assert not [attributes for _, attributes in page.elements if any(name.startswith("on") for name in attributes)]
    # title and h1; query; two titles and the quoted text; three origins; model and two heads; caption; name and value
    assert page.text.count(HOSTILE) == 2 + 1 + 3 + 3 + 3 + 1 + 2
    assert json.loads(page.script)["settings"] == {HOSTILE: HOSTILE}


def test_embedded_results_equal_the_input(tmp_path):
    results = {
        "rows": [row("soup", 0.1 + 0.2, chance=1 / 3), row("soup", 1.0, split="train")],
        "settings": {
            "note": "<!-- <script> \u2028 ü 漢",
            "big": 2**60,
            "none": None,
            "nested": [{"z": 1, "a": [True]}],
        },
    }
    assert json.loads(Page(write(tmp_path / "page.html", results=results)).script) == results
    with pytest.raises(ValueError, match="JSON compliant"):
        write(tmp_path / "nan.html", results={"rows": [], "settings": {"loss": float("nan")}})


def test_every_hit_shows_its_pictures_and_equal_pictures_are_stored_once(tmp_path):
    page = Page(write(tmp_path / "page.html"))
    shown = [use["href"][1:] for use in page.all("use") if use["href"].startswith("#thumbnail-")]
    images = {image["id"]: image for image in page.all("image")}
    first, *frames, report = shown
    assert len(frames) == 7
    assert (frames[0], frames[2]) == (frames[3], first)
    assert set(images) == set(shown) == {f"thumbnail-{i}" for i in range(7)}
    data = base64.b64decode(images[report]["href"].removeprefix("data:image/webp;base64,"))
    assert Image.open(io.BytesIO(data)).size == (113, 160)  # of 149 x 211
    labels = [d["aria-label"] for d in page.all("div") if d.get("class") == "media"]
    assert labels == ["image: a red ball", "7 frames of video: a blue box", "page: a report"]


def test_hits_show_rank_score_and_a_bar_between_zero_and_one(tmp_path):
    html = write(tmp_path / "page.html")
    assert re.findall(r'<span class="rank">(.*?)</span>.*?<span class="value">(.*?)</span>', html) == [
        ("1", "0.910"), ("2", "0.500"), ("3", "0.250"), ("4", "-0.100")
    ]  # fmt: skip
    assert re.findall(r'class="score" style="--score: (.*?)"', html) == ["0.9100", "0.5000", "0.2500", "0.0000"]


def test_a_filter_is_offered_for_the_modalities_found(tmp_path):
    hits = [Hit(1, 0.5, "page", "a", "a", [picture(1)]), Hit(2, 0.4, "image", "b", "b", [picture(2)])]
    two = Page(write(tmp_path / "two.html", searches=[Search("q", hits)]))
    one = Page(write(tmp_path / "one.html", searches=[Search("q", hits[:1])]))
    assert [box["id"] for box in two.all("input")] == ["show-image", "show-page"]
    assert one.all("input") == []
    for modality in MODALITIES:
        rule = f'body:has(#show-{modality}:not(:checked)) .hit[data-kind="{modality}"]'
        assert rule in CSS


def test_equal_input_gives_equal_bytes(tmp_path):
    write(tmp_path / "a.html")
    write(tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_hit_whose_picture_is_gone_says_so(tmp_path):
    hits = [Hit(1, 0.5, "image", "a red ball", "a.png"), Hit(2, 0.4, "page", "", "scan.pdf#page=0")]
    html = write(tmp_path / "page.html", searches=[Search("q", hits)])
    assert html.count('<p class="media missing">no picture</p>') == 2
    assert '<p class="title" dir="auto" title="a red ball">a red ball</p>' in html
    assert html.count('class="title"') == 1
    assert "<blockquote" not in html


def test_names_that_are_not_utf8_are_written_with_a_replacement(tmp_path):
    origin = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    html = write(tmp_path / "page.html", searches=[Search("q", [Hit(1, 0.5, "text", "a", origin)])])
    assert "<bdi>caf?.png</bdi>" in html


def test_ten_searches_with_ten_videos_of_twelve_frames_stay_below_five_megabytes(tmp_path):
    meadow = np.linspace(0, 255, 144 * 256 * 3).astype(np.uint8).reshape(144, 256, 3)

    def frame(number):
        moved = meadow.copy()
        moved[number // 100 * 8 :][:50, number % 100 * 2 :][:, :50] = 255, 0, number % 256
        return moved

    def hit(number):
        return Hit(number % 10 + 1, 0.5, "video", "a clip", "clip.mp4", [frame(12 * number + i) for i in range(12)])

    searches = [Search("moving", [hit(10 * search + i) for i in range(10)]) for search in range(10)]
    html = write(tmp_path / "page.html", searches=searches)
    assert len(Page(html).all("image")) == 1200
    assert len(html) < 5_000_000


def test_a_thumbnail_of_pure_noise_stays_below_fifty_kilobytes():
    assert len(ThumbnailPool().add(picture(1, 160, 284)).uri) < 50_000


def test_thumbnails_shrink_to_fit_and_never_grow():
    pool = ThumbnailPool()
    sizes = [(t.width, t.height) for t in (pool.add(picture(1, h, w)) for h, w in ((400, 301), (50, 7), (100, 999)))]
    assert sizes == [(120, 160), (7, 50), (480, 48)]


@pytest.mark.parametrize("pixels", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_a_thumbnail_that_is_not_rgb_bytes_is_refused(pixels):
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        ThumbnailPool().add(pixels)


def test_scores_keep_order_mark_the_best_of_a_column_and_leave_gaps():
    (table,) = score_tables(
        [
            row("soup", 0.75, chance=0.1),
            row("before", 0.25, chance=0.1),
            row("soup", 0.5, task="image_text_image", num_candidates=1400, num_queries=16),
            row("soup", 0.5, metric="ndcg@5"),
            row("before", 0.5, metric="ndcg@5"),
        ]
    )
    assert [(t.label, t.metrics, t.num_queries, t.num_candidates) for t in table.tasks] == [
        ("text → image", ("hit@1", "ndcg@5"), "49", "70"),
        ("image + text → image", ("hit@1",), "16", "1,400"),
    ]
    shown = {m: [(c.value, c.best) if c else None for c in cells] for m, cells in table.models.items()}
    assert shown == {
        "soup": [(0.75, True), (0.5, False), (0.5, False)],
        "before": [(0.25, False), (0.5, False), None],
    }
    assert table.chance == [0.1, None, None]
    assert table.interval == pytest.approx(0.245)  # 0.98 / 4, of the 16 queries


def test_what_was_trained_on_stands_apart_and_does_not_compete(tmp_path):
    rows = [row("a", 0.5), row("b", 0.25, split="test"), row("a", 1.0, split="train", num_candidates=31)]
    held_out, in_sample = score_tables(rows)
    assert (held_out.in_sample, list(held_out.models)) == (False, ["a", "b"])
    assert (in_sample.in_sample, list(in_sample.models)) == (True, ["a"])
    assert held_out.models["a"][0].best
    assert in_sample.tasks[0].num_candidates == "31"
    html = write(tmp_path / "page.html", results={"rows": rows, "settings": {}})
    assert [t.get("class") for t in Page(html).all("table")] == [None, "in-sample"]


def test_task_labels_read_as_query_to_target():
    labels = [task_label(t) for t in ("text_page", "image_text_image", "all")]
    assert labels == ["text → page", "image + text → image", "all"]


def test_differing_counts_are_given_as_a_range():
    (table,) = score_tables([row("a", 0.5), row("b", 0.5, num_candidates=75)])
    assert table.tasks[0].num_candidates == "70–75"


def test_inline_svg_drops_whatever_acts_or_fetches():
    svg = inline_svg(
        """<?xml version="1.0"?><!DOCTYPE svg PUBLIC "x" "http://www.w3.org/x.dtd">
        <svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" onload="x()"
        width="30pt" height="20pt">
        <script>alert(1)</script><style>*{fill:url(http://evil/x)}</style>
        <foreignObject><p>x</p></foreignObject><!-- c -->
        <metadata><a href="http://evil"/></metadata>
        <image href="http://evil/a.png"/><image xlink:href="data:image/png;base64,AA=="/>
        <rect id="r" onclick="x()" style="fill: url(//evil)"/><rect style="fill: u\\72l(x)"/>
        <use xlink:href="#r" clip-path="url(#c)"/>
        <text>a &lt;b&gt; &amp; c</text></svg>""",
        name='say "loss"',
        prefix="p0-",
    )
    compact = re.sub(r">\s+<", "><", svg)
    assert compact == (
        '<svg viewBox="0 0 30 20" role="img" aria-label="say &quot;loss&quot;"><image></image>'
        '<image href="data:image/png;base64,AA=="></image><rect id="p0-r"></rect><rect></rect>'
        '<use href="#p0-r" clip-path="url(#p0-c)"></use><text>a &lt;b&gt; &amp; c</text></svg>'
    )


def test_inline_svg_turns_greys_into_ink_and_paper_and_keeps_colours():
    svg = inline_svg(
        '<svg viewBox="0 0 1 1"><path fill="black" stroke="#fff" '
        'style="fill: #333333; stroke: #1f77b4; white-space: pre"/></svg>',
        "plot",
        "p-",
    )
    ink = "color-mix(in srgb, var(--ink) {}%, var(--plot-paper))"
    assert f'fill="{ink.format(100)}" stroke="{ink.format(0)}"' in svg
    assert f'style="fill: {ink.format(80)}; stroke: #1f77b4; white-space: pre"' in svg


@pytest.mark.parametrize(("text", "problem"), [("<svg>", "is not XML"), ("<html></html>", "is <html>, not <svg>")])
def test_a_plot_that_is_not_svg_is_refused_by_name(text, problem):
    with pytest.raises(UserError, match=f"plot loss: {problem}"):
        inline_svg(text, "loss", "p-")


def test_terminal_shows_ranked_hits_and_obeys_nothing_in_them():
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    hits = [
        Hit(1, 0.9126, "image", "[red]ball[/red]\x1b[2J\n", "a.png"),
        Hit(2, -0.5, "text", "words", "d.jsonl line 4"),
    ]
    console.print(terminal_hits(Search("[bold]red", hits)))
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert lines == [
        ["[bold]red"],
        ["rank", "score", "modality", "title", "origin"],
        ["1", "0.913", "image", "[red]ball[/red]", "[2J", "a.png"],
        ["2", "-0.500", "text", "words", "d.jsonl", "line", "4"],
    ]


def test_every_colour_of_text_has_enough_contrast_in_light_and_dark():
    light, dark = CSS.split("@media (prefers-color-scheme: dark)")
    for scheme in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", scheme))
        for ground in ("paper", "card", "mat"):
            for ink in ("ink", "soft", "accent", "image", "page", "video", "text"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)


def contrast(a, b):
    """WCAG 2.1, 1.4.3."""
    low, high = sorted(luminance(c) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
