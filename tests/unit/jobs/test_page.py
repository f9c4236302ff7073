"""The pages of runs and sweeps: every number on them is one of the records, and a browser shows them."""

from __future__ import annotations

import asyncio
import math
import re
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.sweeps.page import sweep_page, write_progress
from jobs.training import page
from jobs.training.held_out import HeldOutSamples
from jobs.training.page import RunPage, RunPages
from jobs.training.runs import FAILED, HELD_OUT, METRICS, PAGE, STARTS, Run, to_lines
from pipelines.storage.location import open_store
from rzen.evaluation.results import Result
from rzen.report.run import render_run
from tests.chromium import CHROMIUM, browser
from tests.data import publish
from tests.unit.jobs.test_runs import make_run

ROWS: list[dict[str, Any]] = [
    {
        "step": step,
        "source": ("red", "blue")[step % 2],
        "task": "a",
        "loss": 3.0 - step / 10,
        "temperature": 0.05,
        "samples_per_s": 100.0 + step,
        "feed_wait_fraction": 0.25,
        "dropped_fraction": 0.0,
        "step_s": 2.0,
        "skipped": int(step == 4),
        "bad_samples": 1,
    }
    for step in range(10)
]
SCORES: list[dict[str, Any]] = [
    {
        "step": step,
        "hit": hit,
        "seconds": 1.5,
        "sources": {"red": {"hit": hit, "candidates": 4, "queries": [0, 2, 3, 5], "ranks": ranks, "found": found}},
    }
    for step, hit, ranks, found in (
        (0, 0.25, [3, 1, 4, 2], [5, 2, 5, 0]),
        (5, 0.75, [1, 1, 1, 2], [0, 2, 3, 0]),
        (10, 0.5, [1, 1, 2, 3], [0, 2, 0, 3]),
    )
]


