"""Job of kind `cluster`: clusters go into the table's parts and plan files, next to the candidates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.mining import cluster
from jobs.mining.specs import ClusterSpec
from pipelines.candidates.table import open_table
from pipelines.candidates.types import CandidateManifest, CandidateRows, Pool, TableData
from pipelines.candidates.write import PartWriter, publish_table
from pipelines.errors import UserError
from pipelines.shards.manifest import read_manifest
from pipelines.storage.location import open_store
from pipelines.storage.store import LocalStore
from tests.candidate_tables import KilledError, killed_at
from tests.data import publish

COUNT = 20


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a dataset and a table: even samples have even candidates, and odd ones odd. Sample 4 is dropped."""
    folder = tmp_path_factory.mktemp("mined")
    publish(open_store(str(folder / "data")), {"red": ("text_image", COUNT)})
    source = read_manifest(open_store(str(folder / "data")), "train").sources["red"].fingerprint
    writer = PartWriter.of(LocalStore(folder / "mined"), {})
    parts = []
    for shard, start in enumerate(range(0, COUNT, 8)):
        samples = np.arange(start, min(start + 8, COUNT))
        candidate = ((samples[:, None] + 2 * np.arange(1, 7)) % COUNT).ravel()
        keys = [f"{sample:08d}" for sample in samples]
        parts.append(
            writer.write("red", shard, CandidateRows.of(keys, [6] * len(keys), candidate=candidate, keep=samples != 4))
        )
    data = TableData(str(folder / "data"), "train", {"red": source})
    table = CandidateManifest("mine", data, (Pool("train", "red", source, COUNT),), {"red": tuple(parts)})
    publish_table(LocalStore(folder / "mined"), table)
    return folder


def spec_of(folder: Path, out: Path, **changes: Any) -> ClusterSpec:
    fields: dict[str, Any] = {"kind": "cluster", "table": str(folder / "mined"), "out": str(out), "first_rank": 2}
    return ClusterSpec.model_validate(fields | {"cluster_size": 10} | changes)


def clusters(out: Path) -> list[int]:
    table = open_table(str(out))
    parts = range(len(table.manifest.parts["red"]))
    return [number for part in parts for number in table.rows("red", part).cluster.tolist()]


def test_samples_that_prefer_each_other_share_a_cluster(mined: Path, tmp_path: Path) -> None:
    result = cluster.run(spec_of(mined, tmp_path / "out"))
    expected = [number % 2 for number in range(COUNT)]
    expected[4] = -1
    assert clusters(tmp_path / "out") == expected
    counts = {"clusters": 2, "samples": 19, "smallest": 9, "largest": 10}
    assert {name: result["counts"]["red"][name] for name in counts} == counts
    table, before = open_table(str(tmp_path / "out")), open_table(str(mined / "mined"))
    assert table.plan_rows("red").cluster.tolist() == expected
    assert table.plan_rows("red").keep.tolist() == [number != 4 for number in range(COUNT)]
    assert table.rows("red", 1).candidate.tolist() == before.rows("red", 1).candidate.tolist()
    assert table.manifest.made_from["mine"] == before.fingerprint
    again = cluster.run(spec_of(mined, tmp_path / "again"))
    assert again["fingerprint"] == result["fingerprint"]


def test_a_killed_job_resumes_with_the_parts_that_are_missing_and_cuts_no_graph_again(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cluster.run(spec_of(mined, tmp_path / "whole"))
    written = killed_at(monkeypatch, shard=2)
    with pytest.raises(KilledError):
        cluster.run(spec_of(mined, tmp_path / "out"))
    assert sorted(written) == [0, 1]
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "partition", None)
        assert cluster.run(spec_of(mined, tmp_path / "out")) == whole | {"outputs": [str(tmp_path / "out")]}
    assert sorted(written) == [0, 1, 2]
    assert not (tmp_path / "out" / "unfinished").exists()
    cluster.run(spec_of(mined, tmp_path / "out", seed=1))
    assert sorted(written) == [0, 0, 1, 1, 2, 2]  # another seed takes nothing over


