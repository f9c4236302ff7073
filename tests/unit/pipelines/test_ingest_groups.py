"""Ingest of tables by groups, without Ray: what is read again, what stays as it is, and jobs that are killed."""

from __future__ import annotations

import json
import re
import time
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

import pipelines.ingest.groups
import pipelines.ingest.job
import pipelines.shards.duplicates
from pipelines.config import DataConfig, MediaConfig, MixtureConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.ingest.groups import ListedTable, form_groups, list_table
from pipelines.ingest.ingest import ingest
from pipelines.ingest.report import IngestReport
from pipelines.ingest.settings import IngestSettings
from pipelines.plan.build import build_plan
from pipelines.samples import Input, RawSample, Sample
from pipelines.shards.manifest import read_manifest
from pipelines.shards.verify import verify
from pipelines.sources import media_roots
from pipelines.sources.table import TableReader
from pipelines.sources.textual import units as text_units
from pipelines.storage.location import open_store
from pipelines.storage.store import Store
from tests.faults.s3_proxy import FAULTS, Fault, StormyProxy
from tests.inline import run_here
from tests.kills import is_killed
from tests.tables import opened, picture, write_pictures, write_table

MEDIA = MediaConfig()
TEXTS: dict[str, Any] = {"query": {"text": "q"}, "positive": {"text": "p"}}


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run in this process, and a group has at most three units."""
    monkeypatch.setattr(pipelines.ingest.job, "run", run_here)
    monkeypatch.setattr(pipelines.ingest.groups, "_MAX_UNITS", 3)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Units that are read: name of the file and part."""
    found: list[str] = []
    read = TableReader.read

    def counted(self: TableReader, unit: Any) -> Any:
        found.append(f"{unit.file.name}#{unit.part}")
        return read(self, unit)

    monkeypatch.setattr(TableReader, "read", counted)
    return found


def write_pairs(folder: Path, *numbers: int, rows: int = 4) -> None:
    """A Parquet file for each number, with row groups of two rows."""
    for number in numbers:
        pairs = [{"q": f"question {number} {n}", "p": f"answer {number} {n}"} for n in range(rows)]
        write_table(folder / f"{number:02d}.parquet", pairs, row_group_size=2)


def texts(folder: Path, name: str = "faq", **settings: Any) -> ListedTable:
    return list_table(opened(str(folder), name, **(TEXTS | settings)))


def run(out: Store, *tables: ListedTable, raw: Iterable[RawSample] = (), **changes: Any) -> IngestReport:
    settings = {"media": MEDIA, "held_out_fraction": 0.25, "seed": 3, "samples_per_shard": 4}
    return ingest(raw, out, tables=tables, **(settings | changes))


def folder_store(path: Path) -> Store:
    return open_store(str(path))


def snapshot(out: Store) -> dict[str, bytes]:
    return {path: out.read(path) for path in out.list() if path != "report.json" and not path.startswith("ingest/")}


def shard_tags(out: Store) -> dict[str, str]:
    return {path: tag for path, tag in out.tags().items() if path.endswith((".tar", ".idx.parquet"))}


def queries(out: Store) -> Counter[str]:
    """Texts of all queries of both splits, as the shards have them."""
    found: Counter[str] = Counter()
    for split in ("train", "held_out"):
        assert verify(out, split) == []
        for source in read_manifest(out, split).sources.values():
            for shard in source.shards:
                for line in out.read(shard.path).split(b"\0"):
                    if line.startswith(b'{"instruction"'):
                        found[Sample.from_json(line).query.text] += 1
    return found


def all_pairs(*numbers: int, rows: int = 4) -> Counter[str]:
    return Counter(f"question {number} {n}" for number in numbers for n in range(rows))


def test_several_positives_and_wordings_reach_the_batches(tmp_path: Path) -> None:
    """A table with lists, ingested: each epoch asks every question once, in one of its wordings, with one answer."""
    rows = [{"q": f"question {n}", "p": [f"answer {n} {k}" for k in range(1 + n % 3)]} for n in range(12)]
    write_table(tmp_path / "t/a.parquet", rows)
    settings = {"positive": {"text": "p", "choose": "each"}, "instruction": ["Find:", "Look up:"]}
    out = folder_store(tmp_path / "out")
    run(out, texts(tmp_path / "t", **settings), held_out_fraction=0.0)
    mixture = MixtureConfig(positives="one", run_length=2)
    reader = Reader(DataConfig(root=str(tmp_path / "out"), mixture=mixture))
    assert sum(reader.sizes().values()) == 24
    plan = build_plan(reader.tables(), mixture, global_batch=12, epochs=40, seed=1)
    assert plan.num_steps == 40
    asked: Counter[tuple[str, str, str]] = Counter()
    for step in range(plan.num_steps):
        batch = reader.batch(plan, step, 0, 1).batch
        assert sorted(one.query.text for one in batch) == sorted(row["q"] for row in rows)
        asked.update((one.query.text, one.positive.text, one.query.instruction) for one in batch)
    assert set(asked) == {
        (row["q"], answer, words) for row in rows for answer in row["p"] for words in ("Find:", "Look up:")
    }