class Text(HTMLParser):
    """The text of a page by section, and the cells of its tables."""

    def __init__(self, html: bytes) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self._section = ""
        self.feed(html.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "section":
            self._section = str(dict(attrs)["id"])

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.sections[self._section] = f"{self.sections.get(self._section, '')} {' '.join(data.split())}".strip()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that was interrupted after ten steps of twenty."""
    store = open_store(str(tmp_path / "data"))
    publish(store, {"red": ("a", 24), "blue": ("a", 24)})
    publish(store, {"red": ("a", 9)}, split="held_out")
    data = {"root": str(tmp_path / "data"), "trusted": True}
    run = make_run(tmp_path / "runs", data=data, run={"root": str(tmp_path / "runs")}, optim={"lr": 1e-3})
    assert run.begin({"data": "d"})
    run.log(f"{STARTS} 0 of 20, 1 workers; nodes 1")
    run.store.write(METRICS, to_lines(ROWS))
    run.store.write(HELD_OUT, to_lines(SCORES))
    return run


def page_of(run: Run) -> RunPage:
    data = run.spec.data.model_copy(update={"split": "held_out"})
    return RunPage(run, ["red", "blue"], HeldOutSamples(data, {"red": (0, 2, 3, 5)}, 5))


def test_every_number_on_the_page_of_a_run_is_in_its_records(run: Run) -> None:
    text = Text(render_run(page_of(run).report())).sections
    assert text["progress"] == (
        "Progress step 10 / 20 loss 2.1000 samples per second 104.5 waiting for data 25% time in steps 20 s"
        " skipped steps 1 bad samples, replaced 10 held-out hit@1 50.0% after 0 steps 25.0% scoring took 4 s"
    )
    # Wilson's interval of 2 of 4; best is that of step 5
    assert text["held-out"].endswith("red 4 4 25.0 50.0 [15.0, 85.0] 75.0")
    assert re.findall(r"red: [^“]*?(?= red)", text["answers"]) == [
        "red: found now, rank 3 before",
        "red: not found: rank 2 now, 4 before",
    ]
    assert "optim.lr 0.0002 0.001" in text["changes"]
    assert "name" not in text["changes"].split()
    assert "starts at step 0 of 20, 1 workers; nodes 1" in text["log"]
    assert f"rzen runs {run.spec.run.root}" in text["next"]
    assert run._spec()["versions"]["torch"] in text["settings"]
    assert "A training run that is interrupted." in text[""]


def test_answers_show_what_was_found_before_and_is_found_now(run: Run) -> None:
    learned, missed = page_of(run).report().answers
    assert [(hit.title, hit.origin, hit.relevant) for hit in learned.search.hits] == [
        ("red 5", "first after 0 steps", False),
        ("red 0", "first after 10 steps", True),
    ]
    assert [(hit.title, hit.rank, hit.relevant) for hit in missed.search.hits] == [
        ("red 5", 1, False),
        ("red 0", 1, False),
        ("red 3", 2, True),
    ]
    assert all(hit.thumbnails for hit in (*learned.search.hits, *missed.search.hits))


def test_the_state_decides_what_is_offered(run: Run) -> None:
    def offered(state: str | None) -> tuple[list[str], int]:
        report = page_of(run).report(state)
        return list(report.commands), report.refresh_s

    assert offered("running") == (["Follow the log", "Show the metrics", "List all runs"], 30)
    assert offered("finished") == (["Show the metrics", "Make one model of it", "List all runs"], 0)
    run.log(f"{FAILED}: data: is gone")
    assert "that is failed" in page_of(run).report().lead
    assert "time left" in page_of(run).report("running").figures


def test_a_run_without_a_step_has_a_page(run: Run) -> None:
    run.store.delete(METRICS)
    run.store.delete(HELD_OUT)
    report = page_of(run).report()
    assert (report.held_out, report.answers, report.plots, report.figures) == ([], [], {}, {"step": "0 / 20"})
    assert len(report.samples) == 4
    assert b"Hits and misses" not in render_run(report)


def test_curves_are_thinned_to_means_and_leave_out_skipped_steps() -> None:
    rows = [{"step": n, "loss": float(n), "skipped": int(n == 1), "source": "s"} for n in range(1000)]
    (curve,) = page._curves([*rows, {**rows[0], "loss": math.nan}], "loss", "source").values()
    assert len(curve) == 250
    assert curve[:2] == [(5, (0 + 2 + 3 + 4) / 4), (9, (5 + 6 + 7 + 8) / 4)]


def test_pages_are_written_again_while_runs_go_on_and_when_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "REFRESH_S", 0.0)
    written: list[tuple[str, str | None]] = []
    done = threading.Event()

    class Written:
        def __init__(self, name: str) -> None:
            self.name = name

        def write(self, state: str | None = None) -> None:
            written.append((self.name, state))
            done.set()

    pages: Any = {name: Written(name) for name in ("one", "two", "waits")}
    with RunPages(pages, lambda: written.append(("all", None))) as some:
        some.refresh(["one", "two"])
        while not done.wait(0.01):
            some.refresh(["one"])
        some.finish("two", "failed")
    assert written[0] == ("all", None)
    assert ("one", None) in written
    assert written[-4:] == [("two", "failed"), ("all", None), ("one", "interrupted"), ("all", None)]
    assert "waits" not in dict(written)


def test_a_page_of_all_runs_that_cannot_be_written_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError("the disk is full")

    with RunPages({}, fail) as some:
        some.refresh([])
    assert "the page of all runs was not written: the disk is full" in caplog.text


def test_a_page_that_cannot_be_written_ends_nothing(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    page_of(run).write()
    assert b"A training run" in run.store.read(PAGE)
    run.store.write(METRICS, b"no rows")
    page_of(run).write()
    assert "was not written" in caplog.text


def test_a_page_is_written_to_object_storage(run: Run, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    there = make_run(Path("unused"), data=run.spec.data.model_dump(), run={"root": "s3://pages/runs"})
    there.store.ensure_bucket()
    assert there.begin({"data": "d"})
    there.store.write(METRICS, to_lines(ROWS))
    page_of(there).write("finished")
    html = there.store.read(PAGE)
    assert b"A training run that is finished." in html
    assert b"--adapter s3://pages/runs/r/adapter" in html


def sweep_runs(run: Run, tmp_path: Path) -> dict[str, Run]:
    runs = {}
    for name, lr in (("slow", 1e-4), ("fast", 1e-3)):
        changed = {"root": str(tmp_path / "sweep")}
        spec = run.spec.model_copy(
            update={
                "name": name,
                "run": run.spec.run.model_copy(update=changed),
                "optim": run.spec.optim.model_copy(update={"lr": lr}),
            }
        )
        runs[name] = Run(spec)
        assert runs[name].begin({"data": "d"})
        runs[name].store.write(METRICS, to_lines(ROWS))
    runs["fast"].store.write(HELD_OUT, to_lines(SCORES))
    return runs


def sweep(run: Run, tmp_path: Path) -> bytes:
    by_query = {
        "slow": {"text_image": np.array([0.0, 0.0, 1.0, 0.0])},
        "fast": {"text_image": np.array([0.0, 1.0, 1.0, 0.0])},
        "soup": {"text_image": np.array([1.0, 1.0, 1.0, 0.0])},
    }
    rows = [
        Result(name, "text_image", "hit@1", float(values["text_image"].mean()), 4, 4, 0.25)
        for name, values in by_query.items()
    ]
    return sweep_page(
        title="Soups",
        runs=sweep_runs(run, tmp_path),
        others={"soup": "mean of 0.5 slow, 0.5 fast"},
        parents={"soup": ["slow", "fast"]},
        rows=rows,
        by_query=by_query,
        facts={"code": "abc"},
    )


def test_every_number_on_the_page_of_a_sweep_is_in_its_records(run: Run, tmp_path: Path) -> None:
    html = sweep(run, tmp_path)
    text = Text(html).sections
    header, slow, fast, soup = re.split(r" (?=slow 25|fast 50|soup mean)", text["runs"])
    assert header.endswith("name text → image hit@1 state last loss hit@1 in training samples/s time in steps optim.lr")
    assert slow == "slow 25.0 [0.0, 75.0] new 2.1000 104.5 20 s 0.0001"
    assert fast == "fast 50.0 [0.0, 100.0] new 2.1000 50.0% 104.5 20 s 0.001"
    assert soup == "soup mean of 0.5 slow, 0.5 fast 75.0 (best) [25.0, 100.0]"
    assert html.decode().count('class="best"') == 1  # four queries show no difference
    assert text["parents"].endswith("soup slow +50.0 [+0.0, +100.0] soup fast +25.0 [+0.0, +75.0]")


def test_a_sweep_that_goes_on_has_a_page_that_refreshes_itself(run: Run, tmp_path: Path) -> None:
    assert b'http-equiv="refresh"' not in sweep(run, tmp_path)
    write_progress(open_store(str(tmp_path / "soups")), "2 fine-tunes", sweep_runs(run, tmp_path / "again"))
    html = (tmp_path / "soups/index.html").read_bytes()
    assert b'<meta http-equiv="refresh" content="30">' in html
    assert "slow new 2.1000 104.5 20 s 0.0001 fast new 2.1000 50.0%" in Text(html).sections["runs"]


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
@pytest.mark.timeout(600)
def test_a_browser_shows_both_pages(run: Run, tmp_path: Path) -> None:
    page_of(run).write()
    (tmp_path / "sweep.html").write_bytes(sweep(run, tmp_path))

    async def look() -> None:
        (tmp_path / "chromium").mkdir()
        async with browser(tmp_path / "chromium") as tab:
            await tab.tell("Page.enable")
            for url, wanted in (
                (run.store.root / PAGE, r"held-out hit@1\s+50.0%"),  # type: ignore[attr-defined]
                (tmp_path / "sweep.html", r"Soups against their parents"),
            ):
                for width in (1200, 400):
                    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
                    await tab.tell("Emulation.setDeviceMetricsOverride", **size)
                    await tab.tell("Page.navigate", url=f"file://{url}")
                    await tab.wait_for(wanted)
                    assert int(await tab.evaluate("String(document.documentElement.scrollWidth)")) <= width
                    broken = "[...document.querySelectorAll('.media use')].filter(one => !one.getBBox().width).length"
                    assert await tab.evaluate(f"String({broken})") == "0"

    asyncio.run(look())
