"""From plan rows to batches: order, ranged reads, reserves for planted damage, and what stops a run."""

import copy
import itertools
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.config import DataConfig, MixtureConfig
from pipelines.errors import BadMedia, UserError
from pipelines.feed.batch import FeedBatch, FeedBlock
from pipelines.feed.reader import MAX_RESERVES, Reader
from pipelines.plan.build import build_plan
from pipelines.plan.plan import Plan
from pipelines.plan.types import SourceTable
from pipelines.samples import DecodedSample, Input, Rejected
from pipelines.shards.duplicates import with_duplicates
from pipelines.shards.index import content_sha256, read_shard_index
from pipelines.shards.manifest import Manifest, SourceInfo, publish_manifest
from pipelines.storage.location import open_store
from pipelines.storage.publish import MARK
from pipelines.storage.store import LocalStore
from tests.data import SAMPLES_PER_SHARD, ColourEncoder, make_sample, publish, store_shard

CARS = {"cars": ("t2i", 20)}


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of all ranged reads, as they happen."""
    paths: list[str] = []
    read_range = LocalStore.read_range

    def counting(store: LocalStore, path: str, offset: int, length: int) -> bytes:
        paths.append(path)
        return read_range(store, path, offset, length)

    monkeypatch.setattr(LocalStore, "read_range", counting)
    return paths


def make_reader(
    root: Path,
    sources: dict[str, tuple[str, int]] = CARS,
    bad: dict[str, Collection[int]] | None = None,
    encoder: ColourEncoder | None = None,
) -> Reader:
    publish(open_store(str(root)), sources, bad)
    return Reader(DataConfig(root=str(root)), encoder)


def plan_for(reader: Reader, global_batch: int, **changes: object) -> Plan:
    return build_plan(reader.tables(), MixtureConfig(run_length=4, **changes), global_batch=global_batch)  # type: ignore[arg-type]


def spoil_header(root: Path, number: int) -> None:
    """Makes sample `number` of cars unreadable, and with it every range that it lies in."""
    store = open_store(str(root))
    shard = publish(store, CARS).sources["cars"].shards[number // SAMPLES_PER_SHARD]
    offset, _ = read_shard_index(store, shard).span(number % SAMPLES_PER_SHARD, number % SAMPLES_PER_SHARD)
    data = bytearray(store.read(shard.path))
    data[offset + 20] ^= 0xFF
    store.write(shard.path, bytes(data))


def numbers(items: list[DecodedSample | Rejected]) -> list[int | str]:
    return [item.reason if isinstance(item, Rejected) else int(item.sample.key) for item in items]


def test_a_batch_holds_the_rows_of_the_plan_in_order(tmp_path: Path) -> None:
    reader = make_reader(tmp_path, {"cars": ("t2i", 20), "dogs": ("i2i", 11)}, encoder=ColourEncoder())
    plan = plan_for(reader, 6)
    assert {plan.batch(step).blocks[0].source for step in range(plan.num_steps)} == {"cars", "dogs"}
    for step in range(plan.num_steps):
        whole = plan.batch(step)
        for rank in range(3):
            fed = reader.batch(plan, step, rank, 3)
            wanted = [index for _, index in plan.batch(step, rank, 3).rows]
            assert fed.batch.tolist() == [[number, number] for number in wanted]
            (block,) = whole.blocks
            fed_block = FeedBlock(block.source, {"cars": "t2i", "dogs": "i2i"}[block.source], 0, 2)
            assert (fed.step, fed.rank, fed.blocks) == (step, rank, (fed_block,))
            assert (fed.num_samples, fed.rejected) == (2, ())


def test_without_an_encoder_a_batch_is_a_list_of_decoded_samples(tmp_path: Path) -> None:
    reader = make_reader(tmp_path)
    plan = plan_for(reader, 4)
    decoded = reader.batch(plan, 0, 0, 1).batch
    assert [("cars", int(item.sample.key)) for item in decoded] == list(plan.batch(0).rows)
    assert decoded[0].positive.visuals[0].frames.shape == (1, 8, 12, 3)


def test_instructions_are_read_or_left_out(tmp_path: Path) -> None:
    with_instructions = make_reader(tmp_path)
    silent = Reader(DataConfig(root=str(tmp_path), instructions=False))
    for reader, instruction in ((with_instructions, "Find the colour."), (silent, "")):
        (item,) = reader.samples("cars", [3])
        assert isinstance(item, DecodedSample)
        assert item.query.instruction == instruction


def test_training_draws_a_wording_of_the_instruction_in_each_epoch(tmp_path: Path) -> None:
    wordings = ("Find the colour.", "Which colour?", "Look for it.")
    store = open_store(str(tmp_path))
    samples = []
    for number in range(16):
        sample, members = make_sample("cars", "t2i", number, False, number)
        samples.append((replace(sample, instruction_variants=wordings[1:]), members))
    shards = tuple(store_shard(store, "train", "cars", n, samples[8 * n : 8 * n + 8]) for n in range(2))
    publish_manifest(store, with_duplicates(store, Manifest("train", {"cars": SourceInfo("t2i", 16, shards)})))
    reader = Reader(DataConfig(root=str(tmp_path), mixture=MixtureConfig(run_length=2)))

    def drawn(seed: int, world_size: int = 1) -> list[dict[str, str]]:
        """Key -> wording, for each epoch."""
        some = build_plan(reader.tables(), reader.data.mixture, global_batch=16, epochs=30, seed=seed)
        batches = [
            [item for rank in range(world_size) for item in reader.batch(some, step, rank, world_size).batch]
            for step in range(some.num_steps)
        ]
        assert all(item.instruction == wordings[0] for batch in batches for item in batch)
        return [{item.sample.key: item.query.instruction for item in batch} for batch in batches]

    found = drawn(4)
    assert drawn(4, world_size=4) == found != drawn(5)
    counts = Counter(wording for epoch in found for wording in epoch.values())
    assert set(counts) == set(wordings)
    num_rows = 30 * 16
    assert all(abs(count - num_rows / 3) < 4 * np.sqrt(num_rows * 2 / 9) for count in counts.values())
    of_one = [epoch["00000005"] for epoch in found]
    assert len(set(of_one)) == 3
    assert {len(set(epoch.values())) for epoch in found[:5]} == {3}

    (item,) = reader.samples("cars", [5])
    assert isinstance(item, DecodedSample)
    assert item.query.instruction == item.instruction == wordings[0]  # evaluation, mining and embedding take the first
    silent = Reader(reader.data.model_copy(update={"instructions": False}))
    assert {one.query.instruction for one in silent.batch(plan_for(silent, 16), 0, 0, 1).batch} == {""}


@pytest.mark.parametrize(("most", "texts"), [(0, []), (1, ["not cars"]), (5, ["not cars", "nor this"])])
def test_as_many_mined_negatives_as_wanted_are_read(most: int, texts: list[str], tmp_path: Path) -> None:
    publish(open_store(str(tmp_path)), CARS)
    reader = Reader(DataConfig(root=str(tmp_path), negatives_per_sample=most))
    for sample in reader.batch(plan_for(reader, 4), 0, 0, 1).batch:
        assert [part.text.rstrip(" 0123456789") for part in sample.negatives] == texts
        assert len(sample.sample.negatives) == len(texts)


def test_sizes_tasks_and_fingerprint_are_those_of_the_manifest(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    manifest = publish(store, {"cars": ("t2i", 20), "dogs": ("i2i", 11), "eels": ("t2i", 9)})
    reader = Reader(DataConfig(root=str(tmp_path)))
    assert reader.sizes() == {"cars": 20, "dogs": 11, "eels": 9}
    assert reader.task_of("dogs") == "i2i"
    assert reader.tasks(plan_for(reader, 4)) == ("i2i", "t2i")
    assert reader.fingerprint == manifest.fingerprint


@pytest.mark.parametrize(("task", "merged"), [("t2i", "t2i"), ("i2i", "small")])
def test_merged_sources_share_a_task_or_become_one(task: str, merged: str, tmp_path: Path) -> None:
    reader = make_reader(tmp_path, {"cars": ("t2i", 9), "dogs": ("t2i", 3), "eels": (task, 3)}, encoder=ColourEncoder())
    plan = plan_for(reader, 8, merge_small=True)
    small = next(step for step in range(plan.num_steps) if plan.batch(step).blocks[0].source == "small")
    fed = reader.batch(plan, small, 0, 1)
    assert [(block.source, block.task, block.num_samples) for block in fed.blocks] == [("small", merged, 6)]
    assert fed.batch[:, 0].tolist() == [index for _, index in plan.batch(small).rows]
    assert reader.tasks(plan) == tuple(sorted({"t2i", merged}))


def test_neighbors_in_a_shard_are_read_at_once(tmp_path: Path, ranges: list[str]) -> None:
    reader = make_reader(tmp_path)
    assert numbers([*reader.samples("cars", [3, 4, 5, 9, 10, 2, 3])]) == [3, 4, 5, 9, 10, 2, 3]
    first, second = (f"train/cars/cars-{n:06d}.tar" for n in (0, 1))
    assert ranges == [first, second, first]
    ranges.clear()
    assert numbers([*reader.samples("cars", range(6, 10))]) == [6, 7, 8, 9]  # the first shard ends at 7
    assert ranges == [first, second]
    ranges.clear()
    assert numbers([*reader.samples("cars", [5, 5, 4])]) == [5, 5, 4]
    assert len(ranges) == 3


def test_a_run_of_the_plan_is_one_request(tmp_path: Path, ranges: list[str]) -> None:
    reader = make_reader(tmp_path)
    plan = build_plan(reader.tables(), MixtureConfig(run_length=4), global_batch=20)
    reader.batch(plan, 0, 0, 1)
    indices = [index for _, index in plan.batch(0).rows]
    cuts = [last for last, following in itertools.pairwise(indices) if following != last + 1 or last in (7, 15)]
    assert len(ranges) == 1 + len(cuts)
    assert len(cuts) <= 4 + 3  # between five runs; the wrap from 19 to 0 and two borders of shards within runs


def test_long_stretches_are_read_in_parts(tmp_path: Path, ranges: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reader = make_reader(tmp_path)
    store = open_store(str(tmp_path))
    _, length = read_shard_index(store, publish(store, CARS).sources["cars"].shards[0]).span(0, 0)
    monkeypatch.setattr("pipelines.feed.rows._RANGE_BYTES", 3 * length)
    assert numbers([*reader.samples("cars", range(8))]) == list(range(8))
    assert len(ranges) == 3


def test_samples_reports_the_bad_ones_in_their_place(tmp_path: Path) -> None:
    reader = make_reader(tmp_path, bad={"cars": {4, 9}})
    items = [*reader.samples("cars", range(3, 11))]
    assert numbers(items) == [3, "unsupported_format", 5, 6, 7, 8, "unsupported_format", 10]
    assert items[1] == Rejected(
        f"{tmp_path}/train/cars/cars-000000.tar key 00000004", "unsupported_format", "begins with b'no image'"
    )


def test_damaged_bytes_cost_one_sample_and_not_its_neighbors(tmp_path: Path, ranges: list[str]) -> None:
    spoil_header(tmp_path, 5)
    reader = Reader(DataConfig(root=str(tmp_path)))
    items = [*reader.samples("cars", range(3, 8))]
    assert numbers(items) == [3, 4, "damaged_shard", 6, 7]
    assert isinstance(items[2], Rejected)
    assert items[2].origin == f"{tmp_path}/train/cars/cars-000000.tar key 00000005"
    assert len(ranges) == 1


def test_raw_gives_files_as_they_were_stored(tmp_path: Path) -> None:
    reader = make_reader(tmp_path, bad={"cars": {2}})
    assert [*reader.raw("cars", [2, 1])] == [make_sample("cars", "t2i", 2, True), make_sample("cars", "t2i", 1, False)]
    spoil_header(tmp_path, 5)
    with pytest.raises(BadMedia, match=r"damaged_shard: train/cars/cars-000000\.tar at byte"):
        list(Reader(DataConfig(root=str(tmp_path))).raw("cars", [4, 5]))


def all_batches(reader: Reader, plan: Plan, world_size: int) -> list[FeedBatch]:
    return [reader.batch(plan, step, rank, world_size) for step in range(plan.num_steps) for rank in range(world_size)]


def test_a_bad_sample_is_replaced_by_a_reserve_of_its_source(tmp_path: Path) -> None:
    sources = {"cars": ("t2i", 20), "dogs": ("i2i", 11)}
    reader = make_reader(tmp_path, sources, {"cars": {4}}, ColourEncoder())
    plan = plan_for(reader, 10)
    step = next(step for step in range(plan.num_steps) if ("cars", 4) in plan.batch(step).rows)
    whole = plan.batch(step)
    fed = reader.batch(plan, step, 0, 1)
    got = fed.batch[:, 0].tolist()
    wanted = [index for _, index in whole.rows]
    position = wanted.index(4)
    assert (fed.num_samples, [item.reason for item in fed.rejected]) == (10, ["unsupported_format"])
    assert fed.rejected[0].origin.endswith("cars-000000.tar key 00000004")
    assert got[:position] + got[position + 1 :] == wanted[:position] + wanted[position + 1 :]
    assert got[position] not in wanted
    assert got[position] == plan.reserves(step, position, 1)[0][1]


def test_every_number_of_workers_gets_the_same_reserves(tmp_path: Path) -> None:
    reader = make_reader(tmp_path, bad={"cars": range(0, 20, 5)}, encoder=ColourEncoder())
    plan = plan_for(reader, 4)
    alone, together = all_batches(reader, plan, 1), all_batches(reader, plan, 4)
    assert np.array_equal(np.concatenate([f.batch for f in alone]), np.concatenate([f.batch for f in together]))
    assert sum(len(f.rejected) for f in alone) == sum(len(f.rejected) for f in together) >= 4
    assert not {0, 5, 10, 15} & set(np.concatenate([f.batch for f in alone])[:, 0].tolist())


def test_reserves_are_distinct_and_outside_the_batch() -> None:
    tables = {"a": SourceTable(260), "b": SourceTable(30)}
    plan = build_plan(tables, MixtureConfig(weights={"a": 1.0}), global_batch=12, epochs=1, seed=4)
    batch = plan.batch(0)
    chosen = [plan.reserves(0, position, MAX_RESERVES) for position in range(12)]
    assert {len(set(some)) for some in chosen} == {MAX_RESERVES}
    assert len({row for some in chosen for row in some}) == 12 * MAX_RESERVES
    assert not {row for some in chosen for row in some} & set(batch.rows)
    assert {source for some in chosen for source, _ in some} == {"a"}
    assert plan.reserves(0, 3, MAX_RESERVES) == chosen[3] != plan.reserves(1, 3, MAX_RESERVES)
    capped = build_plan(tables, MixtureConfig(max_samples_per_source=14, run_length=2), global_batch=12, epochs=3)
    used = {index for step in range(capped.num_steps) for name, index in capped.batch(step).rows if name == "a"}
    first = next(step for step in range(capped.num_steps) if capped.batch(step).blocks[0].source == "a")
    assert {*capped.reserves(first, 0, MAX_RESERVES), *capped.batch(first).rows} == {("a", index) for index in used}


def test_bad_reserves_are_passed_over_and_counted(tmp_path: Path) -> None:
    reader = make_reader(tmp_path, encoder=ColourEncoder())
    plan = plan_for(reader, 10)
    whole = plan.batch(0)
    ranked = [index for _, index in plan.reserves(0, 7, 4)]
    bad = [whole.rows[7][1], *ranked[:3]]
    refusing = Reader(reader.data, ColourEncoder(refused=bad))
    fed = refusing.batch(plan, 0, 0, 1)
    assert fed.batch[7, 0] == ranked[3]
    assert [(item.reason, item.detail) for item in fed.rejected] == [("refused", str(number)) for number in bad]


def test_a_source_without_a_good_reserve_stops_the_run(tmp_path: Path) -> None:
    reader = make_reader(tmp_path, bad={"cars": range(20)}, encoder=ColourEncoder())
    plan = plan_for(reader, 10)
    with pytest.raises(
        UserError, match=r"in step 1; the last failure is unsupported_format of .*key 000000\d\d"
    ) as error:
        reader.batch(plan, 1, 0, 2)
    assert error.value.place == f"{tmp_path}/train/cars"


def test_a_batch_of_the_whole_source_has_no_reserves(tmp_path: Path) -> None:
    reader = make_reader(tmp_path, bad={"cars": {4}}, encoder=ColourEncoder())
    with pytest.raises(UserError, match=r"train/cars: has no sample left .* unsupported_format of .*key 00000004"):
        reader.batch(plan_for(reader, 20), 0, 0, 1)


def test_indices_are_read_when_needed_and_kept_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read = LocalStore.read

    def counting(store: LocalStore, path: str) -> bytes:
        reads.append(path)
        return read(store, path)

    reader = make_reader(tmp_path)  # shards of 8, 8 and 4
    monkeypatch.setattr(LocalStore, "read", counting)
    plan_for(reader, 4)
    assert reads[:2] == [MARK, "train/manifest.json"]
    assert [path.partition("-")[0] for path in reads[2:]] == ["train/cars/duplicates"]
    one_index = 8 * (8 + 8 + 8 + 4 + 4)
    monkeypatch.setattr("pipelines.feed.rows._INDEX_BYTES", 2 * one_index)
    for position, expected in ((0, [0]), (7, []), (8, [1]), (1, []), (19, [2]), (0, []), (9, [1])):
        reads.clear()
        assert numbers([*reader.samples("cars", [position])]) == [position]
        assert reads == [f"train/cars/cars-{shard:06d}.idx.parquet" for shard in expected], position
        assert reader._rows.indices.num_bytes <= 2 * one_index
    for outside in (-1, 20):
        with pytest.raises(IndexError, match=r"outside 0\.\.19"):
            list(reader.samples("cars", [outside]))


def test_missing_data_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train/manifest\.json: there is no such manifest"):
        Reader(DataConfig(root=str(tmp_path))).sizes()
    reader = make_reader(tmp_path)
    with pytest.raises(UserError, match="has no source 'dogs'; its sources: cars"):
        list(reader.samples("dogs", [0]))
    (tmp_path / "train/cars/cars-000001.tar").unlink()
    with pytest.raises(UserError, match=r"cars-000001\.tar: is named in the manifest but missing"):
        list(reader.samples("cars", range(20)))


def test_a_reader_pickles_as_its_arguments(tmp_path: Path) -> None:
    reader = make_reader(tmp_path, encoder=ColourEncoder(refused=[3]))
    fresh = len(pickle.dumps(reader))
    plan = plan_for(reader, 5)
    expected = reader.batch(plan, 0, 0, 1)
    assert len(pickle.dumps(reader)) == fresh
    for twin in (pickle.loads(pickle.dumps(reader)), copy.deepcopy(reader)):
        assert np.array_equal(twin.batch(plan, 0, 0, 1).batch, expected.batch)
        assert twin.encoder.refused == [3]


def test_the_endpoint_of_the_driver_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    packed = pickle.dumps(Reader(DataConfig(root="s3://bucket/data")))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9"):
        pickle.loads(packed).sizes()


def test_blocks_of_a_batch_follow_each_other_on_every_rank(tmp_path: Path) -> None:
    sources = {"cars": ("t2i", 40), "dogs": ("i2i", 40)}
    reader = make_reader(tmp_path, sources, {"dogs": range(0, 40, 3)}, ColourEncoder())
    plan = plan_for(reader, 8, blocks={"cars": 4, "dogs": 4})
    mixed = next(s for s in range(plan.num_steps) if {b.source for b in plan.batch(s).blocks} == {"cars", "dogs"})
    alone = reader.batch(plan, mixed, 0, 1)
    ranks = [reader.batch(plan, mixed, rank, 2) for rank in range(2)]
    assert [(block.source, block.num_samples) for block in ranks[0].blocks] == [
        (block.source, 2) for block in plan.batch(mixed).blocks
    ]
    joined = np.concatenate([ranks[0].batch[:2], ranks[1].batch[:2], ranks[0].batch[2:], ranks[1].batch[2:]])
    assert np.array_equal(joined, alone.batch)  # the same reserves too
    assert sum(len(fed.rejected) for fed in ranks) == len(alone.rejected) > 0
    assert ranks[0].source in ("cars+dogs", "dogs+cars")


def test_contents_are_told_where_their_bytes_are_read(tmp_path: Path) -> None:
    publish(open_store(str(tmp_path)), CARS)
    samples = list(Reader(DataConfig(root=str(tmp_path), negatives_per_sample=2)).samples("cars", [3, 4]))
    assert all(isinstance(sample, DecodedSample) for sample in samples)
    contents = [sample.negative_sha256 for sample in samples if isinstance(sample, DecodedSample)]
    assert contents[0][0] == content_sha256(Input("not cars 3"), {})
    assert contents[0][1] == contents[1][1] == content_sha256(Input("nor this"), {})


@pytest.mark.skipif(sys.platform != "linux", reason="the threads of processes are read from /proc")
def test_reading_a_dataset_leaves_no_thread_that_runs_python(tmp_path: Path) -> None:
    """A thread of Arrow that runs Python code while the process ends can abort it."""
    publish(open_store(str(tmp_path)), CARS)
    code = """
import os, sys
from pathlib import Path
from pipelines.config import DataConfig
from pipelines.feed.reader import Reader
reader = Reader(DataConfig(root=sys.argv[1]))
reader.tables()
assert len(list(reader.raw("cars", range(20)))) == 20
names = [Path("/proc/self/task", thread, "comm").read_text().strip() for thread in os.listdir("/proc/self/task")]
print(sorted(name for name in names if name != "jemalloc_bg_thd"))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.count("'") == 2, found
