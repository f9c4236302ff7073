"""Samples with a weight below 1: which of them an epoch takes.

A weight is the probability that an epoch takes the sample. Every epoch takes the same number of them, the sum of the
weights rounded down. So all epochs have equally many batches. This is systematic sampling: samples in a random order
fill stretches of a line, each as long as its weight. Those at the places u, u + 1, u + 2, ... are taken.

Alternatives, such as the positives of one query, share a stretch. If it is taken, their weights draw one of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.plan.dealing import linked_sets
from pipelines.plan.subset import seed_of_name
from pipelines.plan.types import NO_SAMPLES, WEIGHT_STREAM, Int64Array, SourceTable

_ROUNDING = 1e-9  # of a sum of weights


def table_of_epoch(table: SourceTable, name: str, seed: int, epoch: int) -> SourceTable:
    """Return the table without the samples that an epoch does not take: they are dropped. No sample has a weight."""
    if not len(table.weighted):
        return table
    rng = np.random.default_rng([seed, WEIGHT_STREAM, seed_of_name(name), epoch])
    if len(table.alternatives):
        taken = draw_alternatives(table.weights, table.alternatives, table.num_drawn, rng)
    else:
        taken = draw(table.weights, table.num_drawn, rng)
    dropped = np.union1d(table.dropped, table.weighted[~taken])
    return replace(table, dropped=dropped, weighted=NO_SAMPLES, weights=np.zeros(0), alternatives=NO_SAMPLES)


def one_of_each_query(table: SourceTable) -> SourceTable:
    """Return the table with samples of an equal query as alternatives: an epoch takes one of them.

    Their weights are divided by their number. So a query is taken in all epochs, or in the mean of their own weights.
    A positive that an epoch does not take may be the target of another query. Queries that are linked in this way
    become equal in `queries`, so that batches keep them apart.
    """
    is_kept = ~np.isin(table.duplicates, table.dropped)
    samples, queries = table.duplicates[is_kept], table.queries[is_kept]
    _, group, counts = np.unique(queries, return_inverse=True, return_counts=True)
    is_shared = counts[group] > 1
    apart = table.queries.copy()
    apart[is_kept] = _linked_queries(table.targets[is_kept], queries, group, is_shared)
    samples, group = samples[is_shared], group[is_shared]
    weighted = np.union1d(table.weighted, samples)
    weights = np.ones(len(weighted))
    weights[np.searchsorted(weighted, table.weighted)] = table.weights
    alternatives = np.full(len(weighted), -1)
    places = np.searchsorted(weighted, samples)
    alternatives[places] = group
    weights[places] /= counts[group]
    alternatives = alternatives if len(samples) else NO_SAMPLES
    return replace(table, queries=apart, weighted=weighted, weights=weights, alternatives=alternatives)


def _linked_queries(
    targets: npt.NDArray[np.integer[Any]],
    queries: npt.NDArray[np.integer[Any]],
    group: Int64Array,
    is_shared: npt.NDArray[np.bool_],
) -> npt.NDArray[np.integer[Any]]:
    """Return the queries of samples, made equal in each set that targets and queries link.

    `group` numbers the queries, and `is_shared` marks samples of queries with several positives. Sets without such a
    query stay as they are: their equal targets are apart anyway.
    """
    if not is_shared.any():
        return queries
    linked = linked_sets(np.unique(targets, return_inverse=True)[1], group)
    with_several = np.zeros(linked.max() + 1, np.bool_)
    with_several[linked[is_shared]] = True
    least = np.full(len(with_several), np.iinfo(queries.dtype).max, queries.dtype)
    np.minimum.at(least, linked, queries)
    return np.where(with_several[linked], least[linked], queries)


def draw(weights: npt.NDArray[np.float64], count: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Return which samples are taken, exactly `count`. Each is with its weight times `count` / sum of the weights.

    `count` is at most the sum, so that no sample could be taken twice.
    """
    taken = np.zeros(len(weights), np.bool_)
    order = rng.permutation(len(weights))
    ends = np.cumsum(weights[order])
    ends *= count / ends[-1]
    ends[-1] = count  # without rounding, so that the count is exact
    passed = np.floor(ends + rng.random())
    taken[order] = np.diff(passed, prepend=0.0) > 0
    return taken


def draw_alternatives(
    weights: npt.NDArray[np.float64], alternatives: Int64Array, count: int, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Return which samples are taken, exactly `count`, and at most one of those with an equal number above -1.

    The weights of alternatives have a sum of at most 1. Each sample is taken as `draw` says.
    """
    alone = alternatives < 0
    group = np.where(alone, alternatives.max(initial=-1) + 1 + np.arange(len(weights)), alternatives)
    _, group = np.unique(group, return_inverse=True)
    totals = np.bincount(group, weights).astype(np.float64)
    totals[np.abs(totals - 1) < _ROUNDING] = 1.0  # a third, three times
    with np.errstate(divide="ignore"):
        race = -np.log(rng.random(len(weights))) / weights  # the first one is each with its share of the weights
    order = np.lexsort((race, group))
    is_first = np.ones(len(weights), np.bool_)
    is_first[1:] = group[order][1:] != group[order][:-1]
    taken = np.zeros(len(weights), np.bool_)
    taken[order[is_first]] = draw(totals, count, rng)
    return taken
