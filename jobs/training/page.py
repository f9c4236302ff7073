"""The page of a run, `index.html` in its folder: made of the run's records again and again while it trains."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from jobs.runtime.progress import duration
from jobs.runtime.records import changes
from jobs.spec.load import check, read_document
from jobs.training.encoder import backbone_url
from jobs.training.held_out import HeldOutSamples
from jobs.training.kind import TRAIN
from jobs.training.listing import RunSummary, summarize
from jobs.training.page_samples import answers, training_samples
from jobs.training.runs import LOG, METRICS, PAGE, TENSORBOARD, Run, read_held_out, read_rows, read_spec
from pipelines.redaction import redacted
from pipelines.storage.faults import brief_patience
from rzen.config import ObjectiveConfig

if TYPE_CHECKING:
    from rzen.report.hits import Search
    from rzen.report.run import Answer, HeldOutLine, RunReport
    from rzen.training.held_out_scores import HeldOutRow

REFRESH_S = 30.0
_LINES = 40  # of the log
_POINTS = 300  # of a curve
_RECENT = 50  # steps that the time left is derived from
_log = logging.getLogger(__name__)


class RunPages:
    """The pages of several runs. As a context it ends when the last one is written.

    One thread writes them all, because plots share settings of their library. `write_overview` writes a page of all
    runs, where there is one: as often as the others, and when a run ends.
    """

    def __init__(self, runs: Mapping[str, RunPage], write_overview: Callable[[], None] | None = None) -> None:
        self._runs = runs
        self._write_overview = write_overview
        self._overview_s = -math.inf  # when it was written
        self._open: dict[str, float] = {}
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def refresh(self, names: Iterable[str]) -> None:
        """Write the pages of running runs that are older than `REFRESH_S`, and that of all runs."""
        now_s = time.monotonic()
        for name in names:
            if self._is_due(now_s - self._open.setdefault(name, now_s)):
                self._open[name] = now_s
                self._writing = self._thread.submit(self._runs[name].write)
        if self._is_due(now_s - self._overview_s):
            self._overview_s = now_s
            self._writing = self._submit_overview()

    def _is_due(self, age_s: float) -> bool:
        return age_s > REFRESH_S and (self._writing is None or self._writing.done())

    def finish(self, name: str, state: str) -> None:
        """Write the page of a run that has ended."""
        self._open.pop(name, None)
        self._thread.submit(self._runs[name].write, state)
        self._submit_overview()

    def _submit_overview(self) -> Future[None] | None:
        if self._write_overview is None:
            return None
        return self._thread.submit(_without_errors, "the page of all runs", self._write_overview)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with brief_patience() if error else nullcontext():
            for name in list(self._open):
                self.finish(name, "interrupted")
            self._thread.shutdown()


def _without_errors(page: str, write: Callable[[], None]) -> None:
    """Write a page. What goes wrong is logged."""
    try:
        write()
    except Exception as error:  # noqa: BLE001  a page is not worth a run
        _log.warning("%s was not written: %s", page, error)


class RunPage:
    """The page of one run. `sources` are those that it trains on."""

    def __init__(self, run: Run, sources: Sequence[str], held_out: HeldOutSamples | None) -> None:
        self._run = run
        self._sources = sources
        self._held_out = held_out
        self._samples: list[Search] | None = None
        self._answers: tuple[int, list[Answer]] = -1, []

    def write(self, state: str | None = None) -> None:
        """Write the page. What goes wrong is logged, because the run goes on. `state`: if the run has just ended."""
        from rzen.report.run import render_run

        def write() -> None:
            self._run.store.write(PAGE, render_run(self.report(state)))

        _without_errors(f"the page of {self._run.store.url}", write)

    def report(self, state: str | None = None) -> RunReport:
        """Return what the page shows. Raises `UserError` for damaged records."""
        from rzen.report.run import RunReport

        run, summary = self._run, summarize(self._run.store)
        if state is not None:
            summary = replace(summary, state=state)
        rows = read_rows(run.store, METRICS) if run.store.exists(METRICS) else []
        scores = read_held_out(run.store)
        record = read_spec(run.store)
        recipe, differing = _changes(run)
        return RunReport(
            title=summary.name,
            lead=_lead(summary),
            figures=_figures(summary, rows, scores),
            steps=(summary.step, summary.steps) if summary.steps else None,
            held_out=_lines(scores),
            answers=self._find_answers(scores),
            samples=self._read_samples(),
            plots=_plots(rows, scores),
            recipe=recipe,
            changes=differing,
            commands=_commands(run, summary),
            log=run.store.read(LOG).decode().splitlines()[-_LINES:] if run.store.exists(LOG) else [],
            facts={"code": record.get("revision", "unknown"), **record.get("versions", {}), "data": run.spec.data.root},
            refresh_s=round(REFRESH_S) if summary.state == "running" else 0,
        )

    def _read_samples(self) -> list[Search]:
        """Return samples of the data, which are read once."""
        if self._samples is None:
            self._samples = list(training_samples(self._run.spec.data, self._sources))
        return self._samples

    def _find_answers(self, scores: Sequence[HeldOutRow]) -> list[Answer]:
        """Return answers of the newest score, which are read once for each score."""
        if self._held_out is not None and scores and self._answers[0] != scores[-1]["step"]:
            self._answers = scores[-1]["step"], list(answers(self._held_out.data, scores))
        return self._answers[1]


def _lead(summary: RunSummary) -> str:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"A training run that is {summary.state}. Written at {now}."


def _figures(summary: RunSummary, rows: Sequence[Mapping[str, Any]], scores: Sequence[HeldOutRow]) -> dict[str, str]:
    figures = {"step": f"{summary.step:,} / {summary.steps:,}"} if summary.steps else {}
    if rows:
        recent = rows[-_RECENT:]
        step_s = sum(row["step_s"] for row in recent) / len(recent)
        figures |= {
            "loss": f"{rows[-1]['loss']:.4f}",
            "samples per second": f"{_mean(recent, 'samples_per_s'):.1f}",
            "waiting for data": f"{_mean(recent, 'feed_wait_fraction'):.0%}",
            "time in steps": duration(sum(row["step_s"] for row in rows)),
        }
        if summary.state == "running" and summary.steps:
            figures["time left"] = f"about {duration((summary.steps - summary.step) * step_s)}"
        if skipped := sum(int(row["skipped"]) for row in rows):
            figures["skipped steps"] = f"{skipped:,}"
        if bad := sum(int(row["bad_samples"]) for row in rows):
            figures["bad samples, replaced"] = f"{bad:,}"
    if scores:
        figures["held-out hit@1"] = f"{scores[-1]['hit']:.1%}"
        figures[f"after {scores[0]['step']} steps"] = f"{scores[0]['hit']:.1%}"
        figures["scoring took"] = duration(sum(row["seconds"] for row in scores))
    return figures


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(sum(row[name] for row in rows) / len(rows))


def _lines(scores: Sequence[HeldOutRow]) -> list[HeldOutLine]:
    from rzen.report.run import HeldOutLine
    from rzen.report.scores import hit_interval

    lines = []
    for name, now in scores[-1]["sources"].items() if scores else ():
        hits = [row["sources"][name]["hit"] for row in scores if name in row["sources"]]
        low, high = hit_interval(now["hit"], len(now["queries"]))
        lines.append(HeldOutLine(name, len(now["queries"]), now["candidates"], hits[0], hits[-1], max(hits), low, high))
    return lines


def _plots(rows: Sequence[Mapping[str, Any]], scores: Sequence[HeldOutRow]) -> dict[str, str]:
    from rzen.evaluation.results import plot_curves

    charts: dict[str, tuple[str, dict[str, list[tuple[int, float]]]]] = {
        "Training loss": ("loss", _curves(rows, "loss", "source")),
        "Held-out score": ("hit@1, %", _held_out_curves(scores)),
        "Temperature of each task": ("temperature", _curves(rows, "temperature", "task")),
        "Throughput": ("samples per second", _curves(rows, "samples_per_s")),
        "Waiting for data": ("share of a step, %", _curves(rows, "feed_wait_fraction", scale=100)),
        "Mean probability of yes": ("probability", _probability_curves(rows)),
        "Negatives dropped as duplicates, false negatives or by the margin": (
            "share, %",
            _curves(rows, "dropped_fraction", scale=100) | _curves(rows, "duplicate_fraction", scale=100),
        ),
        "Lead of the positive over the hardest negative": ("cosine", _curves(rows, "margin", "source")),
    }
    return {
        caption: plot_curves(curves, label, caption)
        for caption, (label, curves) in charts.items()
        if any(value for curve in curves.values() for _, value in curve)
    }


def _curves(
    rows: Sequence[Mapping[str, Any]], name: str, by: str | None = None, scale: float = 1
) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) by source or task, without steps that have no finite value.

    Embedders and re-rankers have different metrics: there are no curves of those that a run lacks.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if not row["skipped"] and math.isfinite(row.get(name, math.nan)):
            curves.setdefault(str(row[by]) if by else name, []).append((int(row["step"]) + 1, scale * row[name]))
    return {key: _thinned(curve) for key, curve in curves.items()}


def _probability_curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return what a re-ranker gives to positives and to negatives."""
    return _curves(rows, "positive_probability") | _curves(rows, "negative_probability")


