"""Candidates of a table as negatives: which ones a row takes, what is read for them, and tables that do not fit."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.candidates.table import open_table
from pipelines.candidates.types import CandidateManifest, TableData
from pipelines.candidates.write import publish_table
from pipelines.config import DataConfig, MixtureConfig
from pipelines.errors import UserError
from pipelines.feed.batch import FeedBatch
from pipelines.feed.feed import BadSampleCounter
from pipelines.feed.reader import Reader
from pipelines.plan.build import build_plan
from pipelines.plan.plan import Plan
from pipelines.samples import DecodedSample
from pipelines.shards.index import content_sha256
from pipelines.shards.manifest import Manifest
from pipelines.storage.location import open_store
from pipelines.storage.store import LocalStore
from tests.data import make_sample, publish, publish_candidates

CARS, BIKES = 40, 24
SOURCES = {"bikes": ("t2i", BIKES), "cars": ("t2i", CARS)}
"""Candidate n is bike n, and candidate 24 + n is car n."""
TABLE = {"cars": {n: [BIKES + (n + 1) % CARS, (n * 7) % BIKES, BIKES + (n * 3) % CARS, 5] for n in range(CARS)}}


def published(root: Path, bad: dict[str, list[int]] | None = None, **table: Any) -> Manifest:
    manifest = publish(open_store(str(root / "data")), SOURCES, bad)
    publish_candidates(
        open_store(str(root / "table")),
        open_store(str(root / "data")),
        manifest,
        table.pop("candidates", TABLE),
        **table,
    )
    return manifest


def reader_of(root: Path, **settings: Any) -> Reader:
    given: dict[str, Any] = {"negatives_per_sample": 4, "candidates": str(root / "table")} | settings
    mixture = MixtureConfig(weights={"cars": 1.0}, run_length=4)
    return Reader(DataConfig(root=str(root / "data"), mixture=mixture, **given))


def plan_of(reader: Reader, **changes: Any) -> Plan:
    return build_plan(reader.tables(), reader.data.mixture, **({"global_batch": 8, "epochs": 2, "seed": 3} | changes))


def candidate_of(negative: Any) -> int | None:
    """The number of the candidate that a negative shows; None for a text."""
    if not negative.visuals:
        return None
    return int(negative.visuals[0].frames[0, 0, 0, 0])


def negatives_of(sample: DecodedSample) -> list[int | None]:
    return [candidate_of(negative) for negative in sample.negatives]


def shown(number: int) -> int:
    """What candidate `number` shows, by `make_sample`."""
    return number if number < BIKES else number - BIKES


def test_own_negatives_come_first_then_those_of_the_table(tmp_path: Path) -> None:
    published(tmp_path)
    reader = reader_of(tmp_path)
    batch = reader.batch(plan_of(reader), 0, 0, 1)
    for sample in batch.batch:
        number = int(sample.sample.key)
        taken = TABLE["cars"][number][:2]  # two places are taken by its own texts
        assert negatives_of(sample) == [None, None, *map(shown, taken)]
        files = [make_sample("x", "t2i", shown(n), False) for n in taken]
        assert sample.negative_sha256[2:] == tuple(some.target_sha256 for some, _ in files)
        assert sample.negative_sha256[2:] == tuple(content_sha256(some.positive, files) for some, files in files)
    expected = {n for sample in batch.batch for n in TABLE["cars"][int(sample.sample.key)][:2]}
    assert batch.num_candidates == len(expected)
    few = reader_of(tmp_path, negatives_per_sample=1)
    assert {tuple(negatives_of(sample)) for sample in few.batch(plan_of(few), 0, 0, 1).batch} == {(None,)}


def test_every_number_of_workers_takes_the_same(tmp_path: Path) -> None:
    published(tmp_path)
    for draw in ("first", "random"):
        reader = reader_of(tmp_path, negatives_draw=draw, negatives_per_sample=3)
        plan = plan_of(reader)
        whole = [negatives_of(sample) for sample in reader.batch(plan, 3, 0, 1).batch]
        other = pickle.loads(pickle.dumps(reader))
        parts = [negatives_of(sample) for rank in range(4) for sample in other.batch(plan, 3, rank, 4).batch]
        assert parts == whole


def test_random_candidates_differ_between_epochs_and_not_between_runs(tmp_path: Path) -> None:
    table = {"cars": {n: list(range(BIKES)) for n in range(CARS)}}
    published(tmp_path, candidates=table)
    reader = reader_of(tmp_path, negatives_draw="random", negatives_per_sample=7)
    plan = plan_of(reader, global_batch=40)
    taken = []
    for step in (0, 1, 0):
        samples = sorted(reader.batch(plan, step, 0, 1).batch, key=lambda sample: sample.sample.key)
        taken.append([negatives_of(sample)[2:] for sample in samples])
    assert taken[0] == taken[2] != taken[1]
    assert all(len(set(some)) == 5 and some == sorted(some) for epoch in taken for some in epoch)
    counts = np.bincount([n for epoch in taken[:2] for some in epoch for n in some], minlength=BIKES)
    assert counts.min() > 5  # 400 draws of 24
    assert counts.max() < 32
    other = plan_of(reader, global_batch=40, seed=4)
    samples = sorted(reader.batch(other, 0, 0, 1).batch, key=lambda sample: sample.sample.key)
    assert [negatives_of(sample)[2:] for sample in samples] != taken[0]


def test_candidates_are_read_once_in_stretches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bikes 0 to 3 for all, and the positives of the batch, which are there already."""
    published(tmp_path, candidates={"cars": {n: [3, 1, BIKES + n, 0, 2] for n in range(CARS)}})
    reader = reader_of(tmp_path, negatives_per_sample=7)
    plan = plan_of(reader)
    reader.batch(plan, 1, 0, 1)  # opens the indices
    paths: list[str] = []
    read_range = LocalStore.read_range

    def counting(store: LocalStore, path: str, offset: int, length: int) -> bytes:
        paths.append(path)
        return read_range(store, path, offset, length)

    monkeypatch.setattr(LocalStore, "read_range", counting)
    batch = reader.batch(plan, 0, 0, 1)
    assert batch.num_candidates == 4 + 8
    assert [path for path in paths if "bikes" in path] == ["train/bikes/bikes-000000.tar"]
    plain = Reader(reader.data.model_copy(update={"candidates": None}))
    paths_with, paths = paths, []
    plain.batch(plan, 0, 0, 1)
    assert len(paths_with) == len(paths) + 1
    for sample in batch.batch:
        assert negatives_of(sample)[2:] == [3, 1, int(sample.sample.key), 0, 2]