def test_the_same_command_on_a_finished_table_clusters_nothing(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = cluster.run(spec_of(mined, tmp_path / "out"))
    written = killed_at(monkeypatch, shard=-1)
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "partition", None)
        assert cluster.run(spec_of(mined, tmp_path / "out")) == first
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path / 'out'} is up to date: nothing to cluster red: 2 clusters of 19 samples" in shown
    assert written == []
    other = cluster.run(spec_of(mined, tmp_path / "out", cluster_size=5))
    assert other["counts"]["red"]["clusters"] == 4
    assert sorted(written) == [0, 1, 2]


def test_clusters_that_were_kept_and_damaged_are_named(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(monkeypatch, shard=0)
    with pytest.raises(KilledError):
        cluster.run(spec_of(mined, tmp_path / "out"))
    (kept,) = (tmp_path / "out").rglob("*.npz")
    kept.write_bytes(kept.read_bytes()[:50])
    with pytest.raises(UserError, match=r"red\.npz: cannot be read: .*; delete the file"):
        cluster.run(spec_of(mined, tmp_path / "out"))


def test_samples_of_one_origin_share_a_cluster(mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ray_cluster", _nothing)
    cluster.run(spec_of(mined, tmp_path / "out", method="origin", origin=r"^1(.)\.png"))  # 10.png to 19.png
    assert clusters(tmp_path / "out") == [-1] * COUNT  # each is one of its kind
    cluster.run(spec_of(mined, tmp_path / "tens", method="origin", origin=r"^(1).\.png"))
    assert clusters(tmp_path / "tens") == [-1] * 10 + [0] * 10


def test_origins_of_other_data_are_refused(mined: Path, tmp_path: Path) -> None:
    publish(open_store(str(tmp_path / "data")), {"red": ("text_image", COUNT + 1)})
    with pytest.raises(UserError, match="is of another version of red"):
        cluster.run(spec_of(mined, tmp_path / "out", method="origin", root=str(tmp_path / "data")))


def test_a_source_without_candidates_has_no_clusters_and_is_named(
    mined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two sources of one table. Blue has candidates of red only."""
    before = open_table(str(mined / "mined")).manifest
    writer = PartWriter.of(LocalStore(tmp_path / "mined"), {})
    parts = {
        "red": tuple(
            writer.write("red", shard, open_table(str(mined / "mined")).rows("red", shard)) for shard in range(3)
        ),
        "blue": (writer.write("blue", 0, CandidateRows.of(["a", "b"], [6, 6], candidate=np.arange(12))),),
    }
    data = replace(before.data, sources=before.data.sources | {"blue": "0" * 64})
    pools = (*before.pools, Pool("train", "blue", "0" * 64, 2))
    publish_table(LocalStore(tmp_path / "mined"), replace(before, data=data, pools=pools, parts=parts, plan={}))
    result = cluster.run(spec_of(tmp_path, tmp_path / "out"))
    assert result["counts"]["red"]["clusters"] == 2
    assert result["counts"]["blue"] == {"clusters": 0, "samples": 0, "smallest": 0, "largest": 0, "kept_weight": 0.0}
    shown = " ".join(capsys.readouterr().out.split())
    assert "blue has no candidates of their own source at ranks 2 to 71: it has no clusters" in shown


class _nothing:  # noqa: N801  as few shards are listed without Ray
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def test_mistakes_are_named(mined: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no candidates of their own source at ranks 40 to 109; mine with pools"):
        cluster.run(spec_of(mined, tmp_path / "out", first_rank=40))
    with pytest.raises(UserError, match="is the table that is read"):
        cluster.run(spec_of(mined, mined / "mined"))
    with pytest.raises(ValueError, match="has no group in parentheses"):
        spec_of(mined, tmp_path, origin="page")
    with pytest.raises(ValueError, match="is not a regular expression"):
        spec_of(mined, tmp_path, origin="(")
