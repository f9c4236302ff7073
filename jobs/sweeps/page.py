"""The page of a sweep, `index.html` in its folder: runs, what differs between them, and how each of them did."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jobs.runtime.progress import duration
from jobs.runtime.records import leaves
from jobs.runtime.revision import revision, versions
from jobs.training.kind import TRAIN
from jobs.training.listing import summarize
from jobs.training.page import REFRESH_S
from jobs.training.runs import METRICS, PAGE, Run, read_rows
from pipelines.redaction import redacted
from pipelines.storage.store import Store
from rzen.report.scores import task_label

if TYPE_CHECKING:
    from rzen.evaluation.comparison import Difference
    from rzen.evaluation.results import Result

ByQuery = Mapping[str, NDArray[np.float64]]
"""Task -> the score of each query, `[Q]`."""
FIGURES = ("state", "last loss", "hit@1 in training", "samples/s", "time in steps")
"""Figures of a run. The third is the newest held-out score, which is taken while it trains."""


def sweep_page(
    *,
    title: str,
    runs: Mapping[str, Run],
    rows: Sequence[Result],
    by_query: Mapping[str, ByQuery],
    facts: Mapping[str, str],
    others: Mapping[str, str] = MappingProxyType({}),
    parents: Mapping[str, Sequence[str]] = MappingProxyType({}),
    notes: Sequence[str] = (),
    plots: Mapping[str, str] = MappingProxyType({}),
    refresh_s: int = 0,
) -> bytes:
    """Return the page of runs, and of `others`: soups and models without a run, with what they are made of.

    `rows` are all scores, and `by_query` has the first metric of each query: name -> task -> [Q]. `parents` are those
    of each soup. `refresh_s` is after how many seconds a browser reads the page again, and 0 for never.
    """
    from rzen.evaluation.comparison import MEAN, paired_intervals
    from rzen.evaluation.results import plot_scores
    from rzen.report.sweep import SweepReport, SweepRow, render_sweep

    metrics: dict[str, str] = {}
    for row in rows:
        metrics.setdefault(row.task, row.metric)
    columns = {task: f"{task_label(task)} {metric}" for task, metric in metrics.items()}
    if len(columns) > 1:
        columns[MEAN] = MEAN
    scores = {name: _titled(paired_intervals(values), columns) for name, values in by_query.items()}
    settings = _differing_settings(runs)
    runs_of_page = [
        SweepRow(name, "", [values[place] for values in settings.values()], _figures(run), scores.get(name, {}))
        for place, (name, run) in enumerate(runs.items())
    ]
    others_of_page = [
        SweepRow(name, what, [""] * len(settings), [""] * len(FIGURES), scores.get(name, {}))
        for name, what in others.items()
    ]
    differences = {
        soup: {
            parent: _titled(
                paired_intervals({task: values - by_query[parent][task] for task, values in by_query[soup].items()}),
                columns,
            )
            for parent in names
        }
        for soup, names in parents.items()
        if soup in by_query and by_query.keys() >= set(names)
    }
    return render_sweep(
        SweepReport(
            title=title,
            lead=f"Written at {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC.",
            settings=list(settings),
            figures=FIGURES,
            columns=list(columns.values()),
            rows=[*runs_of_page, *others_of_page],
            comparisons=differences,
            notes=notes,
            plots=plots or ({"Scores": plot_scores(rows)} if rows else {}),
            facts=facts,
            refresh_s=refresh_s,
        )
    )


def write_progress(out: Store, title: str, runs: Mapping[str, Run]) -> None:
    """Write the page of runs that are not finished or not scored yet."""
    facts = {"code": revision(), **versions()}
    page = sweep_page(title=title, runs=runs, rows=(), by_query={}, facts=facts, refresh_s=round(REFRESH_S))
    out.write(PAGE, page)


def _titled(found: Mapping[str, Difference], columns: Mapping[str, str]) -> dict[str, Difference]:
    return {title: found[task] for task, title in columns.items()}


def _differing_settings(runs: Mapping[str, Run]) -> dict[str, list[str]]:
    """Return each setting that decides weights and is not the same in all runs, with its value in each of them."""
    found = [leaves(TRAIN.science(redacted(run.spec.model_dump(mode="json")))) for run in runs.values()]
    names = list(dict.fromkeys(name for some in found for name in some if name != "name"))
    values = {name: [json.dumps(some[name]) if name in some else "" for some in found] for name in names}
    return {name: row for name, row in values.items() if len(set(row)) > 1}


def _figures(run: Run) -> list[str]:
    summary = summarize(run.store)
    rows = read_rows(run.store, METRICS) if run.store.exists(METRICS) else []
    if not rows:
        return [summary.state, *[""] * (len(FIGURES) - 1)]
    throughput = sum(row["samples_per_s"] for row in rows) / len(rows)
    took = duration(sum(row["step_s"] for row in rows))
    held_out = "" if summary.held_out is None else f"{summary.held_out:.1%}"
    return [summary.state, f"{rows[-1]['loss']:.4f}", held_out, f"{throughput:.1f}", took]
