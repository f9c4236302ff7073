"""Clusters of samples: planted groups are found, whole and balanced, and the same every time."""

from __future__ import annotations

import numpy as np

from pipelines.candidates.clusters import Preferences, group_clusters, kept_weight, partition, preferred_pairs
from pipelines.candidates.types import CandidateManifest, CandidateRows, Pool, TableData

NUM_GROUPS, SIZE = 30, 8


def planted(seed: int = 0) -> tuple[Preferences, np.ndarray]:
    """Each sample prefers four of its group and, in one of ten pairs, any sample. Groups are shuffled."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(NUM_GROUPS), SIZE))
    pairs = []
    for sample in range(len(group)):
        mates = np.flatnonzero(group == group[sample])
        pairs += [(sample, int(mate)) for mate in rng.choice(mates, 5, replace=False)]
        pairs += [(sample, int(rng.integers(len(group))))] * int(rng.random() < 0.5)
    return Preferences.of(np.array(pairs, np.int64)), group


def test_edges_have_the_number_of_their_directions() -> None:
    edges = Preferences.of(np.array([[0, 1], [1, 0], [2, 0], [2, 0], [3, 3]]))
    assert (edges.one.tolist(), edges.other.tolist(), edges.weight.tolist()) == ([0, 0], [1, 2], [2, 1])


def test_planted_groups_become_clusters_of_nearly_equal_size() -> None:
    edges, group = planted()
    keep = np.ones(len(group), bool)
    cluster = partition(edges, keep, SIZE, seed=0)
    sizes = np.bincount(cluster)
    assert len(sizes) == NUM_GROUPS
    assert abs(sizes - SIZE).max() <= 2
    same_group, same_cluster = group[:, None] == group, cluster[:, None] == cluster
    assert (same_group & same_cluster).sum() / same_group.sum() > 0.8
    shuffled = np.random.default_rng(1).permutation(cluster)
    assert kept_weight(edges, cluster) > 0.7 > 0.2 > kept_weight(edges, shuffled)
    assert np.array_equal(partition(edges, keep, SIZE, seed=0), cluster)
    first = [int(np.flatnonzero(cluster == number)[0]) for number in range(NUM_GROUPS)]
    assert first == sorted(first)


def test_dropped_samples_and_those_without_edges_have_no_cluster() -> None:
    edges, group = planted()
    keep = np.ones(len(group) + 3, bool)
    keep[[0, 17]] = False
    cluster = partition(edges, keep, SIZE, seed=0)
    assert np.flatnonzero(cluster == -1).tolist() == [0, 17, *range(len(group), len(group) + 3)]
    few = Preferences.of(np.array([[1, 2]]))
    assert partition(few, np.ones(4, bool), 32, seed=0).tolist() == [-1, 0, 0, -1]
    assert partition(few, np.zeros(4, bool), 32, seed=0).tolist() == [-1] * 4


def test_pairs_are_those_of_the_window_and_of_the_own_source() -> None:
    pools = (Pool("train", "other", "f", 5), Pool("train", "s", "g", 10), Pool("train", "s", "h", 9, "elsewhere"))
    manifest = CandidateManifest("mine", TableData("d", "train", {"s": "g"}), pools)
    rows = CandidateRows.of(["a", "b"], [4, 3], candidate=[6, 2, 7, 8, 5, 16, 9])
    assert preferred_pairs(rows, manifest, "s", 4, 2, 2).tolist() == [[4, 2], [5, 4]]


def test_groups_by_name() -> None:
    keep = np.array([True, True, True, False, True, True])
    assert group_clusters(["b", "a", "b", "a", "", ""], keep).tolist() == [0, -1, 0, -1, -1, -1]
    assert group_clusters([], np.zeros(0, bool)).tolist() == []
