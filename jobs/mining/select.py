"""Job of kind `select`: negatives chosen among the candidates of a table, part by part. It needs no cluster.

* `{out}/candidates.json`, `{out}/parts/`, `{out}/plan/`: the new table.
* `{out}/report.html`, `{out}/report.json`: what each rule removed (`selection_report.py`).

Nothing is done if the table is there, of the same candidates and rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from jobs.mining.examples import Example
from jobs.mining.selection_report import PAGE, SelectionNotes, Shown, read_report, write_report
from jobs.mining.specs import SelectSpec
from jobs.runtime.lease import Lease, hold_output
from jobs.runtime.progress import Bars, say
from pipelines.candidates.config import SelectionConfig
from pipelines.candidates.selection import PositiveScores, Selected, SelectionCounts, select
from pipelines.candidates.table import CandidateTable, check_other, finished_table, open_table
from pipelines.candidates.types import KIND, CandidateRows, PartInfo
from pipelines.candidates.write import PartWriter, Place, WrittenPart, publish_table
from pipelines.errors import UserError
from pipelines.storage.ahead import read_ahead
from pipelines.storage.location import open_store
from pipelines.storage.store import Store

_THREADS = 4
_VERSION = 1  # of what a part and its notes hold for equal candidates and rules
_EXAMPLES_OF_PART = 3  # in the report, where there are enough parts


def run(spec: SelectSpec) -> dict[str, Any]:
    """Choose negatives, and publish the table and its report."""
    store = open_store(spec.out, spec.endpoint)
    check_other(spec.out, spec.table, spec.endpoint, "chosen from")
    with hold_output(store, KIND, "selects") as lease:
        return select_table(open_table(spec.table, spec.endpoint), spec, store, lease)


def select_table(table: CandidateTable, spec: SelectSpec, store: Store, lease: Lease) -> dict[str, Any]:
    """Choose negatives among the candidates of a table, and publish the new table and its report."""
    table.check_candidates()
    manifest = table.manifest
    if unknown := sorted(set(spec.sources) - set(manifest.parts)):
        known = ", ".join(manifest.parts)
        raise UserError(f"sources.{unknown[0]}", f"is no source of {table.store.url}", f"its sources: {known}")
    rules = {source: spec.sources.get(source, spec.selection) for source in manifest.parts}
    settings = {source: some.model_dump(mode="json") for source, some in rules.items()}
    writer = PartWriter.of(store, {"version": _VERSION, "table": table.fingerprint, "settings": settings})
    selectors = [_SourceSelector(table, source, some, writer) for source, some in rules.items()]
    finished = finished_table(store, writer.job)
    report = read_report(store, writer.job) if finished else None
    if finished and report:
        say(f"  {store.url} is up to date: nothing to select")
        if report.shown != Shown.of(table, spec):
            _write_report(table, spec, report.notes, selectors, writer)
        return _result(spec, finished)
    parts, found = _select(selectors, writer.written())
    counts = {source: some.counts.as_json() for source, some in found.items()}
    new = table.derived("select", writer.job, parts, settings, counts)
    lease.check()
    _write_report(table, spec, found, selectors, writer)
    return _result(spec, publish_table(store, new, before_publish=lease.check))


def _select(
    selectors: Sequence[_SourceSelector], written: Mapping[Place, WrittenPart]
) -> tuple[dict[str, list[PartInfo]], dict[str, SelectionNotes]]:
    """Choose for all sources. Return the parts of each, and what became of its candidates."""
    total = sum(selector.num_samples for selector in selectors)
    parts: dict[str, list[PartInfo]] = {}
    found: dict[str, SelectionNotes] = {}
    done = 0
    with Bars() as bars:
        for selector in selectors:
            mine, notes = parts.setdefault(selector.source, []), found.setdefault(selector.source, SelectionNotes())
            for part, some in selector.parts(written):
                mine.append(part)
                notes.add(some)
                done += part.num_samples
                bars.update("select", done, total)
    return parts, found


class _SourceSelector:
    """Chooses for one source. Parts that an earlier try of the job has made are not made again."""

    def __init__(self, table: CandidateTable, source: str, config: SelectionConfig, writer: PartWriter) -> None:
        self.source = source
        self._table, self._config, self._writer = table, config, writer
        self._parts = table.manifest.parts[source]
        self._starts = np.cumsum([0, *(part.num_samples for part in self._parts)]).tolist()

    @property
    def num_samples(self) -> int:
        """Return the number of samples of the source."""
        return int(self._starts[-1])

    def parts(self, written: Mapping[Place, WrittenPart]) -> Iterator[tuple[PartInfo, SelectionNotes]]:
        """Yield each part with its counts, in order. Few parts are in memory at a time."""

        def make(number: int) -> tuple[PartInfo, SelectionNotes]:
            done = written.get((self.source, number))
            return (done.info, SelectionNotes.from_json(done.notes)) if done else self._write(number)

        if any((self.source, number) not in written for number in range(len(self._parts))):
            _ = self._positives  # once, before the threads ask for it
        yield from read_ahead(make, range(len(self)), _THREADS)

    def __len__(self) -> int:
        return len(self._parts)

    def examples(self, num_parts: int) -> Iterator[Example]:
        """Yield candidates and choice of the first parts. They are chosen again, and not written."""
        for number in range(min(num_parts, len(self))):
            yield self.source, self._starts[number], *self._select(number)

    def _write(self, number: int) -> tuple[PartInfo, SelectionNotes]:
        rows, selected = self._select(number)
        notes = SelectionNotes.of(rows, selected)
        return self._writer.write(self.source, number, selected.rows, notes.as_json()), notes

    def _select(self, number: int) -> tuple[CandidateRows, Selected]:
        rows = self._table.rows(self.source, number)
        _check_scores(self._table, rows, self.source, self._config)
        start = self._starts[number]
        positives = self._positives.part(start, self._starts[number + 1])
        return rows, select(rows, positives, self._config, self.source, start)

    @cached_property
    def _positives(self) -> PositiveScores:
        """Scores of the positives of the whole source: 40 bytes a sample. A rank needs the candidates for a moment."""
        needs_rank = self._config.positives.max_rank is not None

        def read(number: int) -> CandidateRows:
            rows = self._table.rows(self.source, number)
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


def _write_report(
    table: CandidateTable,
    spec: SelectSpec,
    found: Mapping[str, SelectionNotes],
    selectors: Sequence[_SourceSelector],
    writer: PartWriter,
) -> None:
    """Draw the report, with examples of the first parts of each source."""
    per_source = -(-spec.num_examples // (_EXAMPLES_OF_PART * max(1, len(selectors))))
    examples = chain.from_iterable(one.examples(per_source) for one in selectors)
    num_parts = sum(min(per_source, len(one)) for one in selectors)
    write_report(writer.store, writer.job, table, spec, found, examples, num_parts)


def _result(spec: SelectSpec, table: CandidateTable) -> dict[str, Any]:
    for source, some in table.manifest.counts.items():
        counts = SelectionCounts.from_json(some)
        mean = counts.chosen / max(1, counts.samples)
        say(
            f"  {source}: {mean:.1f} negatives for each of {counts.samples:,} samples;"
            f" {counts.without_negatives:,} have none, {counts.dropped:,} are left out"
        )
    say(f"  report: {table.store.url}/{PAGE}")
    setting = f"{{candidates: {spec.out}, negatives_per_sample: {spec.selection.negatives_per_sample}}}"
    say(f"  to train with it: data: {setting}")
    return {"outputs": [spec.out], "fingerprint": table.fingerprint, "counts": table.manifest.counts}