def test_a_bad_candidate_is_left_out_and_counted(tmp_path: Path) -> None:
    published(tmp_path, bad={"bikes": [3]}, candidates={"cars": {n: [2, 3, 4] for n in range(CARS)}})
    reader = reader_of(tmp_path, negatives_per_sample=5)
    batch = reader.batch(plan_of(reader), 0, 0, 1)
    assert {tuple(negatives_of(sample)[2:]) for sample in batch.batch} == {(2, 4)}
    (found,) = batch.rejected_candidates
    assert (found.reason, batch.num_candidates, batch.rejected) == ("unsupported_format", 3, ())
    assert found.origin.endswith("bikes-000000.tar key 00000003")


def test_too_many_bad_candidates_stop_the_run(tmp_path: Path) -> None:
    published(tmp_path, bad={"bikes": [3]}, candidates={"cars": {n: [2, 3, 4] for n in range(CARS)}})
    reader = reader_of(tmp_path, negatives_per_sample=5)
    batch = reader.batch(plan_of(reader), 0, 0, 1)
    counter = BadSampleCounter(0.01)
    for _ in range(10):  # ten are allowed, of up to a thousand
        counter.add(batch)
    with pytest.raises(UserError, match=r"^data\.candidates: 11 of 33 candidates were bad, for example .*key 00000003"):
        counter.add(batch)
    BadSampleCounter(0.5).add(replace(batch, num_candidates=3000))


def test_a_reserve_brings_its_own_candidates(tmp_path: Path) -> None:
    bad = [1, 8, 17, 30]
    published(tmp_path, bad={"cars": bad}, candidates={"cars": {n: [n % BIKES] for n in range(CARS)}})
    reader = reader_of(tmp_path, negatives_per_sample=3)
    plan = plan_of(reader)
    replaced = 0
    for step in range(5):
        batch: FeedBatch = reader.batch(plan, step, 0, 1)
        replaced += len(batch.rejected)
        for sample in batch.batch:
            assert negatives_of(sample)[2:] == [int(sample.sample.key) % BIKES]
    assert replaced >= len(bad)


def test_another_content_than_the_table_says_stops_the_run(tmp_path: Path) -> None:
    published(tmp_path, ids={5: 1234})
    reader = reader_of(tmp_path, negatives_per_sample=6)
    problem = (
        r"table: says that the content of .*bikes-000000\.tar key 00000005 has the id 1234, and its id is -?\d+; mine"
    )
    with pytest.raises(UserError, match=problem):
        reader.batch(plan_of(reader), 0, 0, 1)


