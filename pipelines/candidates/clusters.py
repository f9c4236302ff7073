"""Clusters of samples that are hard negatives of each other, as B3 makes batches of them.

A graph joins samples whose targets a model ranks high for each other's queries, but not so high that they may be right.
METIS cuts it into parts of nearly equal size that keep most edges. A global batch is then made of whole parts.

Shapes: S samples of a source, E edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from pipelines.candidates.selection import ranks
from pipelines.candidates.types import NO_CLUSTER, BoolArray, CandidateManifest, CandidateRows, Int64Array
from pipelines.imports import import_extra

_UNBALANCED = 1  # in thousandths of a part's size: METIS keeps to it as far as whole samples can


@dataclass(frozen=True, slots=True, eq=False)
class Preferences:
    """Edges between samples of a source, each once with `one < other`, in order. `weight` is 1 or 2 directions."""

    one: Int64Array
    other: Int64Array
    weight: Int64Array

    @classmethod
    def of(cls, pairs: Int64Array) -> Self:
        """Join directed pairs `[E, 2]` of a sample and one that it prefers."""
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        pairs, weight = np.unique(np.sort(np.unique(pairs, axis=0), axis=1), axis=0, return_counts=True)
        return cls(pairs[:, 0].copy(), pairs[:, 1].copy(), weight.astype(np.int64))


def preferred_pairs(
    rows: CandidateRows, manifest: CandidateManifest, source: str, start: int, first_rank: int, num_ranks: int
) -> Int64Array:
    """Return the pairs of a part: a sample of the source, and a sample whose target it ranks in the window, `[E, 2]`.

    The part begins at sample `start`. Candidates of other sources and datasets are left out.
    """
    rank = ranks(rows)
    inside = (rank >= first_rank) & (rank < first_rank + num_ranks)
    pool, index = manifest.locate(rows.candidate[inside])
    own = [
        number
        for number, some in enumerate(manifest.pools)
        if (some.root, some.split, some.source) == (None, manifest.data.split, source)
    ]
    is_own = np.isin(pool, own)
    return np.stack([rows.sample[inside][is_own] + start, index[is_own]], axis=1)


def partition(edges: Preferences, keep: BoolArray, cluster_size: int, seed: int) -> Int64Array:
    """Return the cluster of each sample, int64 `[S]`. Samples without an edge, and dropped ones, have none.

    Clusters are numbered in the order of their first samples. Their sizes differ from `cluster_size` by about one.
    """
    usable = keep[edges.one] & keep[edges.other]
    one, other, weight = edges.one[usable], edges.other[usable], edges.weight[usable]
    nodes = np.unique(np.concatenate([one, other]))
    cluster = np.full(len(keep), NO_CLUSTER)
    num_parts = round(len(nodes) / cluster_size)
    if num_parts < 2:
        cluster[nodes] = 0
        return cluster
    source = np.searchsorted(nodes, np.concatenate([one, other]))
    target = np.searchsorted(nodes, np.concatenate([other, one]))
    order = np.lexsort((target, source))
    starts = np.concatenate([[0], np.cumsum(np.bincount(source, minlength=len(nodes)))])
    metis = import_metis()
    _, parts = metis.part_graph(
        num_parts,
        xadj=starts.tolist(),
        adjncy=target[order].tolist(),
        eweights=np.concatenate([weight, weight])[order].tolist(),
        options=metis.Options(seed=seed, ufactor=_UNBALANCED),
        recursive=False,
    )
    cluster[nodes] = _numbered(np.asarray(parts, np.int64))
    return cluster


def kept_weight(edges: Preferences, cluster: Int64Array) -> float:
    """Return the share of the edges' weight that is within clusters."""
    same = (cluster[edges.one] == cluster[edges.other]) & (cluster[edges.one] != NO_CLUSTER)
    return float(edges.weight[same].sum() / max(1, edges.weight.sum()))


def group_clusters(groups: Sequence[str], keep: BoolArray) -> Int64Array:
    """Return the cluster of each sample by the name of its group. Groups of one kept sample are no clusters."""
    names = np.array(groups, dtype=object)
    cluster = np.full(len(keep), NO_CLUSTER)
    kept = np.flatnonzero(keep & (names != ""))
    if len(kept):
        _, number, count = np.unique(names[kept].astype(str), return_inverse=True, return_counts=True)
        several = count[number] > 1
        cluster[kept[several]] = _numbered(number[several])
    return cluster


def _numbered(parts: Int64Array) -> Int64Array:
    """Number parts in the order of their first members."""
    _, first, number = np.unique(parts, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number].astype(np.int64)


def import_metis() -> Any:
    """Return METIS. Raises `UserError` if it is not installed."""
    return import_extra("pymetis", "mining", "method: preferences")