def _thinned(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most `_POINTS` points: means over as many adjacent steps as that takes."""
    size = -(-len(curve) // _POINTS)
    parts = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _held_out_curves(scores: Sequence[HeldOutRow]) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in scores:
        for name, some in row["sources"].items():
            curves.setdefault(name, []).append((row["step"], 100 * some["hit"]))
        if len(row["sources"]) > 1:
            curves.setdefault("mean", []).append((row["step"], 100 * row["hit"]))
    return curves


def _changes(run: Run) -> tuple[str, list[tuple[str, str, str]]]:
    """Return the nearest stage of the recipe, and the settings that decide the weights and differ from it."""
    recipe = "jobs/stage2.yaml" if run.spec.data.instructions else "jobs/stage1.yaml"
    if not isinstance(run.spec.objective, ObjectiveConfig):
        recipe = "jobs/reranker.yaml"
    before, after = (
        TRAIN.science(redacted(spec.model_dump(mode="json"))) for spec in (check(read_document(recipe)), run.spec)
    )
    found = [(name, json.dumps(old), json.dumps(new)) for name, old, new in changes(before, after) if name != "name"]
    return recipe, found


def _commands(run: Run, summary: RunSummary) -> dict[str, str]:
    folder = run.store.url
    commands = {}
    if summary.state == "running":
        commands["Follow the log"] = f"rzen logs {folder} -f"
    if run.spec.run.tracking.tensorboard:
        commands["Show the metrics"] = f"tensorboard --logdir {folder}/{TENSORBOARD}"
    if summary.state == "finished":
        is_adapter = run.result == "adapter"
        base = backbone_url(run) if is_adapter else run.result_url
        adapter = f" --adapter {run.result_url}" if is_adapter else ""
        export = f"rzen export {base} {folder}-model{adapter}"
        if isinstance(run.spec.objective, ObjectiveConfig):
            commands["Make one model of it"] = export
        else:
            adapter = f" --set model.adapter={run.result_url}" if is_adapter else ""
            commands["Make one model of it"] = f"{export} --set format=reranker"
            commands["Score candidates with it"] = f"rzen judge --set model.base={base}{adapter}"
    commands["List all runs"] = f"rzen runs {run.spec.run.root}"
    return commands
