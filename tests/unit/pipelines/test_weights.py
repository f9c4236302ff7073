"""Samples with a weight: how many of them an epoch takes, how often each, and what else a plan guarantees."""

from __future__ import annotations

import pickle
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
from pipelines.plan.weights import draw
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
