"""Samples with a weight: how many of them an epoch takes, how often each, and what else a plan guarantees."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.candidates.table import open_table
from pipelines.candidates.types import CandidateManifest, PlanRows, TableData
from pipelines.candidates.write import publish_table
from pipelines.config import DataConfig, MixtureConfig
from pipelines.errors import UserError
from pipelines.feed.candidates import with_plan_rows
from pipelines.feed.reader import Reader
from pipelines.plan.build import build_plan
from pipelines.plan.plan import Plan
from pipelines.plan.types import SourceTable
from pipelines.plan.weights import draw, draw_alternatives, one_of_each_query
from pipelines.storage.location import open_store
from tests.data import publish

COUNT = 60


def weighted_table(**changes: np.ndarray) -> SourceTable:
    """Samples 0 to 39 have the weight 0.3: an epoch takes 12 of them, and all 20 others."""
    fields = {"weighted": np.arange(40), "weights": np.full(40, 0.3)}
    return SourceTable(COUNT, **{**fields, **changes})


def epochs(plan: Plan, num_batches: int, world_size: int = 1) -> list[list[int]]:
    """The samples of each epoch, in order."""
    found: list[list[int]] = [[] for _ in range(plan.num_steps // num_batches)]
    for step in range(len(found) * num_batches):
        for rank in range(world_size):
            found[step // num_batches] += [index for _, index in plan.batch(step, rank, world_size).rows]
    return found


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.floats(1e-4, 0.9999), min_size=1, max_size=50), seed=st.integers(0, 2**31))
def test_a_draw_takes_exactly_the_sum_of_the_weights_rounded_down(weights: list[float], seed: int) -> None:
    count = int(sum(weights))
    assert draw(np.array(weights), count, np.random.default_rng(seed)).sum() == count


def test_each_sample_is_taken_as_often_as_its_weight_says() -> None:
    weights = np.array([0.1] * 10 + [0.5] * 10 + [0.9] * 10)  # a sum of 15
    draws = np.stack([draw(weights, 15, np.random.default_rng(seed)) for seed in range(4000)])
    deviation = np.sqrt(weights * (1 - weights) / len(draws))
    assert (np.abs(draws.mean(axis=0) - weights) < 4.5 * deviation).all()
    assert not (np.abs(draws.mean(axis=0) - 0.5) < 4.5 * deviation).all()  # ten of thirty at random would show


def test_every_epoch_has_as_many_batches_and_other_samples() -> None:
    plan = build_plan({"a": weighted_table()}, MixtureConfig(run_length=4), global_batch=8, epochs=20, seed=3)
    assert (plan.sources[0].num_samples, plan.num_steps) == (32, 80)
    found = epochs(plan, 4)
    for samples in found:
        assert len(set(samples)) == 32
        assert set(range(40, 60)) < set(samples)
    assert len({tuple(sorted(samples)) for samples in found}) == 20
    assert "40 samples have a weight, and each epoch takes 12 of them" in " ".join(plan.summary())


def test_ranks_together_have_the_batches_of_one_process_in_any_order_of_asking() -> None:
    table = weighted_table(clustered=np.arange(30, 50), clusters=np.arange(20) // 4, dropped=np.array([59]))
    plan = build_plan({"a": table}, MixtureConfig(run_length=4), global_batch=8, epochs=6, seed=3)
    rows = [plan.batch(step).rows for step in range(plan.num_steps)]
    again = pickle.loads(pickle.dumps(plan))
    for step in reversed(range(plan.num_steps)):
        assert sum((again.batch(step, rank, 2).rows for rank in range(2)), ()) == rows[step]
        taken = {index for _, index in rows[step]}
        assert 59 not in taken
        reserves = {index for _, index in again.reserves(step, 1, 4)}
        epoch = {index for some in rows[step // 3 * 3 : step // 3 * 3 + 3] for _, index in some}
        assert not reserves & taken
        assert len(reserves - epoch) <= 7  # of 31 samples of an epoch, seven are in no batch


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.floats(1e-3, 1.0)), min_size=1, max_size=20), st.integers(0, 2**31))
def test_of_alternatives_one_at_most_is_taken_and_the_number_is_exact(
    groups: list[tuple[int, float]], seed: int
) -> None:
    sizes, totals = np.array([size for size, _ in groups]), np.array([total for _, total in groups])
    totals[::2] = 1.0
    weights = np.repeat(totals / sizes, sizes)
    numbers = np.where(sizes > 1, np.arange(len(sizes)), -1)
    count = int(totals.sum() + 1e-6)
    taken = draw_alternatives(weights, np.repeat(numbers, sizes), count, np.random.default_rng(seed))
    assert taken.sum() == count
    group = np.repeat(np.arange(len(sizes)), sizes)
    assert np.bincount(group[taken], minlength=len(sizes)).max() <= 1


def test_an_alternative_is_taken_as_often_as_its_weight_says() -> None:
    weights = np.array([0.1, 0.2, 0.3, 1 / 3, 1 / 3, 1 / 3, 0.4])  # groups of 0.6, 1 and 0.4
    groups = np.array([4, 4, 4, 7, 7, 7, -1])
    draws = np.stack([draw_alternatives(weights, groups, 2, np.random.default_rng(seed)) for seed in range(4000)])
    deviation = np.sqrt(weights * (1 - weights) / len(draws))
    assert (np.abs(draws.mean(axis=0) - weights) < 4.5 * deviation).all()
    assert (draws[:, 3:6].sum(axis=1) == 1).all()


QUERIES = np.array([0, 0, 0, 1, 1, 2, 3, 3])
"""Of samples 10 to 17. That of 15 has no other sample. 16 is dropped, so that 17 is alone, too."""


def several_positives(**changes: np.ndarray) -> SourceTable:
    table = SourceTable(
        20,
        np.arange(10, 18),
        np.arange(8),
        QUERIES,
        dropped=np.array([16]),
        **changes,  # type: ignore[arg-type]
    )
    return one_of_each_query(table)


def test_an_epoch_takes_one_positive_of_each_query() -> None:
    table = several_positives()
    assert table.weighted.tolist() == [10, 11, 12, 13, 14]
    assert table.weights == pytest.approx([1 / 3] * 3 + [0.5] * 2)
    assert table.num_kept == 16  # 19 less two of a query and one of another
    plan = build_plan({"a": table}, MixtureConfig(run_length=2), global_batch=4, steps=240, seed=1)
    assert "5 of these share their query, and each epoch takes one of a query" in " ".join(plan.summary())
    seen = epochs(plan, 4)
    for samples in seen:
        assert len(set(samples)) == 16
        assert len({10, 11, 12} & set(samples)) == len({13, 14} & set(samples)) == 1
        assert {*range(10), 15, 17, 18, 19} < set(samples)
    for number, share in zip(range(10, 15), (1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2), strict=True):
        count = sum(number in samples for samples in seen)
        assert abs(count - 60 * share) < 4 * np.sqrt(60 * share * (1 - share))
    pickled = pickle.loads(pickle.dumps(plan))
    halves = [plan.batch(101, rank, 2).rows for rank in range(2)]
    assert halves[0] + halves[1] == pickled.batch(101).rows


def test_positives_of_one_query_may_have_weights_and_drops() -> None:
    table = several_positives(weighted=np.array([0, 11, 13, 14]), weights=np.array([0.5, 0.5, 0.4, 0.2]))
    assert table.weighted.tolist() == [0, 10, 11, 12, 13, 14]
    assert table.weights == pytest.approx([0.5, 1 / 3, 1 / 6, 1 / 3, 0.2, 0.1])
    assert table.alternatives.tolist() == [-1, 0, 0, 0, 1, 1]
    assert table.num_drawn == 1  # of 1.63
    assert (
        len(
            {
                build_plan({"a": some}, MixtureConfig(), global_batch=4).fingerprint()
                for some in (table, several_positives(), replace(table, alternatives=np.full(6, -1)), SourceTable(20))
            }
        )
        == 4
    )
    none = one_of_each_query(SourceTable(20, np.array([3, 4]), np.array([7, 7]), np.array([1, 2])))
    assert (len(none.weighted), len(none.alternatives), none.num_kept) == (0, 0, 20)


def test_a_mixture_asks_for_one_positive(tmp_path: Path) -> None:
    publish(open_store(str(tmp_path)), {"red": ("text_image", 24)}, equal_queries={"red": [1, 6, 20]})
    mixture = MixtureConfig(positives="one", run_length=2)
    reader = Reader(DataConfig(root=str(tmp_path), mixture=mixture))
    plan = build_plan(reader.tables(), mixture, global_batch=11, epochs=6)
    assert plan.sources[0].num_samples == 22
    taken = [set(samples) & {1, 6, 20} for samples in epochs(plan, 2)]
    assert [len(some) for some in taken] == [1] * 6
    assert len({*map(frozenset, taken)}) > 1


def test_weights_are_part_of_the_fingerprint() -> None:
    def fingerprint(table: SourceTable) -> str:
        return build_plan({"a": table}, MixtureConfig(), global_batch=8, seed=3).fingerprint()

    same, other = weighted_table(), weighted_table(weights=np.full(40, 0.31))
    assert fingerprint(same) == fingerprint(weighted_table())
    assert len({fingerprint(some) for some in (same, other, SourceTable(COUNT))}) == 3


def test_weights_of_several_tables_are_multiplied_and_drops_have_none(tmp_path: Path) -> None:
    manifest = publish(open_store(str(tmp_path / "data")), {"red": ("text_image", 8)})
    data = TableData(str(tmp_path / "data"), "train", {"red": manifest.sources["red"].fingerprint})
    all_weights = [[0.5, 0.5, 1, 1, 0.25, 1, 1, 1], [0.5, 1, 1, 1, 0.5, 0.75, 1, 1]]
    names = []
    for weights, dropped in zip(all_weights, (4, 7), strict=True):
        keep = np.arange(8) != dropped
        rows = PlanRows.of(keep, np.full(8, -1), weight=np.array(weights, np.float32))
        names.append(str(tmp_path / f"drops {dropped}"))
        publish_table(open_store(names[-1]), CandidateManifest("curate", data), {"red": rows})
    read = open_table(names[0]).plan_rows("red")
    assert (read.sample.tolist(), read.weight.tolist()) == ([0, 1, 4], [0.5, 0.5, 0.25])
    table = with_plan_rows(SourceTable(8), "red", None, [open_table(name) for name in names])
    assert table.dropped.tolist() == [4, 7]
    assert (table.weighted.tolist(), table.weights.tolist()) == ([0, 1, 5], [0.25, 0.5, 0.75])
    assert table.num_kept == 4  # of three with a sum of 1.5, one, and three without a weight
    reader = Reader(DataConfig(root=str(tmp_path / "data"), curation=names))
    assert reader.tables()["red"].weighted.tolist() == [0, 1, 5]
    with pytest.raises(UserError, match="fewer than one batch"):
        build_plan(reader.tables(), MixtureConfig(), global_batch=8)
