"""The report of a selection, and what it is drawn from. It can be drawn again without a look at the whole table.

* `{out}/report.html`: what each rule removed, histograms of scores, examples with pictures.
* `{out}/report.json`: the counts of the same, and what the report shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import numpy as np

from jobs.mining.examples import Example, example_searches
from jobs.mining.specs import SelectSpec
from jobs.runtime.progress import say
from jobs.runtime.records import leaves
from pipelines.candidates.selection import Selected, SelectionCounts
from pipelines.candidates.table import CandidateTable
from pipelines.candidates.types import CandidateRows
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.redaction import redacted
from pipelines.shards.manifest import read_manifest
from pipelines.storage.location import open_store
from pipelines.storage.store import Store
from pipelines.stored_json import parse_json
from rzen.report.histograms import Counts
from rzen.report.selection import SelectionReport, SelectionRow, histogram, render_selection

REPORT, PAGE = "report.json", "report.html"


@dataclass(slots=True)
class SelectionNotes:
    """What became of the candidates of a part or of a source: counts, and histograms of scores by kind."""

    counts: SelectionCounts = field(default_factory=SelectionCounts)
    histograms: dict[str, Counts] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: CandidateRows, selected: Selected) -> Self:
        """Count what became of the candidates of a part."""
        scores = {
            "positives": rows.positive_recall,
            "candidates": rows.recall,
            "chosen negatives": selected.rows.recall,
        }
        return cls(selected.counts, {kind: histogram(some) for kind, some in scores.items()})

    def add(self, other: SelectionNotes) -> None:
        """Add the notes of another part."""
        self.counts.add(other.counts)
        self.histograms = {kind: some + self.histograms.get(kind, 0) for kind, some in other.histograms.items()}

    def as_json(self) -> dict[str, Any]:
        """Return the notes as plain data."""
        histograms = {kind: some.tolist() for kind, some in self.histograms.items()}
        return {"counts": self.counts.as_json(), "histograms": histograms}

    @classmethod
    def from_json(cls, notes: Mapping[str, Any]) -> Self:
        """Return the notes that `as_json` gave."""
        histograms = {kind: np.array(some, np.int64) for kind, some in notes["histograms"].items()}
        return cls(SelectionCounts.from_json(notes["counts"]), histograms)


@dataclass(frozen=True, slots=True)
class Shown:
    """What the report shows, in addition to the counts. `problem` says why it has no examples."""

    table: str
    root: str
    num_examples: int
    problem: str | None = None

    @classmethod
    def of(cls, table: CandidateTable, spec: SelectSpec) -> Shown:
        """Return what a job asks for."""
        return cls(table.store.url, spec.root or table.manifest.data.root, spec.num_examples)


@dataclass(frozen=True, slots=True)
class ReportFile:
    """`report.json`. `job` identifies the table that the report is of."""

    job: str
    shown: Shown
    sources: dict[str, dict[str, Any]]
    """Source -> its notes as JSON."""

    @property
    def notes(self) -> dict[str, SelectionNotes]:
        """Return the notes of each source."""
        return {source: SelectionNotes.from_json(some) for source, some in self.sources.items()}


def read_report(store: Store, job: str) -> ReportFile | None:
    """Return what the report of a job is drawn from. None if it is missing, damaged or of another job."""
    place = f"{store.url}/{REPORT}"
    try:
        found = parse_json(store.read(REPORT), place, ReportFile)
    except (FileNotFoundError, UserError):
        return None
    return found if found.job == job and store.exists(PAGE) else None


def write_report(
    store: Store,
    job: str,
    table: CandidateTable,
    spec: SelectSpec,
    found: Mapping[str, SelectionNotes],
    examples: Iterable[Example],
    num_parts: int,
) -> None:
    """Draw the report, with examples from `num_parts` parts. Without the data, or with other data, it has none."""
    shown = Shown.of(table, spec)
    split = table.manifest.data.split
    tasks, searches = dict.fromkeys(found, ""), []
    try:
        table.check_data(read_manifest(open_store(shown.root, spec.endpoint), split))
        reader = Reader(spec.data_of(shown.root, split))
        tasks = {source: reader.task_of(source) for source in found}
        searches = [*example_searches(table, spec, examples, num_parts)]
    except (UserError, KeyError) as error:  # the table can be chosen from without its data
        say(f"  the report has no examples: {error}", "yellow")
        shown = replace(shown, problem=str(error))
    rows = [SelectionRow(source=source, task=tasks[source], **some.counts.as_json()) for source, some in found.items()]
    page = SelectionReport(
        title="Negatives",
        rows=rows,
        rules=[*dict.fromkeys(rule for row in rows for rule in row.removed)],
        histograms={source: some.histograms for source, some in found.items() if some.histograms},
        examples=searches,
        facts={"table": shown.table, "data": f"{shown.root} {split}"} | _rules(spec),
    )
    store.write(PAGE, render_selection(page))
    sources = {source: some.as_json() for source, some in found.items()}
    content = redacted(asdict(ReportFile(job, shown, sources)))
    store.write(REPORT, f"{json.dumps(content, indent=1)}\n".encode())  # rules and kinds in their order


def _rules(spec: SelectSpec) -> dict[str, str]:
    """Return the settings of the selection, and for sources with rules of their own those that differ."""
    common = leaves(spec.selection.model_dump(mode="json"))
    found = {name: str(value) for name, value in common.items()}
    for source, rules in spec.sources.items():
        own = leaves(rules.model_dump(mode="json"))
        found |= {f"{source}: {name}": str(value) for name, value in own.items() if value != common.get(name, ...)}
    return found
