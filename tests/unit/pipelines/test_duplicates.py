"""Which samples share a target: found at publication, checked when read, complete where sources are merged."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.config import DataConfig, MixtureConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.plan.build import build_plan
from pipelines.shards.duplicates import source_table
from pipelines.shards.manifest import Manifest, duplicates_path, publish_manifest, read_manifest
from pipelines.shards.verify import verify
from pipelines.storage.store import LocalStore
from tests.data import publish

DUPLICATES = [3, 8, 9, 21]  # of sample 0, in three shards


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path)
    publish(store, {"cars": ("t", 24), "dogs": ("t", 16), "eels": ("u", 16)}, duplicates={"cars": DUPLICATES})
    return store


def reader_of(store: LocalStore, **mixture: object) -> Reader:
    return Reader(DataConfig(root=str(store.root), mixture=MixtureConfig(**mixture)))  # type: ignore[arg-type]


def test_duplicates_are_named_next_to_the_shards(store: LocalStore) -> None:
    tables = reader_of(store).tables()
    assert tables["cars"].duplicates.tolist() == [0, *DUPLICATES]
    assert len(set(tables["cars"].targets.tolist())) == 1
    assert [len(tables[name].duplicates) for name in ("dogs", "eels")] == [0, 0]
    assert verify(store, "train") == []


def test_the_ids_are_those_of_the_objective(store: LocalStore) -> None:
    sample, _ = next(iter(reader_of(store).raw("cars", [0])))
    (target,) = set(reader_of(store).tables()["cars"].targets.tolist())
    assert target == int(sample.target_sha256[:16], 16)


def test_no_batch_holds_two_duplicates(store: LocalStore) -> None:
    reader = reader_of(store, run_length=8)
    plan = build_plan(reader.tables(), reader.data.mixture, global_batch=4, epochs=3)
    for step in range(plan.num_steps):
        targets = [
            sample.target_sha256 for name, index in plan.batch(step).rows for sample, _ in reader.raw(name, [index])
        ]
        assert len(set(targets)) == 4


def test_merged_sources_give_all_their_targets(store: LocalStore) -> None:
    tables = reader_of(store, groups={"animals": ["dogs", "eels"]}).tables()
    assert tables["dogs"].duplicates.tolist() == list(range(16))
    assert np.array_equal(tables["dogs"].targets, tables["eels"].targets)  # equal pictures, under two names
    assert tables["cars"].duplicates.tolist() == [0, *DUPLICATES]
    small = reader_of(store, merge_small=True).tables()
    assert [len(table.duplicates) for table in small.values()] == [24, 16, 16]


def test_only_what_is_drawn_is_read(store: LocalStore) -> None:
    (store.root / duplicates_path("train", "dogs")).unlink()
    tables = reader_of(store, weights={"cars": 1.0}).tables()
    assert {name: table.num_samples for name, table in tables.items()} == {"cars": 24, "dogs": 16, "eels": 16}
    with pytest.raises(
        UserError, match=r"dogs/duplicates\.parquet: is named in the manifest but missing; run the job again"
    ):
        reader_of(store, weights={"dogs": 1.0}).tables()


def test_a_file_that_is_not_the_manifests_is_reported(store: LocalStore) -> None:
    path = duplicates_path("train", "cars")
    store.write(path, store.read(duplicates_path("train", "dogs")))
    with pytest.raises(UserError, match=r"cars/duplicates\.parquet: is not the file that the manifest names"):
        reader_of(store).tables()
    assert verify(store, "train") == [f"{path}: its bytes have changed"]


def test_without_the_file_the_indices_are_read(store: LocalStore) -> None:
    manifest = read_manifest(store, "train")
    older = {name: replace(source, duplicates_sha256=None) for name, source in manifest.sources.items()}
    publish_manifest(store, Manifest("train", older))
    table = source_table(store, "train", "cars", older["cars"], merged=False)
    assert len(table.duplicates) == 24
    plans = [build_plan(reader_of(store).tables(), MixtureConfig(), global_batch=4) for _ in range(2)]
    assert plans[0].fingerprint() == plans[1].fingerprint()


def test_fingerprints_are_of_what_the_plan_draws_from(store: LocalStore) -> None:
    reader = reader_of(store, weights={"cars": 1.0})
    plan = build_plan(reader.tables(), reader.data.mixture, global_batch=4)
    before = reader.fingerprints(plan)
    assert list(before) == ["cars"]
    publish(store, {"cars": ("t", 24), "dogs": ("t", 15)}, duplicates={"cars": DUPLICATES})
    assert reader_of(store).fingerprints(plan) == before
    publish(store, {"cars": ("t", 24)})
    assert reader_of(store).fingerprints(plan) != before
