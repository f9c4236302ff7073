"""Rules that need vectors of a model: pairs that do not fit together, and semantic duplicates (SemDeDup).

SemDeDup (arXiv 2303.09540): clusters by k-means, then cosines within each cluster. The samples of a cluster are sorted
by their cosine with its center. One that is closer than a threshold to any sample before it is a duplicate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipelines.curate.hamming import Ints
from pipelines.curate.samples import Drop, FullCluster, Samples, positions
from pipelines.curate.settings import AlignmentRule, SemanticRule
from pipelines.curate.tables import Bools
from pipelines.imports import import_extra

MISALIGNED, DUPLICATE, FULL = "misaligned", "semantic_duplicate", "full_cluster"
FloatArray = npt.NDArray[np.float32]
_ITERATIONS = 20
_POINTS_PER_CENTER = 256  # k-means learns from at most so many: more change little
_EXAMPLES = 6  # of a full cluster
_ROWS = 4096  # of a block of cosines: 64 MB at most


def find_misaligned(samples: Samples, keep: Bools, cosines_N: FloatArray, rule: AlignmentRule) -> list[Drop]:
    """Return the pairs with the lowest cosines of each source or task. NaN is unknown, and such samples stay."""
    names: Sequence[str] = samples.sources if rule.per == "source" else samples.tasks
    group_of = np.array([names.index(name) for name in names])[samples.source_of]
    judged = keep & ~np.isnan(cosines_N)
    low = judged & (cosines_N < rule.min_cosine) if rule.min_cosine is not None else np.zeros(len(keep), np.bool_)
    for group in np.unique(group_of[judged]):
        mine = positions(judged & (group_of == group))
        lowest = np.argsort(cosines_N[mine], kind="stable")[: int(rule.quantile * len(mine))]
        low[mine[lowest]] = True
    return [Drop(sample, MISALIGNED, float(cosines_N[sample])) for sample in positions(low).tolist()]


def find_semantic(
    samples: Samples, keep: Bools, vectors_ND: FloatArray, rule: SemanticRule, within: str, seed: int
) -> tuple[list[Drop], FloatArray, list[FullCluster]]:
    """Return semantic duplicates and the samples that are too many in a cluster, and the weight of each sample `[N]`.

    The last are the clusters whose samples have a weight. `vectors_ND` are unit vectors of the targets. Samples whose
    vector is zero stay.
    """
    weight_N = np.ones(len(keep), np.float32)
    known = keep & (np.einsum("nd,nd->n", vectors_ND, vectors_ND) > 0)
    source_of = samples.source_of if within == "source" else np.zeros(len(samples), np.int64)
    drops: list[Drop] = []
    clusters: list[FullCluster] = []
    for source in np.unique(source_of[known]):
        members = positions(known & (source_of == source))
        num_clusters = max(1, round(len(members) / rule.cluster_samples))
        cluster, centrality = cluster_vectors(vectors_ND[members], num_clusters, seed)
        for number in range(num_clusters):
            mine = cluster == number
            duplicates, left = _duplicates(samples, members[mine], vectors_ND, centrality[mine], rule)
            drops += duplicates
            if rule.max_per_cluster is None or len(left) <= rule.max_per_cluster:
                continue
            if rule.full_clusters == "weigh":
                weight_N[left] = rule.max_per_cluster / len(left)
                clusters.append(_full_cluster(samples, left, rule.max_per_cluster))
            else:
                drops += _too_many(samples, left, rule.max_per_cluster, seed)
    return drops, weight_N, clusters


def cluster_vectors(vectors_ND: FloatArray, num_clusters: int, seed: int) -> tuple[Ints, FloatArray]:
    """Return the cluster of each unit vector, and its cosine with the center, by spherical k-means (FAISS)."""
    faiss = import_extra("faiss", "curation", "curate")
    vectors = np.ascontiguousarray(vectors_ND, np.float32)
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        num_clusters,
        niter=_ITERATIONS,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=_POINTS_PER_CENTER,
    )
    kmeans.train(vectors)
    centrality, cluster = kmeans.index.search(vectors, 1)
    return cluster[:, 0].astype(np.int64), centrality[:, 0]


def _duplicates(
    samples: Samples, members: Ints, vectors_ND: FloatArray, centrality: FloatArray, rule: SemanticRule
) -> tuple[list[Drop], Ints]:
    """Return the duplicates in a cluster, and the samples that are left."""
    order = np.argsort(centrality if rule.keep == "farthest" else -centrality, kind="stable")
    members = members[order]
    drops: list[Drop] = []
    stays = np.ones(len(members), np.bool_)
    if rule.cosine is not None:
        nearest, cosine = nearest_before(vectors_ND[members])
        for place in np.flatnonzero(cosine > rule.cosine).tolist():
            other = int(members[nearest[place]])
            drops.append(samples.duplicate(int(members[place]), other, DUPLICATE, float(cosine[place])))
            stays[place] = False
    return drops, members[stays]


def _full_cluster(samples: Samples, members: Ints, most: int) -> FullCluster:
    """Return a cluster with some of its members, evenly from first to last. They are in order of centrality."""
    of_sources = np.unique(np.searchsorted(samples.starts, members, side="right") - 1)
    sources = tuple(samples.sources[place] for place in of_sources)
    places = np.linspace(0, len(members) - 1, min(_EXAMPLES, len(members)), dtype=int)
    return FullCluster(len(members), most / len(members), sources, tuple(members[places].tolist()))


def _too_many(samples: Samples, members: Ints, most: int, seed: int) -> list[Drop]:
    drawn = sorted(members.tolist(), key=lambda sample: _lot(samples, sample, seed))
    return [Drop(sample, FULL, float(len(drawn))) for sample in drawn[most:]]


def nearest_before(vectors_ND: FloatArray) -> tuple[Ints, FloatArray]:
    """Return, for each vector, the place of the most similar one before it and their cosine. The first has -1."""
    num_rows = len(vectors_ND)
    nearest, cosine = np.zeros(num_rows, np.int64), np.full(num_rows, -1.0, np.float32)
    for start in range(0, num_rows, _ROWS):
        stop = min(start + _ROWS, num_rows)
        rows = np.arange(start, stop)
        for before in range(0, stop, _ROWS):
            until = min(before + _ROWS, stop)
            scores = vectors_ND[start:stop] @ vectors_ND[before:until].T
            scores[rows[:, None] <= np.arange(before, until)] = -1.0
            best = scores.argmax(axis=1)
            value = scores[np.arange(len(rows)), best]
            better = value > cosine[start:stop]
            nearest[rows[better]], cosine[rows[better]] = best[better] + before, value[better]
    return nearest, cosine


def _lot(samples: Samples, sample: int, seed: int) -> bytes:
    """Return a number by which samples of a full cluster are drawn. It depends on their content only."""
    content = samples.texts.content[2 * sample : 2 * sample + 2].tobytes()
    return hashlib.sha256(b"%d " % seed + content).digest()
