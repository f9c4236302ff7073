"""Samples with their positive, chosen negatives and left-out candidates, for people to look at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from jobs.mining.specs import SelectSpec
from pipelines.candidates.selection import Selected
from pipelines.candidates.table import CandidateTable
from pipelines.candidates.types import CandidateRows
from pipelines.errors import UserError
from pipelines.feed.reader import Reader, Role
from pipelines.samples import MODALITIES, DecodedInput, Modality, Rejected
from rzen.report.hits import Hit, Search

Example = tuple[str, int, CandidateRows, Selected]
"""Source, first sample, candidates and choice of a part to take examples from."""
_CHOSEN, _LEFT_OUT = 3, 2  # candidates of an example


def example_searches(
    table: CandidateTable, spec: SelectSpec, parts: Iterable[Example], num_parts: int
) -> Iterator[Search]:
    """Yield `num_examples` samples of `num_parts` parts, evenly. Raises `UserError` if the data cannot be read."""
    readers = _Readers(table, spec)
    left = spec.num_examples
    for number, (source, start, rows, selected) in enumerate(parts):
        share = -(-left // (num_parts - number))
        useful = np.flatnonzero((selected.rows.counts > 0) & ~np.isnan(rows.positive_recall))
        for row in useful[np.linspace(0, len(useful) - 1, min(share, len(useful)), dtype=int)].tolist():
            yield _search(readers, source, start + row, row, rows, selected)
            left -= 1


class _Readers:
    """Reads inputs of the data and of the pools."""

    def __init__(self, table: CandidateTable, spec: SelectSpec) -> None:
        self._table, self._spec = table, spec
        self._own = spec.root or table.manifest.data.root
        self._readers: dict[tuple[str, str], Reader] = {}
        self._checked: set[int] = set()

    def sample(self, source: str, index: int, role: Role) -> DecodedInput | Rejected:
        """Return an input of a sample of the data."""
        return self._input(self._own, self._table.manifest.data.split, source, index, role)

    def candidate(self, number: int) -> DecodedInput | Rejected:
        """Return the target that is a candidate."""
        pools, indices = self._table.manifest.locate(np.array([number]))
        pool = self._table.manifest.pools[int(pools[0])]
        root = pool.root or self._own
        if int(pools[0]) not in self._checked:
            if self._reader(root, pool.split).source(pool.source).fingerprint != pool.fingerprint:
                problem = f"takes candidates from another version of {pool.source} in {root}"
                raise UserError(self._table.store.url, problem, "mine again")
            self._checked.add(int(pools[0]))
        return self._input(root, pool.split, pool.source, int(indices[0]), "positive")

    def _input(self, root: str, split: str, source: str, index: int, role: Role) -> DecodedInput | Rejected:
        (found,) = self._reader(root, split).inputs(source, [(index, role)])
        return found

    def _reader(self, root: str, split: str) -> Reader:
        if (root, split) not in self._readers:
            self._readers[root, split] = Reader(self._spec.data_of(root, split))
        return self._readers[root, split]


def _search(readers: _Readers, source: str, index: int, row: int, rows: CandidateRows, selected: Selected) -> Search:
    query = readers.sample(source, index, "query")
    hits = [_hit(readers.sample(source, index, "positive"), float(rows.positive_recall[row]), "the positive", True)]
    for place, note in _shown(row, rows, selected):
        found = readers.candidate(int(rows.candidate[place]))
        hits.append(_hit(found, float(rows.recall[place]), note, False))
    title = query.text if isinstance(query, DecodedInput) and query.text else f"{source}/{rows.key[row]}"
    frames = query.frames if isinstance(query, DecodedInput) else []
    return Search(title, [replace(hit, rank=rank) for rank, hit in enumerate(hits)], frames)


def _shown(row: int, rows: CandidateRows, selected: Selected) -> list[tuple[int, str]]:
    """Return the best candidates of a sample that were chosen, and that were left out, with why."""
    span = rows.span(row)
    is_chosen = np.isin(np.arange(span.start, span.stop), selected.chosen)
    chosen = (span.start + np.flatnonzero(is_chosen))[:_CHOSEN].tolist()
    left_out: list[tuple[int, str]] = []
    for place in (span.start + np.flatnonzero(~is_chosen)).tolist():
        rules = [rule for rule, removed in selected.removed_by.items() if removed[place]]
        if rules and len(left_out) < _LEFT_OUT:
            left_out.append((place, f"left out: {', '.join(rules)}"))
    return sorted([*((place, "chosen") for place in chosen), *left_out])


def _hit(found: DecodedInput | Rejected, score: float, note: str, is_positive: bool) -> Hit:
    if isinstance(found, Rejected):
        return Hit(0, score, "text", f"cannot be shown: {found.reason}", note, [], is_positive)
    return Hit(0, score, _modality(found), found.text, note, found.frames, is_positive)


def _modality(shown: DecodedInput) -> Modality:
    kinds: dict[str, Modality] = {"image": "image", "video": "video", "document": "page"}
    found: Sequence[Modality] = [kinds[visual.kind] for visual in shown.visuals]
    return found[0] if found else MODALITIES[-1]
