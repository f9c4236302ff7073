"""Job of kind `select`: the table that it writes, its report, and what it refuses."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.mining import select
from jobs.mining.selection_report import PAGE, REPORT
from jobs.mining.specs import SelectSpec
from pipelines.candidates.table import CandidateTable, open_table
from pipelines.candidates.types import MANIFEST, CandidateManifest, CandidateRows, Pool, TableData
from pipelines.candidates.write import PartWriter, publish_table
from pipelines.errors import UserError
from pipelines.storage.location import open_store
from pipelines.storage.store import LocalStore
from tests.candidate_tables import KilledError, killed_at
from tests.data import publish

COUNT, DEPTH = 20, 6


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a dataset and a table: each sample's candidates are the next ones, with falling scores."""
    folder = tmp_path_factory.mktemp("mined")
    manifest = publish(open_store(str(folder / "data")), {"red": ("text_image", COUNT)})
    writer = PartWriter.of(LocalStore(folder / "mined"), {})
    parts = []
    for shard, start in enumerate(range(0, COUNT, 8)):
        samples = np.arange(start, min(start + 8, COUNT))
        rows = CandidateRows.of(
            [f"{sample:08d}" for sample in samples],
            [DEPTH] * len(samples),
            candidate=((samples[:, None] + np.arange(1, DEPTH + 1)) % COUNT).ravel(),
            recall=np.tile(0.9 - 0.1 * np.arange(DEPTH), len(samples)),
            positive_recall=np.where(samples == 3, 0.1, 0.85),
            modality=np.zeros(len(samples)),
        )
        parts.append(writer.write("red", shard, rows))
    source = manifest.sources["red"].fingerprint
    data = TableData(str(folder / "data"), "train", {"red": source})
    table = CandidateManifest("mine", data, (Pool("train", "red", source, COUNT),), {"red": tuple(parts)})
    publish_table(LocalStore(folder / "mined"), table)
    return folder


def spec_of(folder: Path, out: str, **changes: Any) -> SelectSpec:
    fields: dict[str, Any] = {"kind": "select", "table": str(folder / "mined"), "out": out, "trusted": True}
    return SelectSpec.model_validate(fields | changes)


def negatives(table: CandidateTable) -> list[list[int]]:
    found = []
    for shard in range(len(table.manifest.parts["red"])):
        rows = table.rows("red", shard)
        found += [rows.candidate[rows.span(row)].tolist() for row in range(len(rows))]
    return found


def test_the_table_has_the_chosen_negatives_and_drops(mined: Path, tmp_path: Path) -> None:
    rules = {"negatives_per_sample": 2, "min_negatives": 1}
    result = select.run(spec_of(mined, str(tmp_path / "out"), selection=rules))
    table = open_table(str(tmp_path / "out"))
    assert table.fingerprint == result["fingerprint"]
    expected = [
        [(sample + 2) % COUNT, (sample + 3) % COUNT] for sample in range(COUNT)
    ]  # 0.8 and 0.7 of at most 0.8075
    expected[3] = []
    assert negatives(table) == expected
    assert table.plan_rows("red").sample.tolist() == [3]
    assert result["counts"]["red"]["removed"] == {"margin": COUNT - 1 + DEPTH}
    assert table.manifest.stage == "select"
    assert table.manifest.made_from["mine"] == open_table(str(mined / "mined")).fingerprint
    assert table.manifest.pools == open_table(str(mined / "mined")).manifest.pools


def test_the_report_shows_rules_and_pictures_of_examples(mined: Path, tmp_path: Path) -> None:
    select.run(spec_of(mined, str(tmp_path / "out"), num_examples=7))
    html = (tmp_path / "out" / PAGE).read_text()
    assert html.count("<article>") == 7
    assert "left out: margin" in html
    assert html.count('class="hit relevant"') == 7
    assert "data:image/webp" in html
    assert "<code>margin</code>" in html
    assert "text_image" in html


