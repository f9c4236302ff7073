"""Negatives chosen among candidates: a pure function of the table, the settings and the seed.

A score that is not known removes nothing, but for that of the positive: without it, no rule that compares with it can
be met.

Shapes: N samples of a shard, M candidates of all of them, S samples of the source.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pipelines.candidates.config import SelectionConfig, TeacherConfig
from pipelines.candidates.types import BoolArray, CandidateRows, FloatArray, Int64Array

_GOLDEN, _MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
UInt64Array = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class PositiveScores:
    """Scores of all positives of each sample's query, over the S samples of a source. NaN where none is known."""

    lowest: FloatArray
    """`[S]`, lowest cosine of a positive."""
    mean: FloatArray
    """`[S]`"""
    lowest_teacher: FloatArray
    """`[S]`, lowest judge score."""
    keep: BoolArray
    """`[S]`, whether some positive meets the rules for positives."""

    @classmethod
    def of(cls, parts: Sequence[CandidateRows], config: SelectionConfig) -> Self:
        """Join the parts of a source. Samples with an equal query share their positives."""
        query = np.concatenate([np.zeros(0, np.int64), *(part.query for part in parts)])
        recall = np.concatenate([np.zeros(0, np.float32), *(part.positive_recall for part in parts)])
        teacher = np.concatenate([np.zeros(0, np.float32), *(part.positive_teacher for part in parts)])
        rank = np.concatenate([np.zeros(0, np.int64), *map(positive_ranks, parts)])
        _, group = np.unique(np.where(query == 0, -1 - np.arange(len(query)), query), return_inverse=True)
        is_good = np.ones(len(query), np.bool_)
        rules = config.positives
        if rules.max_rank is not None:
            is_good &= rank <= rules.max_rank
        if rules.min_score is not None:
            is_good &= recall >= rules.min_score  # NaN is not
        good = np.zeros(len(query), np.bool_)
        np.logical_or.at(good, group, is_good)
        return cls(_least(recall, group), _mean(recall, group), _least(teacher, group), good[group])

    def part(self, start: int, stop: int) -> PositiveScores:
        """Return the scores of adjacent samples."""
        return PositiveScores(*(getattr(self, name)[start:stop] for name in self.__slots__))


def positive_ranks(rows: CandidateRows) -> Int64Array:
    """Return the rank from 1 of each sample's positive among its candidates, `[N]`. Unknown positives come last."""
    above = ~(rows.recall <= rows.positive_recall[rows.sample])
    return 1 + np.bincount(rows.sample[above], minlength=len(rows))