def test_a_table_of_other_data_is_refused(tmp_path: Path) -> None:
    published(tmp_path)
    publish(open_store(str(tmp_path / "data")), SOURCES | {"cars": ("t2i", CARS + 1)})
    with pytest.raises(
        UserError, match=r"table: is of another version of cars: \w{12}, the data have \w{12}; mine again"
    ):
        reader_of(tmp_path).tables()


def test_a_table_of_drops_is_no_table_of_candidates(tmp_path: Path) -> None:
    manifest = publish(open_store(str(tmp_path / "data")), SOURCES)
    sources = {name: info.fingerprint for name, info in manifest.sources.items()}
    publish_table(open_store(str(tmp_path / "drops")), CandidateManifest("curate", TableData("", "train", sources)))
    data = DataConfig(root=str(tmp_path / "data"), candidates=str(tmp_path / "drops"))
    with pytest.raises(UserError, match=r"/drops: lists no candidates: curate wrote it; name it in data\.curation"):
        Reader(data).tables()


def test_a_table_with_other_pools_is_refused(tmp_path: Path) -> None:
    manifest = published(tmp_path)
    table = publish_candidates(open_store(str(tmp_path / "table")), open_store(str(tmp_path / "data")), manifest, TABLE)
    (first, *others) = table.manifest.pools
    changed = replace(table.manifest, pools=(replace(first, fingerprint="0" * 64), *others))
    publish_table(table.store, changed, {})
    reader = reader_of(tmp_path)
    with pytest.raises(UserError, match=r"takes candidates from bikes 0{12} of .*data train, which has \w{12}; mine"):
        reader.batch(plan_of(reader), 0, 0, 1)


@pytest.mark.parametrize("change", ["part", "manifest", "gone"])
def test_an_edited_table_is_refused(tmp_path: Path, change: str) -> None:
    manifest = published(tmp_path)
    reader = reader_of(tmp_path)
    plan = plan_of(reader, global_batch=40)
    worker = pickle.loads(pickle.dumps(reader))
    if change == "part":
        part = next((tmp_path / "table/parts").glob("cars-000000*"))
        part.write_bytes(part.read_bytes()[:-1] + b"x")
        match = r"cars-000000-\w+\.parquet: is not the file that the manifest names"
    elif change == "manifest":
        publish_candidates(
            open_store(str(tmp_path / "table")), open_store(str(tmp_path / "data")), manifest, {"cars": {0: [1]}}
        )
        match = "was replaced while it was read; run the job again"
    else:
        (tmp_path / "table/candidates.json").unlink()
        match = "there is no such table"
    with pytest.raises(UserError, match=match):
        worker.batch(plan, 0, 0, 1)  # all samples, and so all parts


def test_drops_and_clusters_of_tables_decide_the_batches(tmp_path: Path) -> None:
    clusters = {n: n % 10 for n in range(20)}
    manifest = published(tmp_path, dropped={"cars": [0, 39]}, clusters={"cars": clusters})
    publish_candidates(
        open_store(str(tmp_path / "more")), open_store(str(tmp_path / "data")), manifest, {}, dropped={"cars": [20, 39]}
    )
    reader = reader_of(tmp_path, curation=[str(tmp_path / "more")])
    plan = plan_of(reader, epochs=9)
    steps = [[index for _, index in plan.batch(step).rows] for step in range(plan.num_steps)]
    assert {index for rows in steps for index in rows} == set(range(40)) - {0, 20, 39}
    for rows in steps:
        for number in range(1, 10):
            assert (number in rows) == (number + 10 in rows)
    plain = reader_of(tmp_path, candidates=None)
    fingerprints = [plan_of(some).fingerprint() for some in (reader, reader_of(tmp_path), plain)]
    assert len(set(fingerprints)) == 3
    found = reader.table_fingerprints()
    assert set(found) == {"candidates", "curation"}
    assert plain.table_fingerprints() == {}


@pytest.mark.parametrize(("stages", "expected"), [(("mine",), False), (("judge",), True), (("judge", "select"), True)])
def test_only_judged_tables_have_scores_of_a_teacher(stages: tuple[Any, ...], expected: bool, tmp_path: Path) -> None:
    published(tmp_path)
    store = open_store(str(tmp_path / "table"))
    table = open_table(str(tmp_path / "table"))
    made_from = dict.fromkeys(stages[:-1], "f")
    publish_table(store, replace(table.manifest, stage=stages[-1], made_from=made_from))
    assert reader_of(tmp_path).has_teacher_scores() is expected
    assert not reader_of(tmp_path, candidates=None).has_teacher_scores()
