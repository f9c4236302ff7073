"""The schedule of a run: shares, epochs, runs of neighbours, purity, and what cannot be planned."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import MixtureConfig
from pipelines.errors import UserError
from pipelines.plan import SMALL, GlobalBatch, Plan, build_plan


def all_rows(plan: Plan) -> list[tuple[str, int]]:
    return [row for step in range(plan.num_steps) for row in plan.batch(step).rows]


def runs_in(indices: list[int], num_samples: int) -> list[list[int]]:
    """Cuts where the next index is not the neighbour of the last; the epoch's ring is closed."""
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
    plan = build_plan(sizes, MixtureConfig(run_length=run_length), global_batch=6, epochs=epochs, seed=seed)
    seen: Counter[tuple[str, int, int]] = Counter()
    epochs_of: dict[str, list[int]] = {}
    for step in range(plan.num_steps):
        batch = plan.batch(step)
        assert {source for source, _ in batch.rows} == {batch.source}
        assert len(batch.rows) == 6
        seen.update((batch.source, batch.epoch, index) for _, index in batch.rows)
        epochs_of.setdefault(batch.source, []).append(batch.epoch)
    assert set(seen.values()) <= {1}
    assert all(0 <= index < sizes[source] for source, _, index in seen)
    for source, numbers in epochs_of.items():
        assert numbers == [nth // (sizes[source] // 6) for nth in range(len(numbers))]


@settings(max_examples=60, deadline=None)
@given(weights=st.dictionaries(st.sampled_from("abcde"), st.floats(0.01, 9), min_size=1), steps=st.integers(1, 90))
def test_shares_are_exact_to_one_step(weights: dict[str, float], steps: int) -> None:
    sizes = dict.fromkeys("abcde", 20)
    plan = build_plan(sizes, MixtureConfig(weights=weights), global_batch=4, steps=steps)
    assert plan.num_steps == steps
    counts = Counter(plan.batch(step).source for step in range(steps))
    for source, weight in weights.items():
        assert abs(counts[source] - steps * weight / sum(weights.values())) < 1


def test_shares_hold_all_along_the_run() -> None:
    mixture = MixtureConfig(weights={"a": 3.0, "b": 1.0})
    plan = build_plan({"a": 40, "b": 40, "left out": 40}, mixture, global_batch=4, steps=80)
    for span in range(0, 80, 16):
        assert 11 <= sum(plan.batch(step).source == "a" for step in range(span, span + 16)) <= 13


def test_without_weights_one_epoch_visits_every_whole_batch_once() -> None:
    plan = build_plan({"a": 23, "b": 10}, MixtureConfig(run_length=4), global_batch=5)
    assert Counter(plan.batch(step).source for step in range(plan.num_steps)) == {"a": 4, "b": 2}
    assert Counter(source for source, _ in set(all_rows(plan))) == {"a": 20, "b": 10}
    assert build_plan({"a": 23, "b": 10}, MixtureConfig(), global_batch=5, epochs=2.5).num_steps == 15
    assert build_plan({"a": 23}, MixtureConfig(), global_batch=5, epochs=0.01).num_steps == 1


def test_each_epoch_has_an_order_of_its_own() -> None:
    plan = build_plan({"a": 12}, MixtureConfig(run_length=2), global_batch=12, epochs=3)
    orders = [plan.batch(step).rows for step in range(3)]
    assert len(set(orders)) == 3
    assert {tuple(sorted(order)) for order in orders} == {tuple(("a", n) for n in range(12))}


def test_only_so_many_samples_of_a_source_are_used() -> None:
    mixture = MixtureConfig(max_samples_per_source=9)
    plan = build_plan({"a": 1000, "b": 7}, mixture, global_batch=3, epochs=4)
    used = set(all_rows(plan))
    assert max(index for source, index in used if source == "a") == 8
    assert plan.summary()[0] == "a: 9 samples, batches of 3, 12 of 20 steps (4.00 epochs)"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_every_number_of_workers_sees_the_same_batch(world_size: int) -> None:
    plan = build_plan({"a": 50, "b": 31}, MixtureConfig(), global_batch=12, seed=3)
    plan.check_world_size(world_size)
    for step in range(plan.num_steps):
        batch = plan.batch(step)
        shares = [batch.of_rank(rank, world_size) for rank in range(world_size)]
        assert {len(share) for share in shares} == {12 // world_size}
        assert tuple(row for share in shares for row in share) == batch.rows


def test_ranks_hold_contiguous_shares() -> None:
    batch = GlobalBatch(0, "a", 0, tuple(("a", n) for n in (4, 5, 0, 1)))
    assert batch.of_rank(1, 2) == (("a", 0), ("a", 1))


def test_a_batch_depends_on_nothing_but_the_plan() -> None:
    def fresh() -> Plan:
        return build_plan({"a": 40, "b": 30}, MixtureConfig(), global_batch=5, seed=11)

    plan, backwards, copy = fresh(), fresh(), pickle.loads(pickle.dumps(fresh()))
    expected = [plan.batch(step) for step in range(plan.num_steps)]
    assert [backwards.batch(step) for step in reversed(range(plan.num_steps))] == expected[::-1]
    np.random.default_rng(0).random()
    assert [copy.batch(step) for step in range(plan.num_steps)] == expected
    shuffled = build_plan({"b": 30, "a": 40}, MixtureConfig(), global_batch=5, seed=11)
    assert [shuffled.batch(step) for step in range(plan.num_steps)] == expected


def test_a_known_plan_does_not_change() -> None:
    """Resuming compares plans of two versions of this program: these rows were written down once."""
    plan = build_plan({"a": 7, "b": 5}, MixtureConfig(run_length=3), global_batch=2, seed=1)
    assert [plan.batch(step).source for step in range(5)] == ["a", "b", "a", "b", "a"]
    assert plan.batch(0).rows + plan.batch(1).rows == (("a", 2), ("a", 3), ("b", 4), ("b", 0))


def test_steps_outside_the_plan_are_refused() -> None:
    plan = build_plan({"a": 10}, MixtureConfig(), global_batch=5)
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
def test_runs_of_neighbours_stay_together(run_length: int, num_samples: int, run_sizes: list[int]) -> None:
    plan = build_plan({"a": num_samples}, MixtureConfig(run_length=run_length), global_batch=num_samples, epochs=5)
    for step in range(5):
        indices = [index for _, index in plan.batch(step).rows]
        assert sorted(indices) == list(range(num_samples))
        # Runs that happen to meet their successor look like one: there are never more than were cut.
        assert len(runs_in(indices, num_samples)) <= len(run_sizes)
        if run_length > 1:
            assert max(len(run) for run in runs_in(indices, num_samples)) >= max(run_sizes)


def test_the_cuts_between_runs_shift_with_the_epoch() -> None:
    plan = build_plan({"a": 64}, MixtureConfig(run_length=8), global_batch=64, epochs=6)
    starts = {runs_in([i for _, i in plan.batch(step).rows], 64)[0][0] % 8 for step in range(6)}
    assert len(starts) > 1


def test_the_fingerprint_tells_plans_apart() -> None:
    mixture = MixtureConfig(weights={"a": 2.0, "b": 1.0})

    def fingerprint(sizes: dict[str, int] | None = None, **changes: object) -> str:
        settings: dict[str, object] = {"mixture": mixture, "global_batch": 4, "steps": 12, "seed": 0} | changes
        return build_plan(sizes or {"a": 20, "b": 30}, **settings).fingerprint()  # type: ignore[arg-type]

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
    plan = build_plan({"a": 20, "b": 3, "c": 4}, mixture, global_batch=8, epochs=3)
    batches = [plan.batch(step) for step in range(plan.num_steps)]
    small = [batch for batch in batches if batch.source == SMALL]
    assert {len(batch.rows) for batch in small} == {6}  # 7 samples: the largest even number
    assert {len(batch.rows) for batch in batches if batch.source == "a"} == {8}
    members = {("b", 0), ("b", 1), ("b", 2), ("c", 0), ("c", 1), ("c", 2), ("c", 3)}
    assert all(len(set(batch.rows)) == 6 and set(batch.rows) <= members for batch in small)
    assert {row for batch in small for row in batch.rows} == members
    assert [batch.epoch for batch in small] == list(range(len(small)))


def test_what_cannot_be_planned_is_told() -> None:
    with pytest.raises(UserError, match=r"data\.mixture\.weights: unknown source 'x'; the data has a, b"):
        build_plan({"b": 9, "a": 9}, MixtureConfig(weights={"a": 1.0, "x": 1.0}), global_batch=4)
    with pytest.raises(UserError, match=r"source 'b' has 3 samples, fewer than one global batch of 4; .*merge_small"):
        build_plan({"a": 9, "b": 3}, MixtureConfig(), global_batch=4)
    with pytest.raises(UserError, match="1 training samples are not enough"):
        build_plan({"a": 1}, MixtureConfig(merge_small=True), global_batch=4)
    with pytest.raises(UserError, match="0 training samples are not enough"):
        build_plan({}, MixtureConfig(), global_batch=4)
    plan = build_plan({"a": 9, "b": 6}, MixtureConfig(merge_small=True), global_batch=8)
    with pytest.raises(UserError, match="batches of source 'small' have 6 samples, which 4 workers cannot share"):
        plan.check_world_size(4)
    plan.check_world_size(2)