@dataclass(slots=True)
class SelectionCounts:
    """What became of candidates and samples."""

    samples: int = 0
    dropped: int = 0
    """Samples that the rules for positives, or too few negatives, leave out."""
    without_negatives: int = 0
    candidates: int = 0
    chosen: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    """Rule -> candidates that it removed of those that the rules before it had left."""
    removed_alone: Counter[str] = field(default_factory=Counter)
    """Rule -> candidates that it would remove by itself."""

    def as_json(self) -> dict[str, Any]:
        """Return the counts as plain data."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the counts that `as_json` gave."""
        found: dict[str, Any] = dict(values)
        for name in ("removed", "removed_alone"):
            found[name] = Counter(values[name])
        return cls(**found)

    def add(self, other: SelectionCounts) -> None:
        """Add the counts of another part."""
        for name in ("samples", "dropped", "without_negatives", "candidates", "chosen"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.removed.update(other.removed)
        self.removed_alone.update(other.removed_alone)


@dataclass(frozen=True, slots=True, eq=False)
class Selected:
    """The chosen negatives of a part, best first, and what became of all candidates."""

    rows: CandidateRows
    counts: SelectionCounts
    removed_by: dict[str, BoolArray]
    """Rule -> whether it removes each candidate of the part, `[M]`."""
    chosen: Int64Array
    """Places of the chosen ones among the candidates of the part."""


def select(
    rows: CandidateRows, positives: PositiveScores, config: SelectionConfig, source: str, start: int
) -> Selected:
    """Choose negatives for the samples of a part. Its first is sample `start` of the source."""
    removed_by = dict(_rules(rows, positives, config))
    counts = SelectionCounts(samples=len(rows), candidates=len(rows.candidate))
    left = np.ones(len(rows.candidate), np.bool_)
    for rule, removed in removed_by.items():
        counts.removed[rule] = int((left & removed).sum())
        counts.removed_alone[rule] = int(removed.sum())
        left &= ~removed
    chosen = _choose(rows, np.flatnonzero(left), config, source, start)
    found = with_teacher(rows.take(chosen), config.teacher)
    keep = rows.keep & positives.keep & (found.counts >= config.min_negatives)
    counts.chosen = len(chosen)
    counts.dropped = int((~keep).sum())
    counts.without_negatives = int((found.counts == 0).sum())
    return Selected(replace(found, keep=keep), counts, removed_by, chosen)


def with_teacher(rows: CandidateRows, config: TeacherConfig | None) -> CandidateRows:
    """Return rows whose teacher's scores are the mix of recall and judge scores. Unknown stays unknown."""
    if config is None:
        return rows
    recall, judge = np.float32(config.recall), np.float32(config.judge)
    return replace(
        rows,
        teacher=recall * rows.recall + judge * rows.teacher,
        positive_teacher=recall * rows.positive_recall + judge * rows.positive_teacher,
    )


def ranks(rows: CandidateRows) -> Int64Array:
    """Return the rank from 1 of each candidate of its sample, `[M]`."""
    return np.arange(len(rows.candidate)) - rows.bounds[:-1][rows.sample] + 1


def _rules(rows: CandidateRows, positives: PositiveScores, config: SelectionConfig) -> Iterator[tuple[str, BoolArray]]:
    """Yield each rule that is set, and whether it removes each candidate, `[M]`."""
    sample, rank, rules = rows.sample, ranks(rows), config.negatives
    if config.first_rank > 1 or config.last_rank is not None:
        yield "rank", (rank < config.first_rank) | (rank > (config.last_rank or rank.max(initial=0)))
    is_other = rows.candidate_modality != rows.modality[sample]
    if config.modality == "same":
        yield "modality", is_other
    elif config.modality == "mm_embed":
        is_above = rows.recall > rows.positive_recall[sample]
        yield "modality", np.where(is_other, ~is_above, rank < config.low_rank)
    # A candidate of another modality is wrong whatever it scores, so that no rule for right answers is for it.
    can_be_right = ~is_other if config.modality == "mm_embed" else np.ones(len(sample), np.bool_)
    lowest, mean = positives.lowest[sample], positives.mean[sample]
    if rules.max_score is not None:
        yield "max_score", can_be_right & (rows.recall > rules.max_score)
    if rules.margin is not None:
        yield "margin", can_be_right & ~(rows.recall <= lowest - rules.margin * np.abs(lowest))
    if rules.max_above_mean is not None:
        yield "max_above_mean", can_be_right & ~(rows.recall < mean + rules.max_above_mean)
    if rules.judge_margin is not None:
        limit = positives.lowest_teacher[sample] - rules.judge_margin
        is_right = (rows.teacher >= limit) | np.isnan(limit)
        yield "judge_margin", can_be_right & is_right & ~np.isnan(rows.teacher)
    if rules.max_owner_likeness is not None:
        yield "max_owner_likeness", can_be_right & (rows.owner > rules.max_owner_likeness)


def _choose(rows: CandidateRows, left: Int64Array, config: SelectionConfig, source: str, start: int) -> Int64Array:
    """Return the places of the chosen among those that are left, sample by sample and best first."""
    sample = rows.sample[left]
    most = config.negatives_per_sample
    if config.choice == "spread":
        place, count = _places(sample), np.bincount(sample, minlength=len(rows))[sample]
        # Of `count` places, those at i x (count - 1) / (most - 1) rounded down, for i below `most`.
        return left[_is_spread(place, count, most)]
    order: npt.NDArray[np.generic] = ranks(rows)[left]
    if config.choice == "random":
        order = hashes(config.seed, source, sample + start, rows.candidate[left])
    turn = np.zeros(len(left), np.int64)
    if config.modality == "mm_embed":  # in turns: the first of both kinds, the second of both, ...
        is_other = (rows.candidate_modality[left] != rows.modality[sample]).astype(np.int64)
        by_kind = np.lexsort((order, is_other, sample))
        turn[by_kind] = _places(sample[by_kind] * 2 + is_other[by_kind])
    by_order = np.lexsort((order, turn, sample))
    first = by_order[_places(sample[by_order]) < most]
    return left[np.sort(first)]


def _places(group: Int64Array) -> Int64Array:
    """Return the place of each member in its group, from 0. Members of a group are adjacent."""
    is_first = np.ones(len(group), np.bool_)
    is_first[1:] = group[1:] != group[:-1]
    firsts = np.flatnonzero(is_first)
    return np.arange(len(group)) - np.repeat(firsts, np.diff([*firsts, len(group)]))


def _is_spread(place: Int64Array, count: Int64Array, most: int) -> BoolArray:
    if most == 1:
        return np.asarray(place == 0)
    # Place p is taken if some i has floor(i (count - 1) / (most - 1)) = p: the least such i is a ceiling.
    least = -(-place * (most - 1) // np.maximum(1, count - 1))
    return np.asarray((count <= most) | (least * (count - 1) // (most - 1) == place))


def hashes(seed: int, source: str, sample: Int64Array, candidate: Int64Array) -> UInt64Array:
    """Return a random number for each pair of a sample and a candidate. It depends on nothing else (splitmix64)."""
    digest = hashlib.sha256(f"{seed}/{source}".encode()).digest()
    with np.errstate(over="ignore"):
        mixed = _mixed(np.uint64(int.from_bytes(digest[:8])) + sample.astype(np.uint64) * _GOLDEN)
        return _mixed(mixed ^ candidate.astype(np.uint64))


def _mixed(value: UInt64Array) -> UInt64Array:
    value = value + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


def _least(values: FloatArray, group: Int64Array) -> FloatArray:
    found = np.full(len(values), np.inf, np.float32)
    np.fmin.at(found, group, values)
    found[np.isinf(found)] = np.nan
    return found[group]


def _mean(values: FloatArray, group: Int64Array) -> FloatArray:
    known = ~np.isnan(values)
    total = np.bincount(group[known], values[known].astype(np.float64), minlength=len(values))
    count = np.bincount(group[known], minlength=len(values))
    mean = np.where(count > 0, total / np.maximum(1, count), np.nan).astype(np.float32)
    return mean[group]
