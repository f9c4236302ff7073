"""Job of kind `select`: negatives chosen among the candidates of a table. It takes seconds and needs no cluster.

* `{out}/candidates.json`, `{out}/parts/`, `{out}/plan/`: the new table.
* `{out}/report.html`: what each rule removed, histograms of scores, examples with pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jobs.mining.examples import Examples, example_searches
from jobs.mining.specs import SelectSpec
from jobs.runtime.lease import Lease, hold_output
from jobs.runtime.progress import Bars, say
from pipelines.candidates.config import SelectionConfig
from pipelines.candidates.selection import PositiveScores, SelectionCounts, select
from pipelines.candidates.table import CandidateTable, check_other, open_table
from pipelines.candidates.types import KIND, CandidateRows, PartInfo
from pipelines.candidates.write import PartWriter, publish_table
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.storage.location import open_store
from pipelines.storage.store import Store
from rzen.report.selection import Counts, SelectionReport, SelectionRow, histogram, render_selection

REPORT = "report.html"
_THREADS = 4


@dataclass(slots=True)
class SourceSelection:
    """What was chosen for a source."""

    parts: list[PartInfo] = field(default_factory=list)
    counts: SelectionCounts = field(default_factory=SelectionCounts)
    histograms: dict[str, Counts] = field(default_factory=dict)
    examples: Examples = field(default_factory=list)

    def add(self, part: PartInfo, counts: SelectionCounts, scores: dict[str, Counts], examples: Examples) -> None:
        """Take in the next part."""
        self.parts.append(part)
        self.counts.add(counts)
        self.histograms = {kind: some + self.histograms.get(kind, 0) for kind, some in scores.items()}
        self.examples += examples


def run(spec: SelectSpec) -> dict[str, Any]:
    """Choose negatives, and publish the table and its report."""
    store = open_store(spec.out, spec.endpoint)
    check_other(spec.out, spec.table, spec.endpoint, "chosen from")
    with hold_output(store, KIND, "selects") as lease:
        return select_table(open_table(spec.table, spec.endpoint), spec, store, lease)


def select_table(table: CandidateTable, spec: SelectSpec, store: Store, lease: Lease) -> dict[str, Any]:
    """Choose negatives among the candidates of a table, and publish the new table and its report."""
    manifest = table.manifest
    if unknown := sorted(set(spec.sources) - set(manifest.parts)):
        known = ", ".join(manifest.parts)
        raise UserError(f"sources.{unknown[0]}", f"is no source of {table.store.url}", f"its sources: {known}")
    settings = {source: spec.sources.get(source, spec.selection).model_dump(mode="json") for source in manifest.parts}
    writer = PartWriter.of(store, {"table": table.fingerprint, "settings": settings})
    total = sum(part.num_samples for parts in manifest.parts.values() for part in parts)
    found: dict[str, SourceSelection] = {}
    done = 0
    with Bars() as bars:
        for source in manifest.parts:
            found[source] = SourceSelection()
            config = spec.sources.get(source, spec.selection)
            for part in _select_source(table, source, config, writer, spec.num_examples, found[source]):
                done += part.num_samples
                bars.update("select", done, total)
    counts = {source: some.counts.as_json() for source, some in found.items()}
    new = table.derived("select", {source: some.parts for source, some in found.items()}, settings, counts)
    report = _report(table, spec, found)
    lease.check()
    store.write(REPORT, render_selection(report))
    published = publish_table(store, new, before_publish=lease.check)
    return _result(spec, published, found)


def _select_source(
    table: CandidateTable,
    source: str,
    config: SelectionConfig,
    writer: PartWriter,
    num_examples: int,
    found: SourceSelection,
) -> Iterator[PartInfo]:
    """Choose for one source, and yield each part that is written. Few parts are in memory at a time."""
    parts = table.manifest.parts[source]
    starts = np.cumsum([0, *(part.num_samples for part in parts)]).tolist()
    positives = PositiveScores.of(_without_candidates(table, source, config), config)
    per_part = -(-num_examples // max(1, len(table.manifest.parts) * len(parts)))

    def make(number: int) -> tuple[PartInfo, SelectionCounts, dict[str, Counts], Examples]:
        rows = table.rows(source, number)
        _check_scores(table, rows, source, config)
        some = positives.part(starts[number], starts[number + 1])
        selected = select(rows, some, config, source, starts[number])
        scores = {
            "positives": histogram(rows.positive_recall),
            "candidates": histogram(rows.recall),
            "chosen negatives": histogram(selected.rows.recall),
        }
        examples = [(source, starts[number], rows, selected)] if per_part and number < num_examples else []
        return writer.write(source, number, selected.rows), selected.counts, scores, examples

    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(parts), _THREADS):
            for made in pool.map(make, range(start, min(start + _THREADS, len(parts)))):
                found.add(*made)
                yield made[0]


def _without_candidates(table: CandidateTable, source: str, config: SelectionConfig) -> list[CandidateRows]:
    """Return the parts of a source as far as the scores of positives need them: 40 bytes a sample.

    Candidates only count for the rank of a positive.
    """
    needs_rank = config.positives.max_rank is not None

    def read(number: int) -> CandidateRows:
        rows = table.rows(source, number)
        return rows if needs_rank else rows.take(np.zeros(0, np.int64))

    with ThreadPoolExecutor(_THREADS) as pool:
        return [*pool.map(read, range(len(table.manifest.parts[source])))]


def _check_scores(table: CandidateTable, rows: CandidateRows, source: str, config: SelectionConfig) -> None:
    """Raise `UserError` for a rule that asks for scores that a part with candidates does not have."""
    if not len(rows.candidate):
        return
    place = f"{table.store.url} source {source}"
    needs_judge = {"judge_margin": config.negatives.judge_margin, "teacher": config.teacher}
    for setting, value in needs_judge.items():
        if value is not None and np.isnan(rows.teacher).all():
            fix = "run a job of kind judge, and choose from its table"
            raise UserError(place, f"has no judge scores for {setting}", fix)
    if config.negatives.max_owner_likeness is not None and np.isnan(rows.owner).all():
        fix = "mine with owners: true, from pools whose samples are mined"
        raise UserError(place, "has no scores of other queries for max_owner_likeness", fix)


def _report(table: CandidateTable, spec: SelectSpec, found: dict[str, SourceSelection]) -> SelectionReport:
    data = table.manifest.data
    reader = Reader(spec.data_of(spec.root or data.root, data.split))
    try:
        tasks = {source: reader.task_of(source) for source in found}
        searches = [*example_searches(table, spec, [some for one in found.values() for some in one.examples])]
    except (UserError, KeyError) as error:  # the table can be chosen from without its data
        say(f"  the report has no examples: {error}", "yellow")
        tasks, searches = dict.fromkeys(found, ""), []
    rows = [SelectionRow(source=source, task=tasks[source], **some.counts.as_json()) for source, some in found.items()]
    return SelectionReport(
        title="Negatives",
        rows=rows,
        rules=[*dict.fromkeys(rule for row in rows for rule in row.removed)],
        histograms={source: some.histograms for source, some in found.items() if some.histograms},
        examples=searches,
        facts={"table": table.store.url, "data": f"{data.root} {data.split}"}
        | {name: str(value) for name, value in spec.selection.model_dump(mode="json").items()},
    )


def _result(spec: SelectSpec, table: CandidateTable, found: dict[str, SourceSelection]) -> dict[str, Any]:
    for source, some in found.items():
        counts = some.counts
        mean = counts.chosen / max(1, counts.samples)
        say(
            f"  {source}: {mean:.1f} negatives for each of {counts.samples:,} samples;"
            f" {counts.without_negatives:,} have none, {counts.dropped:,} are left out"
        )
    say(f"  report: {table.store.url}/{REPORT}")
    setting = f"{{candidates: {spec.out}, negatives_per_sample: {spec.selection.negatives_per_sample}}}"
    say(f"  to train with it: data: {setting}")
    return {"outputs": [spec.out], "fingerprint": table.fingerprint, "counts": table.manifest.counts}
