"""Job of kind `select`: negatives chosen among the candidates of a table, part by part. It needs no cluster.

* `{out}/candidates.json`, `{out}/parts/`, `{out}/plan/`: the new table.
* `{out}/report.html`: what each rule removed, histograms of scores, examples with pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from jobs.mining.examples import Example, example_searches
from jobs.mining.specs import SelectSpec
from jobs.runtime.lease import Lease, hold_output
from jobs.runtime.progress import Bars, say
from pipelines.candidates.config import SelectionConfig
from pipelines.candidates.selection import PositiveScores, Selected, SelectionCounts, select
from pipelines.candidates.table import CandidateTable, check_other, open_table
from pipelines.candidates.types import KIND, CandidateRows, PartInfo
from pipelines.candidates.write import PartWriter, Place, WrittenPart, publish_table
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.storage.ahead import read_ahead
from pipelines.storage.location import open_store
from pipelines.storage.store import Store
from rzen.report.selection import Counts, SelectionReport, SelectionRow, histogram, render_selection

REPORT = "report.html"
_THREADS = 4
_VERSION = 1  # of what a part and its notes hold for equal candidates and rules
_EXAMPLES_OF_PART = 3  # in the report, where there are enough parts


@dataclass(frozen=True, slots=True)
class PartNotes:
    """What the report needs of a part. It is kept with the part's marker."""

    counts: SelectionCounts
    histograms: dict[str, Counts]

    @classmethod
    def of(cls, rows: CandidateRows, selected: Selected) -> PartNotes:
        """Count what became of the candidates of a part."""
        scores = {
            "positives": rows.positive_recall,
            "candidates": rows.recall,
            "chosen negatives": selected.rows.recall,
        }
        return cls(selected.counts, {kind: histogram(some) for kind, some in scores.items()})

    def as_json(self) -> dict[str, Any]:
        """Return the notes as plain data."""
        histograms = {kind: some.tolist() for kind, some in self.histograms.items()}
        return {"counts": self.counts.as_json(), "histograms": histograms}

    @classmethod
    def from_json(cls, notes: dict[str, Any]) -> PartNotes:
        """Return the notes that `as_json` gave."""
        histograms = {kind: np.array(some, np.int64) for kind, some in notes["histograms"].items()}
        return cls(SelectionCounts.from_json(notes["counts"]), histograms)


@dataclass(slots=True)
class SourceSelection:
    """What was chosen for a source."""

    parts: list[PartInfo] = field(default_factory=list)
    counts: SelectionCounts = field(default_factory=SelectionCounts)
    histograms: dict[str, Counts] = field(default_factory=dict)

    def add(self, part: PartInfo, notes: PartNotes) -> None:
        """Take in the next part."""
        self.parts.append(part)
        self.counts.add(notes.counts)
        self.histograms = {kind: some + self.histograms.get(kind, 0) for kind, some in notes.histograms.items()}


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
    writer = PartWriter.of(store, {"version": _VERSION, "table": table.fingerprint, "settings": settings})
    total = sum(part.num_samples for parts in manifest.parts.values() for part in parts)
    found: dict[str, SourceSelection] = {}
    selectors: list[_SourceSelector] = []
    done = 0
    written = writer.written()
    with Bars() as bars:
        for source in manifest.parts:
            found[source] = SourceSelection()
            selectors.append(_SourceSelector(table, source, spec.sources.get(source, spec.selection), writer))
            for part, notes in selectors[-1].parts(written):
                found[source].add(part, notes)
                done += part.num_samples
                bars.update("select", done, total)
    counts = {source: some.counts.as_json() for source, some in found.items()}
    new = table.derived("select", {source: some.parts for source, some in found.items()}, settings, counts)
    report = _report(table, spec, found, selectors)
    lease.check()
    store.write(REPORT, render_selection(report))
    published = publish_table(store, new, before_publish=lease.check)
    return _result(spec, published, found)


class _SourceSelector:
    """Chooses for one source. Parts that an earlier try of the job has made are not made again."""

    def __init__(self, table: CandidateTable, source: str, config: SelectionConfig, writer: PartWriter) -> None:
        self._table, self._source, self._config, self._writer = table, source, config, writer
        self._parts = table.manifest.parts[source]
        self._starts = np.cumsum([0, *(part.num_samples for part in self._parts)]).tolist()

    def parts(self, written: Mapping[Place, WrittenPart]) -> Iterator[tuple[PartInfo, PartNotes]]:
        """Yield each part with its counts, in order. Few parts are in memory at a time."""

        def make(number: int) -> tuple[PartInfo, PartNotes]:
            done = written.get((self._source, number))
            return (done.info, PartNotes.from_json(done.notes)) if done else self._write(number)

        if any((self._source, number) not in written for number in range(len(self._parts))):
            _ = self._positives  # once, before the threads ask for it
        yield from read_ahead(make, range(len(self)), _THREADS)

    def __len__(self) -> int:
        return len(self._parts)

    def examples(self, num_parts: int) -> Iterator[Example]:
        """Yield candidates and choice of the first parts. They are chosen again, and not written."""
        for number in range(min(num_parts, len(self))):
            yield self._source, self._starts[number], *self._select(number)

    def _write(self, number: int) -> tuple[PartInfo, PartNotes]:
        rows, selected = self._select(number)
        notes = PartNotes.of(rows, selected)
        return self._writer.write(self._source, number, selected.rows, notes.as_json()), notes

    def _select(self, number: int) -> tuple[CandidateRows, Selected]:
        rows = self._table.rows(self._source, number)
        _check_scores(self._table, rows, self._source, self._config)
        start = self._starts[number]
        positives = self._positives.part(start, self._starts[number + 1])
        return rows, select(rows, positives, self._config, self._source, start)

    @cached_property
    def _positives(self) -> PositiveScores:
        """Scores of the positives of the whole source: 40 bytes a sample. A rank needs the candidates for a moment."""
        needs_rank = self._config.positives.max_rank is not None

        def read(number: int) -> CandidateRows:
            rows = self._table.rows(self._source, number)
            return rows if needs_rank else rows.take(np.zeros(0, np.int64))

        with ThreadPoolExecutor(_THREADS) as pool:
            return PositiveScores.of([*pool.map(read, range(len(self._parts)))], self._config)


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


def _report(
    table: CandidateTable, spec: SelectSpec, found: dict[str, SourceSelection], selectors: Sequence[_SourceSelector]
) -> SelectionReport:
    per_source = -(-spec.num_examples // (_EXAMPLES_OF_PART * max(1, len(selectors))))
    examples = chain.from_iterable(one.examples(per_source) for one in selectors)
    num_parts = sum(min(per_source, len(one)) for one in selectors)
    data = table.manifest.data
    reader = Reader(spec.data_of(spec.root or data.root, data.split))
    try:
        tasks = {source: reader.task_of(source) for source in found}
        searches = [*example_searches(table, spec, examples, num_parts)]
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
