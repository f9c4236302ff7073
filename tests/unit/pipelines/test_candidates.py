"""Candidate tables: rows through Parquet, parts that are made once, and tables that are not of these data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.candidates.files import parse_part, parse_plan, part_bytes, plan_bytes
from pipelines.candidates.table import open_table, read_table
from pipelines.candidates.types import (
    CANDIDATE_COLUMNS,
    MANIFEST,
    SAMPLE_COLUMNS,
    CandidateManifest,
    CandidateRows,
    PlanRows,
    Pool,
    TableData,
    content_id,
)
from pipelines.candidates.write import PartWriter, publish_table
from pipelines.errors import UserError
from pipelines.shards.manifest import Manifest, SourceInfo
from pipelines.storage.location import open_store
from pipelines.storage.store import LocalStore

ROWS = CandidateRows.of(
    ["a", "b", "c"],
    [2, 0, 1],
    candidate=[7, 4, 12],
    id=[-70, 40, 120],
    recall=[0.75, 0.5, 0.25],
    teacher=[np.nan, 0.125, np.nan],
    candidate_modality=[0, 3, 1],
    positive_recall=[0.5, np.nan, 1.0],
    modality=[0, 0, 3],
    keep=[True, False, True],
    cluster=[-1, -1, 5],
)
SOURCE = SourceInfo("t", 5, ())
DATA = Manifest("train", {"s": SOURCE, "other": SourceInfo("u", 1, ())})
TABLE = TableData("data", "train", {"s": SOURCE.fingerprint})


def equal(one: CandidateRows, other: CandidateRows) -> bool:
    names = ("bounds", *SAMPLE_COLUMNS, *CANDIDATE_COLUMNS)
    same = (
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=getattr(one, name).dtype.kind == "f")
        and getattr(one, name).dtype == getattr(other, name).dtype
        for name in names
    )
    return one.key == other.key and all(same)


def written(folder: Path) -> CandidateManifest:
    writer = PartWriter.of(LocalStore(folder), {"a": 1})
    parts = (writer.write("s", 0, ROWS), writer.write("s", 1, CandidateRows.of(["d", "e"], [1, 1], candidate=[3, 2])))
    return CandidateManifest("mine", TABLE, (Pool("train", "s", "f", 5), Pool("train", "t", "g", 9, "x")), {"s": parts})


def test_rows_are_read_as_they_were_written_and_as_others_read_them(tmp_path: Path) -> None:
    data = part_bytes(ROWS)
    assert equal(parse_part(data, "x"), ROWS)
    assert part_bytes(parse_part(data, "x")) == data
    (tmp_path / "x.parquet").write_bytes(data)
    table = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert [row["candidate"] for row in table] == [[7, 4], [], [12]]
    assert [row["teacher"] for row in table] == [[None, 0.125], [], [None]]
    assert [row["positive_recall"] for row in table] == [0.5, None, 1.0]
    assert [row["keep"] for row in table] == [True, False, True]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=8), st.integers(0, 2**32 - 1))
def test_any_rows_survive(counts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = {name: rng.integers(0, 3, sum(counts)) for name in CANDIDATE_COLUMNS}
    columns |= {name: rng.integers(0, 2, len(counts)) for name in SAMPLE_COLUMNS}
    rows = CandidateRows.of([str(number) for number in range(len(counts))], counts, **columns)
    assert equal(parse_part(part_bytes(rows), "x"), rows)


def test_a_choice_of_candidates_keeps_each_with_its_sample() -> None:
    chosen = ROWS.take(np.array([1, 2]))
    assert chosen.counts.tolist() == [1, 0, 1]
    assert chosen.candidate.tolist() == [4, 12]
    assert chosen.sample.tolist() == [0, 2]
    assert chosen.keep.tolist() == ROWS.keep.tolist()


def test_wrong_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="recall has shape"):
        CandidateRows.of(["a"], [2], recall=[0.5])
    with pytest.raises(ValueError, match="unknown columns"):
        CandidateRows.of(["a"], [2], recal=[0.5, 0.5])


def test_ids_are_those_of_training() -> None:
    assert content_id("ff" * 32) == -1
    assert content_id("00" * 7 + "02" + "ff" * 24) == 2


def test_a_table_is_read_as_it_was_published(tmp_path: Path) -> None:
    manifest = written(tmp_path)
    published = publish_table(LocalStore(tmp_path), manifest)
    table = open_table(str(tmp_path))
    assert table.fingerprint == published.fingerprint
    assert table.manifest == published.manifest
    assert equal(table.rows("s", 0), ROWS)
    plan = table.plan_rows("s")
    assert (plan.sample.tolist(), plan.keep.tolist(), plan.cluster.tolist()) == ([1, 2], [False, True], [-1, 5])
    assert (table.manifest.plan["s"].num_dropped, table.manifest.plan["s"].num_clustered) == (1, 1)
    assert len(table.plan_rows("other")) == 0
    assert table.has_rows("s")
    assert not table.has_rows("other")
    pools, indices = table.manifest.locate(np.array([0, 4, 5, 13]))
    assert (pools.tolist(), indices.tolist()) == ([0, 0, 1, 1], [0, 4, 0, 8])
    table.check_data(DATA)


def test_a_table_of_drops_has_no_parts(tmp_path: Path) -> None:
    drops = PlanRows.of(np.array([True, False, True, False]), np.full(4, -1), start=1)
    publish_table(LocalStore(tmp_path), CandidateManifest("curate", TABLE), {"s": drops})
    assert open_table(str(tmp_path)).plan_rows("s").sample.tolist() == [2, 4]
    assert not (tmp_path / "parts").exists()


def test_parts_are_made_once_and_a_job_with_other_settings_makes_its_own(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    writer = PartWriter.of(store, {"k": 5})
    info = writer.write("a-b", 3, ROWS)
    assert PartWriter.of(store, {"k": 5}).done() == {("a-b", 3): info}
    assert PartWriter.of(store, {"k": 6}).done() == {}
    (tmp_path / info.path).unlink()
    assert writer.done() == {}


def test_publishing_again_leaves_the_files_of_the_new_table_and_of_others(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    first = publish_table(store, written(tmp_path))
    (tmp_path / "parts/notes.txt").write_text("mine")
    part = PartWriter.of(store, {"b": 2}).write("s", 0, CandidateRows.of(["a"], [0]))
    publish_table(store, replace(first.manifest, parts={"s": (part,)}, plan={}))
    assert store.list() == [MANIFEST, "parts/notes.txt", part.path]


def test_equal_tables_have_equal_bytes_wherever_they_are(tmp_path: Path, s3_endpoint: str) -> None:
    local = publish_table(LocalStore(tmp_path), written(tmp_path))
    remote = open_store("s3://candidates/table", s3_endpoint)
    remote.ensure_bucket()
    remote.upload_tree(tmp_path)
    assert read_table(remote).fingerprint == local.fingerprint
    assert equal(read_table(remote).rows("s", 0), ROWS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Manifest("held_out", {"s": SOURCE}), "is of the split train, not held_out"),
        (Manifest("train", {"r": SOURCE}), "is of the source 's', which the data do not have"),
        (
            Manifest("train", {"s": replace(SOURCE, task="v")}),
            "is of another version of s: .* the data have .*mine again",
        ),
    ],
)
def test_tables_of_other_data_are_refused(tmp_path: Path, change: Manifest, message: str) -> None:
    table = publish_table(LocalStore(tmp_path), written(tmp_path))
    with pytest.raises(UserError, match=message):
        table.check_data(change)


def test_damage_is_one_error(tmp_path: Path) -> None:
    table = publish_table(LocalStore(tmp_path), written(tmp_path))
    part = tmp_path / table.manifest.parts["s"][0].path
    part.write_bytes(part.read_bytes() + b"x")
    with pytest.raises(UserError, match="is not the file that the manifest names"):
        table.rows("s", 0)
    part.unlink()
    with pytest.raises(UserError, match="is named in the manifest but missing"):
        table.rows("s", 0)
    with pytest.raises(UserError, match="is not a part of candidates"):
        parse_part(plan_bytes(PlanRows.join([])), "x")
    with pytest.raises(UserError, match="is not a plan file"):
        parse_plan(part_bytes(ROWS), "x")
    with pytest.raises(UserError, match="cannot be read"):
        parse_part(b"PAR1", "x")
    with pytest.raises(UserError, match="not ascending"):
        parse_plan(plan_bytes(PlanRows(np.array([2, 1]), np.zeros(2, bool), np.full(2, -1), np.ones(2))), "x")
    with pytest.raises(UserError, match="weights are not all above 0"):
        parse_plan(plan_bytes(PlanRows.of(np.array([True]), np.array([-1]), weight=np.zeros(1, np.float32))), "x")
    content = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(content | {"format_version": 9}))
    with pytest.raises(UserError, match="format version 9, this program reads 1"):
        open_table(str(tmp_path))
    (tmp_path / MANIFEST).write_text(json.dumps(content | {"stage": "mined"}))
    with pytest.raises(UserError, match="stage="):
        open_table(str(tmp_path))
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(UserError, match="there is no such table"):
        open_table(str(tmp_path))