def test_a_table_of_many_units_becomes_shards_with_the_names_of_their_groups(tmp_path: Path) -> None:
    write_pairs(tmp_path / "t", *range(5))
    out = folder_store(tmp_path / "out")
    report = run(out, texts(tmp_path / "t"))
    assert queries(out) == all_pairs(*range(5))
    assert (report.seen, report.num_accepted, report.num_groups, report.num_reused) == (20, 20, 4, 0)
    groups = json.loads(out.read("ingest/groups.json"))["groups"]["faq"]
    assert sorted(map(len, groups.values())) == [1, 3, 3, 3]
    paths = [shard.path for split in ("train", "held_out") for shard in read_manifest(out, split).sources["faq"].shards]
    assert {path.split("-")[1] for path in paths} == {group[:8] for group in groups}
    keys = {(path.split("/")[0], key) for path in paths for key in re.findall(rb"([0-9a-f-]+)\.json\0", out.read(path))}
    assert len(keys) == 20
    assert all(key[8:10] == b"-0" for _, key in keys)


def test_a_small_table_is_planned_as_a_whole(tmp_path: Path) -> None:
    """Its names, keys and exact split are those of the same samples in a folder."""
    write_pairs(tmp_path / "t", 0, rows=6)
    table, out, other = texts(tmp_path / "t"), folder_store(tmp_path / "out"), folder_store(tmp_path / "other")
    run(out, table)
    run(other, raw=list(table.reader.read_all()))  # type: ignore[arg-type]
    assert snapshot(out) == snapshot(other)
    assert read_manifest(out, "held_out").num_samples == 2  # round(6 / 4)
    assert next(path for path in out.list("train") if path.endswith(".tar")).startswith("train/faq/faq-000000-")


def test_groups_are_cut_by_rows_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path / "t", *range(6), rows=2)
    settings = IngestSettings(folder_store(tmp_path), MEDIA, 0.0, 0, 10)

    def sizes() -> list[int]:
        return sorted(len(group.units) for group in form_groups(texts(tmp_path / "t"), {}, settings))

    assert sizes() == [3, 3]
    monkeypatch.setattr(pipelines.ingest.groups, "_MAX_ROWS", 4)
    assert sizes() == [2, 2, 2]
    monkeypatch.setattr(pipelines.ingest.groups, "_MAX_BYTES", 1)
    assert sizes() == [1] * 6  # a unit is never divided


def test_units_of_a_group_lie_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.ingest.groups, "_MAX_UNITS", 16)
    write_pairs(tmp_path / "t", 0, rows=640)
    groups = form_groups(texts(tmp_path / "t"), {}, IngestSettings(folder_store(tmp_path), MEDIA, 0.0, 0, 10))
    assert [len(group.units) for group in groups] == [16] * 20
    spans = [group.units[-1].part - group.units[0].part for group in groups]
    assert min(spans) > 320 / 2
    assert all([unit.part for unit in group.units] == sorted(unit.part for unit in group.units) for group in groups)


def test_the_same_command_again_reads_no_row_and_writes_no_shard(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path / "t", *range(5))
    out = folder_store(tmp_path / "out")
    first = run(out, texts(tmp_path / "t"))
    before, tags = snapshot(out), shard_tags(out)
    assert len(reads) == 10
    with monkeypatch.context() as patch:
        patch.setattr(pipelines.shards.duplicates, "read_index_table", None)  # no index is read either
        again = run(out, texts(tmp_path / "t"))
    assert len(reads) == 10
    assert (again.num_groups, again.num_reused) == (4, 4)
    assert (snapshot(out), shard_tags(out)) == (before, tags)
    assert (again.seen, again.accepted, again.num_bytes) == (first.seen, first.accepted, first.num_bytes)


