"""The schedule of a run: shares, epochs, runs of neighbors, purity, and what cannot be planned."""

import pickle
from collections import Counter
from functools import reduce
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import MixtureConfig, ResampleConfig
from pipelines.errors import UserError
from pipelines.plan.build import SMALL, build_plan
from pipelines.plan.plan import Plan
from pipelines.plan.resample import next_mixture_change
from pipelines.plan.types import MixturePhase, Row, SourceTable


def tables(sizes: dict[str, int]) -> dict[str, SourceTable]:
    return {name: SourceTable(size) for name, size in sizes.items()}


def all_rows(plan: Plan) -> list[tuple[str, int]]:
    return [row for step in range(plan.num_steps) for row in plan.batch(step).rows]


def runs_in(indices: list[int], num_samples: int) -> list[list[int]]:
    """Cuts where the next index is not the neighbor of the last; the epoch's ring is closed."""
    runs = [[indices[0]]]
    for index in indices[1:]:
        if index == (runs[-1][-1] + 1) % num_samples:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.dictionaries(st.sampled_from("abcd"), st.integers(6, 60), min_size=1),
    run_length=st.integers(1, 70),
    epochs=st.floats(0.3, 3),
    seed=st.integers(0, 2**31),
)
def test_no_sample_comes_twice_in_an_epoch(sizes: dict[str, int], run_length: int, epochs: float, seed: int) -> None:
    plan = build_plan(tables(sizes), MixtureConfig(run_length=run_length), global_batch=6, epochs=epochs, seed=seed)
    seen: Counter[tuple[str, int, int]] = Counter()
    epochs_of: dict[str, list[int]] = {}
    for step in range(plan.num_steps):
        batch = plan.batch(step)
        assert {source for source, _ in batch.rows} == {batch.blocks[0].source}
        assert len(batch.rows) == 6
        seen.update((batch.blocks[0].source, batch.blocks[0].epoch, index) for _, index in batch.rows)
        epochs_of.setdefault(batch.blocks[0].source, []).append(batch.blocks[0].epoch)
    assert set(seen.values()) <= {1}
    assert all(0 <= index < sizes[source] for source, _, index in seen)
    for source, numbers in epochs_of.items():
        assert numbers == [nth // (sizes[source] // 6) for nth in range(len(numbers))]


@settings(max_examples=60, deadline=None)
@given(weights=st.dictionaries(st.sampled_from("abcde"), st.floats(0.01, 9), min_size=1), steps=st.integers(1, 90))
def test_shares_are_exact_to_one_step(weights: dict[str, float], steps: int) -> None:
    sizes = dict.fromkeys("abcde", 20)
    plan = build_plan(tables(sizes), MixtureConfig(weights=weights), global_batch=4, steps=steps)
    assert plan.num_steps == steps
    counts = Counter(plan.batch(step).blocks[0].source for step in range(steps))
    for source, weight in weights.items():
        assert abs(counts[source] - steps * weight / sum(weights.values())) < 1


def test_shares_hold_all_along_the_run() -> None:
    mixture = MixtureConfig(weights={"a": 3.0, "b": 1.0})
    plan = build_plan(tables({"a": 40, "b": 40, "left out": 40}), mixture, global_batch=4, steps=80)
    for span in range(0, 80, 16):
        assert 11 <= sum(plan.batch(step).blocks[0].source == "a" for step in range(span, span + 16)) <= 13


def test_without_weights_one_epoch_visits_every_whole_batch_once() -> None:
    plan = build_plan(tables({"a": 23, "b": 10}), MixtureConfig(run_length=4), global_batch=5)
    assert Counter(plan.batch(step).blocks[0].source for step in range(plan.num_steps)) == {"a": 4, "b": 2}
    assert Counter(source for source, _ in set(all_rows(plan))) == {"a": 20, "b": 10}
    assert build_plan(tables({"a": 23, "b": 10}), MixtureConfig(), global_batch=5, epochs=2.5).num_steps == 15
    assert build_plan(tables({"a": 23}), MixtureConfig(), global_batch=5, epochs=0.01).num_steps == 1


def test_each_epoch_has_an_order_of_its_own() -> None:
    plan = build_plan(tables({"a": 12}), MixtureConfig(run_length=2), global_batch=12, epochs=3)
    orders = [plan.batch(step).rows for step in range(3)]
    assert len(set(orders)) == 3
    assert {tuple(sorted(order)) for order in orders} == {tuple(("a", n) for n in range(12))}


def test_only_so_many_samples_of_a_source_are_used() -> None:
    mixture = MixtureConfig(max_samples_per_source=9)
    plan = build_plan(tables({"a": 1000, "b": 7}), mixture, global_batch=3, epochs=4)
    used = set(all_rows(plan))
    assert Counter(source for source, _ in used) == {"a": 9, "b": 7}
    assert plan.summary()[0] == "a: 9 samples, batches of 3, 12 of 20 steps (4.00 epochs)"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_every_number_of_workers_sees_the_same_batch(world_size: int) -> None:
    plan = build_plan(tables({"a": 50, "b": 31}), MixtureConfig(), global_batch=12, seed=3)
    plan.check_world_size(world_size)
    for step in range(plan.num_steps):
        batch = plan.batch(step)
        shares = [plan.batch(step, rank, world_size).rows for rank in range(world_size)]
        assert {len(share) for share in shares} == {12 // world_size}
        assert tuple(row for share in shares for row in share) == batch.rows


def test_a_batch_depends_on_nothing_but_the_plan() -> None:
    def fresh() -> Plan:
        return build_plan(tables({"a": 40, "b": 30}), MixtureConfig(), global_batch=5, seed=11)

    plan, backwards, duplicate = fresh(), fresh(), pickle.loads(pickle.dumps(fresh()))
    expected = [plan.batch(step) for step in range(plan.num_steps)]
    assert [backwards.batch(step) for step in reversed(range(plan.num_steps))] == expected[::-1]
    np.random.default_rng(0).random()
    assert [duplicate.batch(step) for step in range(plan.num_steps)] == expected
    shuffled = build_plan(tables({"b": 30, "a": 40}), MixtureConfig(), global_batch=5, seed=11)
    assert [shuffled.batch(step) for step in range(plan.num_steps)] == expected


def test_a_known_plan_does_not_change() -> None:
    """Resuming compares plans of two versions of this program: these rows were written down once."""
    plan = build_plan(tables({"a": 7, "b": 5}), MixtureConfig(run_length=3), global_batch=2, seed=1)
    assert [plan.batch(step).blocks[0].source for step in range(5)] == ["a", "b", "a", "b", "a"]
    assert plan.batch(0).rows + plan.batch(1).rows == (("a", 1), ("a", 2), ("b", 2), ("b", 3))


def test_steps_outside_the_plan_are_refused() -> None:
    plan = build_plan(tables({"a": 10}), MixtureConfig(), global_batch=5)
    for step in (-1, 2):
        with pytest.raises(IndexError, match=r"outside 0\.\.1"):
            plan.batch(step)


@pytest.mark.parametrize(
    ("run_length", "num_samples", "run_sizes"),
    [
        (4, 12, [4, 4, 4]),
        (5, 12, [5, 5, 2]),  # does not divide: the last run is shorter
        (12, 12, [12]),
        (100, 12, [12]),  # longer than the source
        (1, 12, [1] * 12),
    ],
)
def test_runs_of_neighbors_stay_together(run_length: int, num_samples: int, run_sizes: list[int]) -> None:
    plan = build_plan(
        tables({"a": num_samples}), MixtureConfig(run_length=run_length), global_batch=num_samples, epochs=5
    )
    for step in range(5):
        indices = [index for _, index in plan.batch(step).rows]
        assert sorted(indices) == list(range(num_samples))
        # Runs that happen to meet their successor look like one: there are never more than were cut.
        assert len(runs_in(indices, num_samples)) <= len(run_sizes)
        if run_length > 1:
            assert max(len(run) for run in runs_in(indices, num_samples)) >= max(run_sizes)


def test_the_cuts_between_runs_shift_with_the_epoch() -> None:
    plan = build_plan(tables({"a": 64}), MixtureConfig(run_length=8), global_batch=64, epochs=6)
    starts = {runs_in([i for _, i in plan.batch(step).rows], 64)[0][0] % 8 for step in range(6)}
    assert len(starts) > 1


def test_the_fingerprint_distinguishes_plans() -> None:
    mixture = MixtureConfig(weights={"a": 2.0, "b": 1.0})

    def fingerprint(sizes: dict[str, int] | None = None, **changes: object) -> str:
        settings: dict[str, object] = {"mixture": mixture, "global_batch": 4, "steps": 12, "seed": 0} | changes
        return build_plan(tables(sizes or {"a": 20, "b": 30}), **settings).fingerprint()  # type: ignore[arg-type]

    assert fingerprint() == fingerprint({"b": 30, "a": 20, "left out": 5})
    others = [
        fingerprint({"a": 21, "b": 30}),
        fingerprint(global_batch=5),
        fingerprint(steps=13),
        fingerprint(seed=1),
        fingerprint(mixture=MixtureConfig(weights={"a": 1.0, "b": 1.0})),
        fingerprint(mixture=MixtureConfig(weights={"a": 2.0, "b": 1.0}, run_length=8)),
        fingerprint(mixture=MixtureConfig(weights={"a": 2.0, "b": 1.0}, max_samples_per_source=25)),
    ]
    assert len({fingerprint(), *others}) == 8


def test_small_sources_are_merged_when_asked() -> None:
    mixture = MixtureConfig(merge_small=True, run_length=2)
    plan = build_plan(tables({"a": 20, "b": 3, "c": 4}), mixture, global_batch=8, epochs=3)
    batches = [plan.batch(step) for step in range(plan.num_steps)]
    small = [batch for batch in batches if batch.blocks[0].source == SMALL]
    assert {len(batch.rows) for batch in small} == {6}  # 7 samples: the largest even number
    assert {len(batch.rows) for batch in batches if batch.blocks[0].source == "a"} == {8}
    members = {("b", 0), ("b", 1), ("b", 2), ("c", 0), ("c", 1), ("c", 2), ("c", 3)}
    assert all(len(set(batch.rows)) == 6 and set(batch.rows) <= members for batch in small)
    assert {row for batch in small for row in batch.rows} == members
    assert [batch.blocks[0].epoch for batch in small] == list(range(len(small)))


def test_a_source_that_is_too_small_says_what_it_has_lost() -> None:
    def table(num_samples: int, dropped: int, weighted: int = 0) -> SourceTable:
        names = np.arange(weighted) + dropped
        return SourceTable(num_samples, dropped=np.arange(dropped), weighted=names, weights=np.full(weighted, 0.25))

    found = {"a": table(90, 0), "b": table(20, 17), "c": table(20, 2, 16), "d": table(7, 0)}
    ways = (
        "lower global_batch, set a smaller data.mixture.blocks for it, leave the source out of data.mixture.weights,"
        " set data.mixture.merge_small: true, or leave out less by data.curation and data.candidates"
    )
    with pytest.raises(UserError) as error:
        build_plan(found, MixtureConfig(), global_batch=8)
    assert str(error.value) == (
        "global_batch: source 'b' has 3 samples of 20 (tables drop 17), fewer than one batch of 8; the same holds for"
        " c with 6 of 20 (tables drop 2, an epoch takes 4 of 16 with a weight), d with 7; " + ways
    )
    with pytest.raises(
        UserError, match=r"has 5 samples of 90 \(data.mixture.max_samples_per_source leaves 5 of 90\), f"
    ):
        build_plan({"a": table(90, 0)}, MixtureConfig(max_samples_per_source=5), global_batch=8)
    blocks = build_plan(found, MixtureConfig(blocks={"b": 2, "c": 4, "d": 4}), global_batch=8)
    assert {source.name: source.batch for source in blocks.sources} == {"a": 8, "b": 2, "c": 4, "d": 4}
    merged = build_plan(found, MixtureConfig(merge_small=True), global_batch=8)
    assert {source.name: source.num_samples for source in merged.sources} == {"a": 90, SMALL: 16}


def test_what_cannot_be_planned_is_reported() -> None:
    with pytest.raises(UserError, match=r"data\.mixture\.weights: unknown source 'x'; the data has a, b"):
        build_plan(tables({"b": 9, "a": 9}), MixtureConfig(weights={"a": 1.0, "x": 1.0}), global_batch=4)
    with pytest.raises(UserError, match=r"source 'b' has 3 samples, fewer than one batch of 4; .*merge_small"):
        build_plan(tables({"a": 9, "b": 3}), MixtureConfig(), global_batch=4)
    with pytest.raises(UserError, match="1 training samples are not enough"):
        build_plan(tables({"a": 1}), MixtureConfig(merge_small=True), global_batch=4)
    with pytest.raises(UserError, match="0 training samples are not enough"):
        build_plan(tables({}), MixtureConfig(), global_batch=4)
    plan = build_plan(tables({"a": 9, "b": 6}), MixtureConfig(merge_small=True), global_batch=8)
    with pytest.raises(UserError, match="batches of source 'small' have 6 samples, which 4 workers cannot share"):
        plan.check_world_size(4)
    plan.check_world_size(2)


@st.composite
def sources_with_duplicates(draw: st.DrawFn) -> tuple[SourceTable, npt.NDArray[np.int64]]:
    """A source and the target of each of its samples."""
    num_samples = draw(st.integers(8, 120))
    targets = np.array(draw(st.lists(st.integers(0, 60), min_size=num_samples, max_size=num_samples)))
    return SourceTable(num_samples, np.arange(num_samples), targets), targets


@settings(max_examples=150, deadline=None)
@given(
    source=sources_with_duplicates(),
    batch=st.integers(2, 8),
    run_length=st.integers(1, 20),
    limit=st.integers(8, 140),
    seed=st.integers(0, 99),
)
def test_duplicates_of_a_target_are_apart(
    source: tuple[SourceTable, npt.NDArray[np.int64]], batch: int, run_length: int, limit: int, seed: int
) -> None:
    table, targets = source
    mixture = MixtureConfig(run_length=run_length, max_samples_per_source=limit)
    plan = build_plan({"a": table}, mixture, global_batch=batch, epochs=2, seed=seed)
    used = min(table.num_samples, limit)
    num_batches = used // batch
    in_use = Counter(targets[list({i for step in range(plan.num_steps) for _, i in plan.batch(step).rows})].tolist())
    for epoch in range(2):
        rows = [
            i
            for step in range(plan.num_steps)
            if plan.batch(step).blocks[0].epoch == epoch
            for _, i in plan.batch(step).rows
        ]
        assert len(rows) == len(set(rows)) == num_batches * batch
    for step in range(plan.num_steps):
        for target, count in Counter(targets[[i for _, i in plan.batch(step).rows]].tolist()).items():
            # As few as a batch must have: one, unless the target has more duplicates than the epoch has batches.
            assert count <= -(-max(in_use[target], 1) // num_batches)


@settings(max_examples=150, deadline=None)
@given(
    num_samples=st.integers(8, 120),
    num_keys=st.tuples(st.integers(2, 80), st.integers(2, 80)),
    batch=st.integers(2, 8),
    with_clusters=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equal_targets_and_equal_queries_are_apart(
    num_samples: int, num_keys: tuple[int, int], batch: int, with_clusters: bool, seed: int
) -> None:
    """Wherever samples that are linked by them, directly or through others, are not more than the batches."""
    rng = np.random.default_rng(seed)
    targets, queries = (rng.integers(0, count, num_samples) for count in num_keys)
    members = np.array([0, 1, 3, 4] if with_clusters else [], np.int64)
    table = SourceTable(num_samples, np.arange(num_samples), targets, queries, members, members // 3)
    plan = build_plan({"a": table}, MixtureConfig(run_length=4), global_batch=batch, epochs=2, seed=seed)
    num_batches = num_samples // batch
    linked = linked_samples(targets, queries)
    for step in range(plan.num_steps):
        rows = [index for _, index in plan.batch(step).rows]
        assert len(set(rows)) == batch
        for one, other in combinations(rows, 2):
            if with_clusters or len(linked[one]) > num_batches:
                continue
            assert targets[one] != targets[other]
            assert queries[one] != queries[other]
    per_epoch = [plan.batch(step).rows for step in range(num_batches)]
    assert len({row for rows in per_epoch for row in rows}) == num_batches * batch


def linked_samples(*keys: npt.NDArray[np.int64]) -> list[set[int]]:
    """The set of each sample, by following equal keys from one to the next."""
    found: list[set[int]] = [set() for _ in keys[0]]
    for start in range(len(found)):
        if not found[start]:
            group, ahead = {start}, [start]
            while ahead:
                one = ahead.pop()
                near = {int(i) for key in keys for i in np.flatnonzero(key == key[one])} - group
                group |= near
                ahead += near
            for member in group:
                found[member] = group
    return found


def test_swaps_separate_equal_queries_of_a_set_larger_than_the_epoch() -> None:
    """Pictures of ten classes, each twice with two classes: all of the 2000 samples are linked through the classes."""
    rng = np.random.default_rng(0)
    queries = np.repeat(np.arange(1000), 2)
    targets = np.concatenate([rng.permutation(10)[:2] for _ in range(1000)])
    table = SourceTable(2000, np.arange(2000), targets, queries=queries)
    plan = build_plan({"a": table}, MixtureConfig(), global_batch=20, epochs=1)
    for step in range(plan.num_steps):
        rows = [index for _, index in plan.batch(step).rows]
        assert len(set(queries[rows].tolist())) == 20
        assert max(Counter(targets[rows].tolist()).values()) <= 4  # 2 would be even
    fewer = build_plan({"a": SourceTable(2000, np.arange(2000), targets)}, MixtureConfig(), global_batch=20)
    equal = sum(20 - len({int(queries[i]) for _, i in fewer.batch(step).rows}) for step in range(fewer.num_steps))
    assert equal > 5  # by chance, when the plan does not know the queries


def test_clusters_keep_equal_queries_of_others_apart() -> None:
    queries = np.array([1, 2, 3, 4, 5, 6, 1, 4, 7, 7, 8, 8])
    table = SourceTable(40, np.arange(12), np.arange(12), queries, np.arange(6), np.arange(6) % 2)
    plan = build_plan({"a": table}, MixtureConfig(), global_batch=8, epochs=4)
    for step in range(plan.num_steps):
        met = [int(queries[index]) for _, index in plan.batch(step).rows if index < 12]
        assert len(met) == len(set(met))


def test_queries_are_part_of_the_fingerprint() -> None:
    same = np.array([3, 3, 4])
    plans = [
        build_plan({"a": SourceTable(20, np.arange(3), same, queries=queries)}, MixtureConfig(), global_batch=4)
        for queries in (np.array([7, 8, 8]), np.array([7, 7, 8]))
    ]
    assert plans[0].fingerprint() != plans[1].fingerprint()


def test_queries_that_all_differ_change_no_batch() -> None:
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 30, 60)
    tables = [
        SourceTable(90, np.arange(60), targets, queries=queries) for queries in (np.arange(60), np.zeros(0, np.int64))
    ]
    plans = [build_plan({"a": table}, MixtureConfig(), global_batch=8, epochs=3) for table in tables]
    assert all_rows(plans[0]) == all_rows(plans[1])


def test_more_duplicates_than_batches_are_reported() -> None:
    targets = np.array([0] * 9 + list(range(1, 12)))
    plan = build_plan({"a": SourceTable(20, np.arange(20), targets)}, MixtureConfig(), global_batch=5)
    assert plan.summary()[1:] == [
        "a: 1 targets have more duplicates (up to 9) than an epoch has batches (4): some batches hold"
        " duplicates, which are not scored against each other"
    ]


def test_more_equal_queries_than_batches_are_reported() -> None:
    queries = np.array([0] * 9 + list(range(1, 12)))
    table = SourceTable(20, np.arange(20), np.arange(20), queries=queries)
    plan = build_plan({"a": table}, MixtureConfig(), global_batch=5)
    assert plan.summary()[1:] == [
        "a: 1 queries come in more samples (up to 9) than an epoch has batches (4): some batches hold a query twice,"
        " whose targets are no negatives of it"
    ]


def test_runs_stay_whole_next_to_duplicates() -> None:
    table = SourceTable(100, np.array([10, 11, 50, 77]), np.array([1, 2, 1, 2]))
    plan = build_plan({"a": table}, MixtureConfig(run_length=8), global_batch=20)
    for step in range(plan.num_steps):
        indices = [index for _, index in plan.batch(step).rows]
        assert len(runs_in(indices, 100)) <= 20 // 8 + 2 + 4


@st.composite
def sources_with_clusters(draw: st.DrawFn) -> SourceTable:
    """Clusters of any samples, with duplicates and dropped samples among them, in any proportion."""
    num_samples = draw(st.integers(24, 120))
    cluster_of = np.array(draw(st.lists(st.integers(-1, 20), min_size=num_samples, max_size=num_samples)))
    duplicates = np.array(sorted(draw(st.sets(st.integers(0, num_samples - 1), max_size=9))), np.int64)
    dropped = np.array(sorted(draw(st.sets(st.integers(0, num_samples - 1), max_size=num_samples - 13))), np.int64)
    clustered = np.flatnonzero(cluster_of >= 0)
    return SourceTable(
        num_samples,
        duplicates,
        np.arange(len(duplicates)) // 2,
        clustered=clustered,
        clusters=cluster_of[clustered],
        dropped=dropped,
    )


def clusters_of(table: SourceTable) -> list[set[int]]:
    """The samples of each cluster that are not dropped, if there are two at least."""
    kept: dict[int, set[int]] = {}
    for sample, cluster in zip(table.clustered.tolist(), table.clusters.tolist(), strict=True):
        if sample not in table.dropped:
            kept.setdefault(cluster, set()).add(sample)
    return [members for members in kept.values() if len(members) > 1]


@settings(max_examples=200, deadline=None)
@given(
    table=sources_with_clusters(),
    run_length=st.integers(1, 9),
    batch=st.sampled_from([2, 4, 12]),
    seed=st.integers(0, 99),
)
def test_clusters_share_a_batch(table: SourceTable, run_length: int, batch: int, seed: int) -> None:
    plan = build_plan({"a": table}, MixtureConfig(run_length=run_length), global_batch=batch, seed=seed, epochs=2)
    num_batches = table.num_kept // batch
    for epoch in range(2):
        rows = [plan.batch(step).rows for step in range(epoch * num_batches, (epoch + 1) * num_batches)]
        place = {index: step for step, some in enumerate(rows) for _, index in some}
        assert len(place) == num_batches * batch  # each batch is full, and no sample comes twice
        assert not set(place) & set(table.dropped.tolist())
        room = [batch] * num_batches
        divided = []
        for members in clusters_of(table):
            steps = {place.get(member, -1) for member in members}
            if len(steps) > 1:
                divided.append(len(members))
            elif steps != {-1}:
                room[steps.pop()] -= len(members)
        # A cluster is divided only where no batch has room for it next to the clusters that are whole.
        if max(map(len, clusters_of(table)), default=0) <= batch:
            assert all(size > max(room) for size in divided)
        for world_size in (1, 2):
            shares = [plan.batch(epoch, rank, world_size).rows for rank in range(world_size)]
            assert tuple(row for share in shares for row in share) == plan.batch(epoch).rows


@settings(max_examples=100, deadline=None)
@given(num_clusters=st.integers(1, 12), num_pairs=st.integers(0, 12), seed=st.integers(0, 99))
def test_equal_targets_of_clusters_and_others_are_apart(num_clusters: int, num_pairs: int, seed: int) -> None:
    """Clusters of 3 any samples, and pairs of equal targets, among four times as many free samples."""
    rng = np.random.default_rng(seed)
    num_samples = 4 * (3 * num_clusters + 2 * num_pairs) + 12
    samples = rng.permutation(num_samples)
    clustered = np.sort(samples[: 3 * num_clusters])
    duplicates = np.sort(samples[2 * num_clusters : 2 * num_clusters + 2 * num_pairs])
    targets, clusters = (rng.permutation(np.arange(len(of)) // by) for of, by in ((duplicates, 2), (clustered, 3)))
    table = SourceTable(num_samples, duplicates, targets, clustered=clustered, clusters=clusters)
    plan = build_plan({"a": table}, MixtureConfig(run_length=4), global_batch=12, seed=seed)
    target_of = dict(zip(duplicates.tolist(), targets.tolist(), strict=True))
    cluster_of = dict(zip(clustered.tolist(), clusters.tolist(), strict=True))
    for step in range(plan.num_steps):
        rows = [index for _, index in plan.batch(step).rows]
        for one, other in combinations(rows, 2):
            if one in target_of and target_of[one] == target_of.get(other):
                assert cluster_of.get(one, -1) == cluster_of.get(other, -2)


def test_clusters_that_fit_nowhere_are_divided_and_reported() -> None:
    table = SourceTable(12, clustered=np.arange(12), clusters=np.repeat([0, 1, 2], [5, 3, 4]))
    plan = build_plan({"a": table}, MixtureConfig(), global_batch=4)
    assert plan.summary()[1:] == ["a: 1 clusters are larger than a batch (4) and are divided"]
    batches = [{index for _, index in plan.batch(step).rows} for step in range(3)]
    assert set().union(*batches) == set(range(12))
    assert {8, 9, 10, 11} in batches
    assert {0, 1, 2, 3} in batches
    assert {4, 5, 6, 7} in batches


def test_clusters_and_drops_are_part_of_the_fingerprint() -> None:
    samples = np.array([3, 7])
    tables = [
        SourceTable(20),
        SourceTable(20, clustered=samples, clusters=np.zeros(2, np.int64)),
        SourceTable(20, dropped=samples),
        SourceTable(20, dropped=samples + 1),
    ]
    plans = [build_plan({"a": table}, MixtureConfig(), global_batch=4) for table in tables]
    assert len({plan.fingerprint() for plan in plans}) == 4
    # That of a version of this program that knew no drops: its runs resume.
    assert plans[0].describe()["sources"]["a"]["tables"] == "d2f816127db133e7"


def test_dropped_samples_are_not_used_and_reported() -> None:
    dropped = np.array([0, 1, 5, 99, 400, 999])
    table = SourceTable(1000, dropped=dropped)
    plan = build_plan({"a": table}, MixtureConfig(run_length=8), global_batch=71, epochs=2)
    assert {index for _, index in all_rows(plan)} == set(range(1000)) - set(dropped.tolist())
    assert plan.summary()[1] == "a: 6 of 1000 samples are dropped by candidate tables"
    few = build_plan({"a": table}, MixtureConfig(run_length=8, max_samples_per_source=64), global_batch=16, epochs=2)
    assert len({index for _, index in all_rows(few)} - set(dropped.tolist())) == 64
    assert {i for step in range(few.num_steps) for at in range(16) for _, i in few.reserves(step, at, 9)} <= {
        index for _, index in all_rows(few)
    }
    with pytest.raises(UserError, match=r"source 'a' has 994 samples of 1000 \(tables drop 6\), fewer than"):
        build_plan({"a": table}, MixtureConfig(), global_batch=1000)


def test_groups_are_one_source() -> None:
    same = SourceTable(30, np.arange(30), np.arange(30))
    mixture = MixtureConfig(groups={"classes": ["b", "a"]}, run_length=4)
    plan = build_plan({"a": same, "b": same, "c": SourceTable(20)}, mixture, global_batch=10)
    batches = [plan.batch(step) for step in range(plan.num_steps)]
    assert Counter(batch.blocks[0].source for batch in batches) == {"classes": 6, "c": 2}
    for batch in batches:
        if batch.blocks[0].source == "classes":  # samples of a and b with one index have one target
            assert {name for name, _ in batch.rows} == {"a", "b"}
            assert len({index for _, index in batch.rows}) == 10
    for weights in ({"classes": 1.0, "c": 1.0}, {"a": 0.5, "b": 0.5, "c": 1.0}):
        weighted = build_plan(
            {"a": same, "b": same, "c": SourceTable(20)},
            MixtureConfig(groups=mixture.groups, weights=weights),
            global_batch=10,
            steps=8,
        )
        assert Counter(weighted.batch(step).blocks[0].source for step in range(8)) == {"classes": 4, "c": 4}
    alone = MixtureConfig(groups=mixture.groups, weights={"a": 1.0})
    only_a = build_plan({"a": same, "b": same}, alone, global_batch=10)
    assert {name for name, _ in all_rows(only_a)} == {"a"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"groups": {"g": ["a", "x"]}}, r"data\.mixture\.groups: unknown source 'x'; the data has a, b"),
        ({"groups": {"b": ["a"]}}, r"data\.mixture\.groups: 'b' is a source already"),
        ({"groups": {"g": ["a"]}, "weights": {"a": 1.0, "g": 1.0}}, "names 'a' and its group"),
    ],
)
def test_groups_that_make_no_sense_are_reported(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        build_plan(tables({"a": 9, "b": 9}), MixtureConfig(**changes), global_batch=4)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(first=st.integers(1, 59), weights=st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)), seed=st.integers(0, 99))
def test_new_weights_hold_from_their_step_on(first: int, weights: tuple[float, float], seed: int) -> None:
    def plan_of(*phases: MixturePhase) -> Plan:
        some = MixtureConfig(weights={"a": 3.0, "b": 1.0}, run_length=3)
        plan = build_plan(tables({"a": 33, "b": 20}), some, global_batch=4, steps=60, seed=seed)
        return reduce(Plan.with_mixture_phase, phases, plan)

    before, after = plan_of(), plan_of(MixturePhase(first, dict(zip("ab", weights, strict=True))))
    assert [after.batch(step) for step in range(first)] == [before.batch(step) for step in range(first)]
    counts = Counter(after.batch(step).blocks[0].source for step in range(first, 60))
    assert abs(counts["a"] - (60 - first) * weights[0] / sum(weights)) < 1
    seen = Counter(
        (batch.blocks[0].source, batch.blocks[0].epoch, row)
        for batch in map(after.batch, range(60))
        for row in batch.rows
    )
    assert set(seen.values()) == {1}
    assert after.fingerprint() == before.fingerprint()  # phases are recorded next to the plan
    assert [after.until(first).batch(step) for step in range(first)] == [after.batch(step) for step in range(first)]
    assert after.until(first).num_steps == first


def test_phases_out_of_order_are_reported() -> None:
    plan = build_plan(tables({"a": 33}), MixtureConfig(), global_batch=4, steps=60).with_mixture_phase(
        MixturePhase(5, {"a": 1.0})
    )
    for step in (5, 3, 0, 60):
        with pytest.raises(UserError, match="phases: begin at steps"):
            plan.with_mixture_phase(MixturePhase(step, {"a": 1.0}))


def test_slow_sources_are_drawn_more() -> None:
    config = ResampleConfig(every_steps=10, strength=2.0, max_factor=3.0)
    mixture = MixtureConfig(weights={"fast": 1.0, "slow": 1.0, "stuck": 1.0, "unseen": 2.0})
    plan = build_plan(tables(dict.fromkeys(mixture.weights or {}, 40)), mixture, global_batch=4, steps=60)
    now = {"fast": 0.1, "slow": 1.4, "stuck": 4.0}
    rows = [
        {"step": step, "source": source, "loss": 2.0 if step < 10 else loss}
        for step, (source, loss) in enumerate(list(now.items()) * 10)
    ]
    phase = next_mixture_change(plan, rows, 20, config)
    assert phase is not None
    assert phase.first_step == 20
    assert phase.weights == pytest.approx({"fast": 1 / 3, "slow": 0.7**2, "stuck": 3.0, "unseen": 2.0})
    assert [next_mixture_change(plan, rows, step, config) for step in (0, 15, 60)] == [None] * 3
    assert next_mixture_change(plan.with_mixture_phase(phase), rows, 20, config) is None


def test_another_source_changes_no_order_within_a_source() -> None:
    def rows_of_a(sizes: dict[str, int]) -> list[object]:
        plan = build_plan(tables(sizes), MixtureConfig(run_length=3), global_batch=4, epochs=2)
        return [plan.batch(step).rows for step in range(plan.num_steps) if plan.batch(step).blocks[0].source == "a"]

    assert rows_of_a({"a": 30}) == rows_of_a({"0": 12, "a": 30, "z": 9})


def test_only_random_runs_of_a_large_source_are_used() -> None:
    mixture = MixtureConfig(max_samples_per_source=64, run_length=8)
    plan = build_plan(tables({"a": 1003}), mixture, global_batch=16, epochs=3)
    indices = sorted({index for _, index in all_rows(plan)})
    assert len(indices) == 64
    assert {len(run) for run in runs_in(indices, 1003)} <= {8, 16, 24}
    assert indices[0] < 300
    assert indices[-1] > 700
    other = build_plan(tables({"a": 1003}), mixture, global_batch=16, epochs=3, seed=1)
    assert indices != sorted({index for _, index in all_rows(other)})


def test_a_plan_describes_what_decides_it() -> None:
    table = SourceTable(20, np.array([3, 4]), np.array([1, 1]))
    plans = [build_plan({"a": some}, MixtureConfig(), global_batch=5) for some in (table, SourceTable(20))]
    first, second = (plan.describe()["sources"]["a"] for plan in plans)
    assert {key for key in first if first[key] != second[key]} == {"tables"}


@settings(max_examples=80, deadline=None)
@given(
    weights=st.tuples(*[st.floats(0.2, 5)] * 4),
    seed=st.integers(0, 99),
    first=st.integers(1, 39),
    world_size=st.sampled_from([1, 2, 4]),
)
def test_blocks_share_a_global_batch(weights: tuple[float, ...], seed: int, first: int, world_size: int) -> None:
    sizes = dict.fromkeys("abcd", 50)
    mixture = MixtureConfig(weights=dict(zip("abcd", weights, strict=True)), blocks={"b": 4, "c": 4, "d": 8})
    plan = build_plan(tables(sizes), mixture, global_batch=16, steps=40, seed=seed)
    plan.check_world_size(world_size)
    block_of = {"a": 16, "b": 4, "c": 4, "d": 8}
    seen: Counter[tuple[str, int, tuple[str, int]]] = Counter()
    steps_of: dict[str, float] = dict.fromkeys("abcd", 0.0)
    for step in range(40):
        batch = plan.batch(step)
        shares = [plan.batch(step, rank, world_size).blocks for rank in range(world_size)]
        for number, block in enumerate(batch.blocks):
            assert len(batch.blocks) * len(block.rows) == 16
            assert len(block.rows) == block_of[block.source]
            assert tuple(row for share in shares for row in share[number].rows) == block.rows
            seen.update((block.source, block.epoch, row) for row in block.rows)
            steps_of[block.source] += len(block.rows) / 16
    assert set(seen.values()) == {1}
    for name, weight in mixture.weights.items() if mixture.weights else ():
        assert abs(steps_of[name] - 40 * weight / sum(weights)) < (1 if name in "ad" else 1.25)
    changed = plan.with_mixture_phase(MixturePhase(first, {"b": 1.0, "c": 3.0}))
    assert [changed.batch(step) for step in range(first)] == [plan.batch(step) for step in range(first)]
    later = Counter(block.source for step in range(first, 40) for block in changed.batch(step).blocks)
    assert set(later) <= {"b", "c"}
    assert abs(later["c"] - 0.75 * later.total()) < 1


def test_a_source_without_blocks_keeps_its_order_next_to_others_with() -> None:
    def rows_of_a(**changes: object) -> list[tuple[Row, ...]]:
        mixture = MixtureConfig(run_length=3, **changes)  # type: ignore[arg-type]
        plan = build_plan(tables({"a": 40, "b": 40}), mixture, global_batch=8, steps=20)
        blocks = [block for step in range(20) for block in plan.batch(step).blocks]
        return [block.rows for block in blocks if block.source == "a"][:5]

    assert rows_of_a() == rows_of_a(blocks={"b": 4})


@pytest.mark.parametrize(
    ("blocks", "problem"),
    [
        ({"a": 3}, "3 samples of 'a' do not divide a global batch of 8; choose a divisor"),
        ({"a": 1}, "1 samples of 'a' do not divide"),
        ({"x": 4}, "unknown source 'x'; it may name a, b"),
    ],
)
def test_blocks_that_make_no_sense_are_reported(blocks: dict[str, int], problem: str) -> None:
    with pytest.raises(UserError, match=f"data.mixture.blocks: {problem}"):
        build_plan(tables({"a": 40, "b": 40}), MixtureConfig(blocks=blocks), global_batch=8)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.dictionaries(st.sampled_from("bc"), st.integers(100, 200), min_size=2),
    limit=st.sampled_from([90, 10_000]),
    count=st.integers(1, 4),
    seed=st.integers(0, 99),
    step=st.integers(0, 9),
)
def test_reserves_of_blocks_are_distinct_and_outside_the_batch(
    sizes: dict[str, int], limit: int, count: int, seed: int, step: int
) -> None:
    """A global batch of 16 in 4 blocks needs 16 * count reserves besides its own rows; the source has enough."""
    mixture = MixtureConfig(blocks=dict.fromkeys(sizes, 4), max_samples_per_source=limit, run_length=3)
    plan = build_plan(tables(sizes), mixture, global_batch=16, steps=10, seed=seed)
    used = {row for at in range(10) for row in plan.batch(at).rows}
    rows = plan.batch(step).rows
    assert len(set(rows)) == 16
    chosen = [plan.reserves(step, position, count) for position in range(16)]
    for row, reserves in zip(rows, chosen, strict=True):
        assert len(reserves) == count
        assert {member for member, _ in reserves} == {row[0]}
    everything = [reserve for reserves in chosen for reserve in reserves]
    assert len(set(everything)) == 16 * count
    assert not set(everything) & set(rows)
    assert all(0 <= index < sizes[member] for member, index in everything)
    if limit == 90:  # only samples of the chosen subset, which three epochs have shown whole
        longer = build_plan(tables(sizes), mixture, global_batch=16, steps=60, seed=seed)
        subset = {row for at in range(60) for row in longer.batch(at).rows}
        assert used <= subset
        assert set(everything) <= subset
