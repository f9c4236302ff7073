"""Which samples share a target: found at publication, checked when read, complete where sources are merged."""

import hashlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.candidates.types import CandidateManifest, PlanRows, TableData
from pipelines.candidates.write import publish_table
from pipelines.config import DataConfig, MixtureConfig
from pipelines.errors import UserError
from pipelines.feed import reader as reader_module
from pipelines.feed.reader import Reader
from pipelines.plan.build import build_plan
from pipelines.samples import DecodedSample
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


def test_equal_queries_are_named_and_kept_apart(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    publish(store, {"cars": ("t", 24)}, duplicates={"cars": DUPLICATES}, equal_queries={"cars": [2, 9, 20]})
    reader = reader_of(store, run_length=8)
    table = reader.tables()["cars"]
    assert table.duplicates.tolist() == sorted({0, *DUPLICATES, 1, 2, 20})
    query_of = dict(zip(table.duplicates.tolist(), table.queries.tolist(), strict=True))
    assert len({query_of[number] for number in (1, 2, 9, 20)}) == 1
    assert len({query_of[number] for number in (0, 1, 3, 8)}) == 4
    plan = build_plan({"cars": table}, reader.data.mixture, global_batch=4, epochs=3)
    for step in range(plan.num_steps):
        samples = [sample for name, index in plan.batch(step).rows for sample, _ in reader.raw(name, [index])]
        assert len({sample.query_sha256 for sample in samples}) == 4
        assert len({sample.target_sha256 for sample in samples}) == 4
    assert reader.warnings(plan) == []
    merged = reader_of(store, merge_small=True).tables()["cars"]
    assert len(merged.queries) == 24
    assert np.array_equal(merged.queries[table.duplicates], table.queries)


def test_a_source_that_drops_make_small_is_read_as_one_that_is_merged(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_SMALL", 10)
    fingerprint = read_manifest(store, "train").sources["cars"].fingerprint
    data = TableData(str(store.root), "train", {"cars": fingerprint})
    rows = PlanRows.of(np.arange(24) >= 20, np.full(24, -1))
    publish_table(LocalStore(tmp_path / "drops"), CandidateManifest("curate", data), {"cars": rows})
    reader = reader_of(store, merge_small=True)
    assert len(reader.tables()["cars"].duplicates) == 5
    dropped = Reader(reader.data.model_copy(update={"curation": [str(tmp_path / "drops")]}))
    assert len(dropped.tables()["cars"].duplicates) == 24
    assert len(dropped.tables()["dogs"].duplicates) == 0


def as_format_2(store: LocalStore) -> None:
    """Takes the queries out of indices, duplicates and manifest, as datasets were written before."""
    manifest = read_manifest(store, "train")
    sources = {}
    for name, source in manifest.sources.items():
        shards = []
        for shard in source.shards:
            digest = without_column(store, shard.index_path, "query_sha256")
            shards.append(replace(shard, index_sha256=digest))
        assert source.duplicates_sha256 is not None
        path = duplicates_path("train", name, source.duplicates_sha256)
        older = f"train/{name}/duplicates.parquet"
        (store.root / path).rename(store.root / older)
        digest = without_column(store, older, "query")
        sources[name] = replace(source, shards=tuple(shards), duplicates_sha256=digest)
    publish_manifest(store, Manifest("train", sources, format_version=2))


def without_column(store: LocalStore, path: str, column: str) -> str:
    sink = io.BytesIO()
    pq.write_table(pq.read_table(store.root / path).drop_columns([column]), sink)
    store.write(path, sink.getvalue())
    return hashlib.sha256(sink.getvalue()).hexdigest()


def test_a_dataset_of_format_2_is_read_in_place(store: LocalStore) -> None:
    as_format_2(store)
    unused = [f"train/{name}/duplicates.parquet: not in the manifest" for name in ("cars", "dogs", "eels")]
    assert verify(store, "train") == unused
    for reader in (reader_of(store), reader_of(store, merge_small=True)):
        table = reader.tables()["cars"]
        assert len(table.duplicates) == 24
        assert len(table.queries) == 0
        plan = build_plan(reader.tables(), reader.data.mixture, global_batch=4)
        assert [text.split(": ")[0].split(" has ")[1] for text in reader.warnings(plan)] == [
            "format 2, without hashes of queries"
        ]
    with pytest.raises(UserError, match=r"data.mixture.positives: says which samples .* run the ingest or index job"):
        reader_of(store, positives="one").tables()
    (sample,) = reader.samples("cars", [3])  # the objective gets ids all the same
    assert isinstance(sample, DecodedSample)
    assert sample.sample.query_sha256 == hashlib.sha256(hashlib.sha256(b"cars 3").digest()).hexdigest()


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


def path_of(store: LocalStore, source: str) -> Path:
    """The file that names the duplicates of a source."""
    sha256 = read_manifest(store, "train").sources[source].duplicates_sha256
    assert sha256 is not None
    return store.root / duplicates_path("train", source, sha256)


def test_only_what_is_drawn_is_read(store: LocalStore) -> None:
    path_of(store, "dogs").unlink()
    tables = reader_of(store, weights={"cars": 1.0}).tables()
    assert {name: table.num_samples for name, table in tables.items()} == {"cars": 24, "dogs": 16, "eels": 16}
    with pytest.raises(
        UserError, match=r"dogs/duplicates-\w+\.parquet: is named in the manifest but missing; run the job again"
    ):
        reader_of(store, weights={"dogs": 1.0}).tables()


def test_a_file_that_is_not_the_manifests_is_reported(store: LocalStore) -> None:
    path = path_of(store, "cars")
    path.write_bytes(path_of(store, "dogs").read_bytes())
    with pytest.raises(UserError, match=r"cars/duplicates-\w+\.parquet: is not the file that the manifest names"):
        reader_of(store).tables()
    assert verify(store, "train") == [f"{path.relative_to(store.root)}: its bytes have changed"]


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