def test_a_table_that_grew_costs_its_new_units_only(tmp_path: Path, reads: list[str]) -> None:
    write_pairs(tmp_path / "t", *range(5))
    out = folder_store(tmp_path / "out")
    run(out, texts(tmp_path / "t"))
    tags = shard_tags(out)
    del reads[:]
    write_pairs(tmp_path / "t", 9)
    report = run(out, texts(tmp_path / "t"))
    assert sorted(reads) == ["09.parquet#0", "09.parquet#1"]
    assert (report.num_groups, report.num_reused, report.seen) == (5, 4, 24)
    assert queries(out) == all_pairs(*range(5), 9)
    assert tags.items() <= shard_tags(out).items()
    (tmp_path / "t/09.parquet").unlink()
    assert run(out, texts(tmp_path / "t")).num_reused == 4
    assert shard_tags(out) == tags
    assert len(list((tmp_path / "out/ingest").iterdir())) == 4 + 1


def test_a_replaced_file_costs_the_groups_that_hold_its_units(tmp_path: Path, reads: list[str]) -> None:
    write_pairs(tmp_path / "t", *range(8))
    out = folder_store(tmp_path / "out")
    run(out, texts(tmp_path / "t"))
    held = json.loads(out.read("ingest/groups.json"))["groups"]["faq"].values()
    table = texts(tmp_path / "t")
    replaced = {table.reader.unit_id(unit) for unit in table.units if unit.file.name == "03.parquet"}
    del reads[:]
    write_pairs(tmp_path / "t", 3, rows=2)
    run(out, texts(tmp_path / "t"))
    assert len(reads) == sum(len(units) for units in held if replaced & set(units)) - 1
    assert queries(out) == all_pairs(*range(3), *range(4, 8)) + all_pairs(3, rows=2)


def test_a_table_that_outgrows_one_group_is_planned_once_more(tmp_path: Path, reads: list[str]) -> None:
    """Its split was exact for all of its samples. The targets of later ones could part from it."""
    write_pairs(tmp_path / "t", 0)
    out = folder_store(tmp_path / "out")
    run(out, texts(tmp_path / "t"))
    write_pairs(tmp_path / "t", 1)
    del reads[:]
    assert run(out, texts(tmp_path / "t")).num_groups == 2
    assert len(reads) == 4
    assert queries(out) == all_pairs(0, 1)


def test_sources_come_and_go_alone(tmp_path: Path, reads: list[str]) -> None:
    for name in ("a", "b", "c"):
        write_pairs(tmp_path / name, *range(3))
    out = folder_store(tmp_path / "out")
    pairs = [RawSample(Sample("", "words", "text_text", Input(f"q {n}"), Input(f"p {n}"))) for n in range(8)]
    run(out, texts(tmp_path / "a", "a"), texts(tmp_path / "b", "b"), raw=pairs)
    tags = shard_tags(out)
    del reads[:]
    report = run(out, texts(tmp_path / "c", "c"), texts(tmp_path / "a", "a"), raw=pairs)
    assert len(reads) == 6
    assert (report.num_groups, report.num_reused) == (5, 3)
    assert sorted(read_manifest(out, "train").sources) == ["a", "c", "words"]
    now = shard_tags(out)
    kept = {path: tag for path, tag in tags.items() if "/b/" not in path}
    assert kept == {path: tag for path, tag in now.items() if "/c/" not in path}
    report = run(out, texts(tmp_path / "a", "a"), raw=pairs[:6])
    assert (report.num_groups, report.num_reused) == (3, 2)
    assert verify(out, "train") == verify(out, "held_out") == []


def test_other_settings_give_other_groups(tmp_path: Path, reads: list[str]) -> None:
    write_pairs(tmp_path / "t", *range(2))
    out = folder_store(tmp_path / "out")
    changes: list[dict[str, Any]] = [{}, {"seed": 4}, {"samples_per_shard": 3}, {"held_out_fraction": 0.3}]
    changes += [{"materialized": True}, {"media": MEDIA.model_copy(update={"max_bytes": 1000})}]
    for number, change in enumerate(changes, start=1):
        assert run(out, texts(tmp_path / "t"), **change).num_reused == 0
        assert len(reads) == 4 * number
        assert queries(out) == all_pairs(0, 1)
    run(out, texts(tmp_path / "t", instruction="Find it"), **changes[-1])
    assert len(reads) == 4 * len(changes) + 4
    assert run(out, texts(tmp_path / "t", instruction="Find it"), reuse=False, **changes[-1]).num_reused == 0