def test_a_table_without_its_data_is_chosen_from_and_its_report_has_no_examples(
    mined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    select.run(spec_of(mined, str(tmp_path / "out"), root=str(tmp_path / "gone")))
    assert "the report has no examples" in capsys.readouterr().out
    assert "<article>" not in (tmp_path / "out" / PAGE).read_text()
    assert len(negatives(open_table(str(tmp_path / "out")))) == COUNT


def test_other_data_than_those_of_the_table_are_no_examples(
    mined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(tmp_path / "data")
    publish(open_store(other), {"red": ("text_image", COUNT)}, duplicates={"red": [4]})
    before = open_table(str(mined / "mined")).manifest
    shutil.copytree(mined / "mined", tmp_path / "mined")
    moved = replace(before, pools=(replace(before.pools[0], root=other),))
    publish_table(LocalStore(tmp_path / "mined"), moved)
    specs = [spec_of(mined, str(tmp_path / "out"), root=other), spec_of(tmp_path, str(tmp_path / "of pool"))]
    for spec, problem in zip(specs, ("is of another version of red", "another version of red in"), strict=True):
        select.run(spec)
        shown = " ".join(capsys.readouterr().out.split())
        assert "the report has no examples: " in shown
        assert problem in shown
        assert "<article>" not in (Path(spec.out) / PAGE).read_text()


def test_the_same_settings_write_the_same_bytes_on_a_disk_and_in_an_object_store(
    mined: Path, tmp_path: Path, s3_endpoint: str
) -> None:
    rules = {"choice": "random", "negatives_per_sample": 3, "seed": 5}
    local = select.run(spec_of(mined, str(tmp_path / "out"), selection=rules))
    again = select.run(spec_of(mined, str(tmp_path / "again"), selection=rules))
    remote = select.run(spec_of(mined, "s3://selected/out", selection=rules, endpoint=s3_endpoint, num_examples=0))
    assert local["fingerprint"] == again["fingerprint"] == remote["fingerprint"]
    assert (tmp_path / "out" / MANIFEST).read_bytes() == (tmp_path / "again" / MANIFEST).read_bytes()
    assert (tmp_path / "out" / PAGE).read_bytes() == (tmp_path / "again" / PAGE).read_bytes()


def test_a_killed_job_resumes_with_the_parts_that_are_missing(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = {"choice": "random", "negatives_per_sample": 3, "seed": 5}
    whole = select.run(spec_of(mined, str(tmp_path / "whole"), selection=rules))
    spec = spec_of(mined, str(tmp_path / "out"), selection=rules)
    written = killed_at(monkeypatch, shard=1)
    with pytest.raises(KilledError):
        select.run(spec)
    assert sorted(written) == [0, 2]
    other = spec_of(mined, str(tmp_path / "out"), selection=rules | {"seed": 6}, num_examples=0)
    selects = counted(monkeypatch)
    assert select.run(spec)["fingerprint"] == whole["fingerprint"]
    assert sorted(written) == [0, 1, 2]
    assert selects.pop(0) == 8  # the missing part; the others only for the report's examples
    assert len(selects) == 3
    assert (tmp_path / "out" / PAGE).read_bytes() == (tmp_path / "whole" / PAGE).read_bytes()
    assert not (tmp_path / "out" / "unfinished").exists()
    select.run(other)
    assert sorted(written) == [0, 0, 1, 1, 2, 2]  # other rules take nothing over


def test_the_same_command_on_a_finished_table_chooses_nothing(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    spec = spec_of(mined, str(out), num_examples=7)
    first = select.run(spec)
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    times = {path: path.stat().st_mtime_ns for path in before}
    written, selects = killed_at(monkeypatch, shard=-1), counted(monkeypatch)
    capsys.readouterr()
    assert select.run(spec) == first
    assert f"{out} is up to date: nothing to select" in capsys.readouterr().out
    assert (written, selects) == ([], [])
    assert {path: path.stat().st_mtime_ns for path in times} == times

    more = spec.model_copy(update={"num_examples": 9})  # which the report shows, and the table does not have
    assert select.run(more) == first
    assert written == []
    assert (out / PAGE).read_text().count("<article>") == 9
    assert {path for path in before if path.read_bytes() != before[path]} == {out / PAGE, out / REPORT}
    assert select.run(spec) == first
    assert {path: path.read_bytes() for path in before} == before

    (part,) = out.glob("parts/red-000001-*")
    part.unlink()
    assert select.run(spec) == first
    assert sorted(written) == [0, 1, 2]
    assert part.read_bytes() == before[part]


def test_a_report_without_examples_is_drawn_again(mined: Path, tmp_path: Path) -> None:
    """The dataset was out of reach at first, at the place where the table says that it is."""
    table, data = tmp_path / "mined", tmp_path / "data"
    shutil.copytree(mined / "mined", table)
    manifest = table / MANIFEST
    manifest.write_text(manifest.read_text().replace(str(mined / "data"), str(data)))
    spec = spec_of(tmp_path, str(tmp_path / "out"))
    first = select.run(spec)
    assert "<article>" not in (tmp_path / "out" / PAGE).read_text()
    shutil.copytree(mined / "data", data)
    assert select.run(spec) == first
    assert (tmp_path / "out" / PAGE).read_text().count("<article>") == 19  # all but the sample without negatives


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the first sample of each part for which negatives are chosen."""
    found: list[int] = []
    choose = select.select

    def counting(*args: Any) -> Any:
        found.append(args[-1])
        return choose(*args)

    monkeypatch.setattr(select, "select", counting)
    return found


def test_a_source_may_have_rules_of_its_own(mined: Path, tmp_path: Path) -> None:
    select.run(spec_of(mined, str(tmp_path / "out"), sources={"red": {"negatives_per_sample": 1, "first_rank": 6}}))
    assert negatives(open_table(str(tmp_path / "out")))[0] == [6]
    page = (tmp_path / "out" / PAGE).read_text()
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert {name: value for name, value in facts.items() if name.startswith("red: ")} == {
        "red: first_rank": "6",
        "red: negatives_per_sample": "1",
    }
    assert (facts["negatives.margin"], facts["first_rank"]) == ("0.05", "1")
    with pytest.raises(UserError, match=r"sources.blue: is no source of .*/mined; its sources: red"):
        select.run(spec_of(mined, str(tmp_path / "other"), sources={"blue": {}}))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"judge_margin": 0.01}, "has no judge scores for judge_margin; run a job of kind judge"),
        ({"max_owner_likeness": 0.9}, "has no scores of other queries for max_owner_likeness; mine with owners: true"),
    ],
)
def test_rules_without_their_scores_are_refused(mined: Path, tmp_path: Path, rules: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select.run(spec_of(mined, str(tmp_path / "out"), selection={"negatives": rules}))
    assert not (tmp_path / "out" / MANIFEST).exists()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"first_rank": 5, "last_rank": 4}, "last_rank=4 is below first_rank=5: no candidate is left"),
        ({"min_negatives": 6}, "min_negatives=6 is above negatives_per_sample=5: no sample is kept"),
    ],
)
def test_rules_that_leave_nothing_are_refused(mined: Path, tmp_path: Path, rules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec_of(mined, str(tmp_path / "out"), selection=rules)


def test_a_table_of_drops_has_nothing_to_choose(mined: Path, tmp_path: Path) -> None:
    data = open_table(str(mined / "mined")).manifest.data
    publish_table(LocalStore(tmp_path / "mined"), CandidateManifest("curate", data))
    with pytest.raises(UserError, match=r"/mined: lists no candidates: curate wrote it; name a table that mine"):
        select.run(spec_of(tmp_path, str(tmp_path / "out")))


def test_a_table_is_not_replaced_by_what_is_chosen_from_it(mined: Path) -> None:
    with pytest.raises(UserError, match="is the table that is chosen from"):
        select.run(spec_of(mined, str(mined / "mined")))