def test_equal_targets_never_part(tmp_path: Path) -> None:
    rows = [{"q": f"question {n}", "p": f"answer {n % 40}"} for n in range(400)]
    write_table(tmp_path / "t.parquet", rows, row_group_size=20)
    out = folder_store(tmp_path / "out")
    run(out, list_table(opened(str(tmp_path / "t.parquet"), "faq", **TEXTS)))
    split_of: dict[str, set[str]] = {}
    for split in ("train", "held_out"):
        for path in out.list(split):
            if path.endswith(".tar"):
                found = (line for line in out.read(path).split(b"\0") if line.startswith(b'{"instruction"'))
                for line in found:
                    split_of.setdefault(Sample.from_json(line).positive.text, set()).add(split)
    assert len(split_of) == 40
    assert {len(splits) for splits in split_of.values()} == {1}
    assert 4 <= sum(splits == {"held_out"} for splits in split_of.values()) <= 17  # 10 are expected


def test_a_split_that_leaves_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    write_pairs(tmp_path / "t", *range(4), rows=2)
    with pytest.raises(UserError, match=r"holds out 8 samples and leaves 0 to train on; set a smaller held_out_frac"):
        run(folder_store(tmp_path / "out"), texts(tmp_path / "t"), held_out_fraction=0.999)


def test_a_source_of_two_inputs_is_an_error(tmp_path: Path) -> None:
    write_pairs(tmp_path / "t", 0)
    raw = [RawSample(Sample("", "faq", "text_text", Input("q"), Input("p")))]
    with pytest.raises(UserError, match=r"source faq: has samples of input and of sources\.faq; give one of them"):
        run(folder_store(tmp_path / "out"), texts(tmp_path / "t"), raw=raw)


def test_a_limit_is_drawn_from_the_whole_table(tmp_path: Path, reads: list[str]) -> None:
    write_pairs(tmp_path / "t", *range(6))
    out = folder_store(tmp_path / "out")
    report = run(out, texts(tmp_path / "t", limit=10))
    assert (report.num_accepted, report.rejected) == (10, {"over_limit": 14})
    assert len({name.split(" ")[1] for name in queries(out)}) > 2
    assert run(out, texts(tmp_path / "t", limit=10)).num_reused == 1
    assert run(out, texts(tmp_path / "t", limit=9)).num_accepted == 9
    assert len(reads) == 24


def damage_marker(out: Path) -> None:
    marker = next(out.glob("ingest/*/000000.json"))
    marker.write_text(marker.read_text().replace('"num_samples": ', '"num_samples": 1'))


def cut_plan(out: Path) -> None:
    plan = next(out.glob("ingest/*/plan.json"))
    plan.write_bytes(plan.read_bytes()[:50])


def delete_shard(out: Path) -> None:
    next(out.glob("train/faq/*.tar")).unlink()


def delete_index(out: Path) -> None:
    next(out.glob("train/faq/faq-*.idx.parquet")).unlink()


def change_shard(out: Path) -> None:
    shard = next(out.glob("train/faq/*.tar"))
    time.sleep(0.01)
    shard.write_bytes(bytes(shard.stat().st_size))


@pytest.mark.parametrize("damage", [damage_marker, cut_plan, delete_shard, delete_index, change_shard])
def test_damage_is_noticed_and_repaired(
    damage: Callable[[Path], None], tmp_path: Path, reads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_pairs(tmp_path / "t", *range(5))
    out = folder_store(tmp_path / "out")
    run(out, texts(tmp_path / "t"))
    before, tags = snapshot(out), shard_tags(out)
    del reads[:]
    damage(tmp_path / "out")
    report = run(out, texts(tmp_path / "t"))
    assert report.num_reused == 3
    assert len(reads) in (1, 3)
    assert snapshot(out) == before
    assert sum(tag != tags[path] for path, tag in shard_tags(out).items()) <= 2
    assert "done again" in caplog.text or "written again" in caplog.text


def test_a_damaged_list_of_duplicates_is_made_again(tmp_path: Path) -> None:
    write_pairs(tmp_path / "t", *range(5))
    out = folder_store(tmp_path / "out")
    run(out, texts(tmp_path / "t"))
    before = snapshot(out)
    (path,) = (tmp_path / "out/train/faq").glob("duplicates-*")
    path.write_bytes(b"damaged")
    run(out, texts(tmp_path / "t"))
    assert snapshot(out) == before


def test_a_damaged_list_of_groups_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pairs(tmp_path / "t", *range(5))
    out = folder_store(tmp_path / "out")
    run(out, texts(tmp_path / "t"))
    before = snapshot(out)
    (tmp_path / "out/ingest/groups.json").write_text("{}")
    assert run(out, texts(tmp_path / "t")).num_reused == 4  # the same groups are formed again
    assert "groups.json: has no groups; groups are formed again" in caplog.text
    assert snapshot(out) == before


def test_media_that_were_missing_are_found_once_they_are_there(tmp_path: Path, reads: list[str]) -> None:
    rows = [{"q": f"picture {n}", "p": f"{n}.jpg"} for n in range(12)]
    write_table(tmp_path / "t.parquet", rows, row_group_size=2)
    write_pictures(tmp_path / "media", *(f"{n}.jpg" for n in range(11)))
    settings = {"query": {"text": "q"}, "positive": {"media": "p"}, "media_root": str(tmp_path / "media")}

    def again() -> IngestReport:
        return run(out, list_table(opened(str(tmp_path / "t.parquet"), "faq", **settings)))

    out = folder_store(tmp_path / "out")
    assert again().rejected == {"missing_file": 1}
    tags = shard_tags(out)
    del reads[:]
    assert again().rejected == {"missing_file": 1}
    assert len(reads) == 3  # the group with the missing file, once more
    assert shard_tags(out) == tags
    (tmp_path / "media/11.jpg").write_bytes(picture(11))
    report = again()
    assert (report.rejected, report.num_accepted, report.num_reused) == ({}, 12, 1)


def test_a_replaced_archive_is_read_again(tmp_path: Path) -> None:
    def pack(start: int) -> None:
        with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
            for n in range(8):
                archive.writestr(f"{n}.png", picture(start + n))

    write_table(tmp_path / "t.parquet", [{"q": f"q {n}", "p": f"{n}.png"} for n in range(8)], row_group_size=2)
    settings = {"query": {"text": "q"}, "positive": {"media": "p"}, "media_root": str(tmp_path / "m.zip")}
    out = folder_store(tmp_path / "out")
    stored = []
    for start in (0, 100):
        pack(start)
        media_roots._opened.cache_clear()  # as in a new process
        assert run(out, list_table(opened(str(tmp_path / "t.parquet"), "faq", **settings))).num_reused == 0
        stored.append(snapshot(out))
    assert stored[0].keys() != stored[1].keys()


def killed_runs(write: Callable[[], object], out: Store, calls: Iterable[int]) -> int:
    """Kill the job at each of these calls, twice at each, and return how often it died."""
    return sum(is_killed(write, out, number) for number in calls for _ in range(2))


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_killed_job_goes_on_and_ends_with_the_same_bytes(place: str, tmp_path: Path, request: Any) -> None:
    write_pairs(tmp_path / "t", *range(4))
    rows = [{"q": f"cell {n}", "p": {"bytes": picture(n, "JPEG"), "path": ""}} for n in range(14)]
    rows.append({"q": "damaged", "p": {"bytes": picture(99, "JPEG")[:200], "path": ""}})
    write_table(tmp_path / "pictures.parquet", rows, row_group_size=2)

    def write(out: Store) -> IngestReport:
        pictures = opened(str(tmp_path / "pictures.parquet"), "pics", query={"text": "q"}, positive={"media": "p"})
        return run(out, texts(tmp_path / "t"), list_table(pictures))

    once = folder_store(tmp_path / "once")
    expected = write(once)
    assert expected.rejected == {"corrupt_image": 1}
    out = folder_store(tmp_path / "out")
    if place == "s3":
        endpoint = request.getfixturevalue("s3_endpoint")
        out = open_store(f"s3://b{uuid.uuid4().hex[:12]}/x", endpoint)
    assert killed_runs(lambda: write(out), out, (3, 20, 45, 60, 90)) >= 6
    report = write(out)
    assert snapshot(out) == snapshot(once)
    assert (report.accepted, report.rejected, report.seen) == (expected.accepted, expected.rejected, expected.seen)
    assert report.examples == expected.examples


def test_what_is_stored_of_a_killed_job_is_not_read_again(tmp_path: Path, reads: list[str]) -> None:
    write_pairs(tmp_path / "t", *range(9))
    out = folder_store(tmp_path / "out")

    def killed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out, texts(tmp_path / "t"), before_publish=killed)
    assert len(reads) == 18
    assert run(out, texts(tmp_path / "t")).num_reused == 6
    assert len(reads) == 18
    assert queries(out) == all_pairs(*range(9))


def test_markers_of_others_stay(tmp_path: Path) -> None:
    write_pairs(tmp_path / "t", *range(5))
    out = folder_store(tmp_path / "out")
    run(out, texts(tmp_path / "t"))
    out.write("ingest/notes/plan.json", b"not ours")
    run(out, texts(tmp_path / "t"), seed=9)
    assert out.read("ingest/notes/plan.json") == b"not ours"


def test_progress_counts_what_was_stored_before(tmp_path: Path) -> None:
    write_pairs(tmp_path / "t", *range(5))
    out = folder_store(tmp_path / "out")
    shown: list[tuple[int, int, str]] = []
    run(out, texts(tmp_path / "t"), on_progress=lambda *news: shown.append(news))
    assert shown[0] == (0, 20, "0 of 4 groups")
    assert shown[-1] == (20, 20, "4 of 4 groups")
    assert [done for done, _, _ in shown] == sorted(done for done, _, _ in shown)
    write_pairs(tmp_path / "t", 7)
    del shown[:]
    run(out, texts(tmp_path / "t"), on_progress=lambda *news: shown.append(news))
    assert shown[0] == (20, 24, "4 of 5 groups, 4 stored before")


def test_lines_of_a_text_are_cut_into_small_units(tmp_path: Path) -> None:
    lines = [{"q": f"question {n} {'x' * 1000}", "p": f"answer {n}"} for n in range(9000)]
    table = list_table(opened(write_table(tmp_path / "t.jsonl", lines), "faq", **TEXTS))
    assert [unit.num_bytes for unit in table.units][:2] == [4 << 20, 4 << 20]
    assert table.units == tuple(text_units(table.reader.files[0], None))
    settings = IngestSettings(folder_store(tmp_path), MEDIA, 0.0, 0, 10)
    assert [group.num_rows for group in form_groups(table, {}, settings)] == [
        sum(unit.num_bytes // 256 for unit in table.units)
    ]


@pytest.mark.parametrize(("kinds", "fraction"), [(("slow_down",), 0.1), (FAULTS, 0.05)])
def test_a_bad_store_changes_no_byte_of_an_ingest_of_tables(
    kinds: Sequence[Fault], fraction: float, tmp_path: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables, files, archives and the dataset are in the store: it answers 503 in bursts, or 5% of requests fail."""
    monkeypatch.setattr("pipelines.storage.faults._PAUSES_S", (0.01,))
    raw = open_store(f"s3://b{uuid.uuid4().hex[:12]}", s3_endpoint)
    raw.ensure_bucket()
    for n in range(6):
        raw.write(f"media/{n}.png", picture(n))
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        for n in range(6):
            archive.writestr(f"{n}.png", picture(100 + n))
    raw.upload(tmp_path / "m.zip", "m.zip")
    cells = [{"q": f"cell {n}", "p": {"bytes": picture(200 + n), "path": ""}} for n in range(6)]
    raw.upload(Path(write_table(tmp_path / "cells.parquet", cells, row_group_size=3)), "cells.parquet")
    paths = [{"q": f"picture {n}", "p": f"{n}.png"} for n in range(6)]
    raw.upload(Path(write_table(tmp_path / "paths.jsonl", paths)), "paths.jsonl")
    sources = {
        "cells": ("cells.parquet", "media"),
        "files": ("paths.jsonl", "media"),
        "zipped": ("paths.jsonl", "m.zip"),
    }

    def ingested(endpoint: str, name: str) -> dict[str, bytes]:
        tables = []
        for source, (table, root) in sources.items():
            settings = {"query": {"text": "q"}, "positive": {"media": "p"}, "media_root": f"{raw.url}/{root}"}
            tables.append(list_table(opened(f"{raw.url}/{table}", source, endpoint=endpoint, **settings)))
        report = run(open_store(f"{raw.url}/{name}", endpoint), *tables, endpoint=endpoint)
        assert (report.num_accepted, report.rejected) == (18, {})
        return snapshot(open_store(f"{raw.url}/{name}", s3_endpoint))

    with StormyProxy(s3_endpoint, fraction=fraction, kinds=kinds, burst=2, delay_s=0.05) as proxy:
        proxy.commands = ("GET", "HEAD", "PUT", "POST")
        assert ingested(proxy.url, "stormy") == ingested(s3_endpoint, "calm")
        assert proxy.counts.total() >= fraction * proxy.num_requests / 2
        assert proxy.counts.keys() >= ({"slow_down", "reset"} if kinds is FAULTS else {"slow_down"})
