"""Job of kind `mine`: the table is that of brute force over vectors of single inputs, and nothing else decides it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rzen
from jobs.cli import main
from jobs.mining import cluster, mine, select
from jobs.mining.specs import ClusterSpec, MineSpec, SelectSpec
from pipelines.candidates.table import CandidateTable, open_table
from pipelines.candidates.types import MANIFEST
from pipelines.config import DataConfig, MixtureConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.plan.build import build_plan
from pipelines.samples import DecodedSample, Input
from pipelines.shards.duplicates import with_duplicates
from pipelines.shards.index import with_hashes
from pipelines.shards.manifest import Manifest, SourceInfo, publish_manifest
from pipelines.storage.location import open_store
from pipelines.storage.publish import LEASE, MARK
from tests.data import make_sample, publish, store_shard
from tests.tiny import tiny_export

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SIZES = {"red": ("text_image", 28), "blue": ("text_image", 11)}
BAD = (7, 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_export(tmp_path_factory.mktemp("model"))


def make_data(root: Path) -> None:
    """Samples 3 and 5 show what 0 shows, 6 asks what 1 asks, and two cannot be decoded."""
    store = open_store(str(root))
    publish(store, SIZES, bad={"red": BAD}, duplicates={"red": [3, 5]}, equal_queries={"red": [1, 6]})


def spec_of(folder: Path, model: str, **changes: Any) -> MineSpec:
    fields: dict[str, Any] = {
        "kind": "mine",
        "model": model,
        "data": {"root": str(folder / "data")},
        "depth": 4,
        "queries_per_task": 16,
        "out": str(folder / "mined"),
        "cpus_per_actor": 0.5,
        "cpus_per_task": 0.5,
    }
    return MineSpec.model_validate(fields | changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: str, ray_cluster: None) -> Path:
    """Folder of a run with one actor that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    make_data(folder / "data")
    mine.run(spec_of(folder, model))
    return folder


def table_files(folder: Path) -> dict[str, bytes]:
    """The files of a table, with the place of the data taken out."""
    root = folder / "mined"
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.glob("parts/*")}
    manifest = json.loads((root / MANIFEST).read_text())
    del manifest["data"]["root"]
    return found | {MANIFEST: json.dumps(manifest).encode()}


def vectors_of(folder: Path, model: str) -> Iterator[tuple[str, int, DecodedSample | None, Any, Any]]:
    """Each sample with the vectors of its query and its target, made one at a time."""
    embedder = rzen.load(model)
    reader = Reader(DataConfig(root=str(folder / "data")))
    for source, size in reader.sizes().items():
        for index, sample in enumerate(reader.samples(source, range(size))):
            if isinstance(sample, DecodedSample):
                query, target = embedder.encode([sample.query]), embedder.encode([sample.positive])
                yield source, index, sample, query[0], target[0]
            else:
                yield source, index, None, None, None


def candidates(table: CandidateTable, source: str) -> list[tuple[list[int], list[float], float]]:
    found = []
    for shard in range(len(table.manifest.parts[source])):
        rows = table.rows(source, shard)
        for row in range(len(rows)):
            span = rows.span(row)
            found.append((rows.candidate[span].tolist(), rows.recall[span].tolist(), float(rows.positive_recall[row])))
    return found


def test_candidates_are_the_nearest_targets_that_are_no_positives(whole: Path, model: str) -> None:
    table = open_table(str(whole / "mined"))
    table.check_data(Reader(DataConfig(root=str(whole / "data")))._manifest)
    samples = [*vectors_of(whole, model)]
    for source, start in (("blue", 0), ("red", SIZES["blue"][1])):
        mine_all = [row for row in samples if row[0] == source]
        first: dict[str, int] = {}
        for _, index, sample, _, _ in mine_all:
            if sample is not None:
                first.setdefault(sample.sample.target_sha256, index)
        for (found, scores, positive), (_, index, sample, query, target) in zip(
            candidates(table, source), mine_all, strict=True
        ):
            if sample is None:  # its target cannot be decoded, its query can
                assert index in BAD
                assert np.isnan(positive)
                assert len(found) == 4
                continue
            asked = sample.sample.query.text
            right = {
                other.sample.target_sha256 for *_, other, _, _ in mine_all if other and other.sample.query.text == asked
            }
            cosines = {
                start + number: float(query @ mine_all[number][4]) for sha, number in first.items() if sha not in right
            }
            expected = sorted(cosines, key=lambda number: -cosines[number])[:4]
            assert positive == pytest.approx(float(query @ target), abs=1e-5)
            assert scores == sorted(scores, reverse=True)
            assert scores == pytest.approx([cosines[number] for number in expected], abs=1e-5)
            assert all(
                cosines[number] == pytest.approx(score, abs=1e-5) for number, score in zip(found, scores, strict=True)
            )
            assert not {number for number in found if number not in cosines}


def test_a_finished_job_does_nothing_and_other_settings_embed_nothing_again(
    whole: Path, tmp_path: Path, model: str
) -> None:
    before = table_files(whole)
    times = {path: path.stat().st_mtime_ns for path in (whole / "mined").rglob("*") if path.is_file()}
    mine.run(spec_of(whole, model))
    assert {path: path.stat().st_mtime_ns for path in (whole / "mined").rglob("*") if path.is_file()} == times
    vectors = sorted((whole / "mined/vectors").rglob("*.ids"))
    shutil.copytree(whole / "mined/vectors", tmp_path / "vectors")
    shutil.copytree(whole / "data", tmp_path / "data")
    mine.run(spec_of(tmp_path, model, depth=2, vectors=str(tmp_path / "vectors")))
    assert len(sorted((tmp_path / "vectors").rglob("*.ids"))) == len(vectors)
    assert table_files(whole) == before
    shallow, deep = (
        candidates(open_table(str(tmp_path / "mined")), "red"),
        candidates(open_table(str(whole / "mined")), "red"),
    )
    assert [row[0] for row in shallow] == [row[0][:2] for row in deep]


def test_two_actors_and_a_job_that_was_killed_write_the_same_bytes(
    whole: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole / "data", tmp_path / "data")
    spec = spec_of(tmp_path, model, actors=2, vectors=str(whole / "mined/vectors"))  # embedding has tests of its own
    publish_table = mine.publish_table

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(mine, "publish_table", stop)
    with pytest.raises(KeyboardInterrupt):
        mine.run(spec)
    monkeypatch.setattr(mine, "publish_table", publish_table)
    made = sorted((tmp_path / "mined/unfinished").rglob("*.json"))
    kept = made[-1]
    for marker in made[:-1]:  # as if the job had been killed after its first part
        marker.unlink()
    assert not (tmp_path / "mined" / MANIFEST).exists()
    assert kept.exists()
    mine.run(spec)
    assert table_files(tmp_path) == table_files(whole)
    assert not (tmp_path / "mined/unfinished").exists()


def test_one_pool_of_all_sources_by_inverted_lists_in_an_object_store(
    whole: Path, model: str, s3_endpoint: str
) -> None:
    changes = {"out": "s3://mining/mined", "endpoint": s3_endpoint, "pools": "all", "search": "ivf"}
    result = mine.run(
        spec_of(whole, model, **changes, ivf={"lists": 3, "probes": 3}, vectors=str(whole / "mined/vectors"))
    )
    assert result["counts"]["ivf_recall"] == {"blue, red": 1.0}
    table = open_table("s3://mining/mined", s3_endpoint)
    assert [pool.source for pool in table.manifest.pools] == ["blue", "red"]
    pools, _ = table.manifest.locate(np.concatenate([table.rows("blue", 0).candidate, table.rows("red", 0).candidate]))
    assert set(pools.tolist()) == {0, 1}
    rows = table.rows("red", 0)
    assert not np.isnan(rows.owner).any()
    assert set(rows.candidate_modality.tolist()) == set(rows.modality.tolist()) == {0}


def test_a_library_that_is_missing_is_told_before_anything_is_embedded(
    whole: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("faiss", "pymetis"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=r"^search: ivf: faiss is not installed; run `pip install"):
        mine.run(spec_of(whole, model, out=str(tmp_path / "mined"), search="ivf"))
    clustering = ClusterSpec(kind="cluster", table=str(whole / "mined"), out=str(tmp_path / "clustered"))
    with pytest.raises(UserError, match=r"^method: preferences: pymetis is not installed; run `pip install"):
        cluster.run(clustering)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names <= {MARK, LEASE}, "no vectors, listings or clusters"


def test_one_command_mines_and_selects(
    whole: Path, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "negatives")
    small = ["cpus_per_actor=0.5", "cpus_per_task=0.5", "gpus_per_actor=0", "queries_per_task=16", "depth=4"]
    changes = [*small, f"vectors={whole / 'mined/vectors'}", "select.negatives.margin=null", "data.media.frames=8"]
    arguments = [word for change in changes for word in ("--set", change)]
    assert main(["mine", str(whole / "data"), model, out, "--negatives", "2", *arguments]) == 0
    assert f"to train with it: data: {{candidates: {out}, negatives_per_sample: 2}}" in capsys.readouterr().out
    chosen, mined = open_table(out), open_table(str(whole / "mined"))
    assert chosen.manifest.pools == mined.manifest.pools
    assert [row[0] for row in candidates(chosen, "red")] == [row[0][:2] for row in candidates(mined, "red")]
    assert "<article>" in (tmp_path / "negatives/report.html").read_text()


def publish_uncaptioned(root: Path, colors: list[int]) -> None:
    """Pictures without a query, one of each color."""
    store = open_store(str(root))
    samples = []
    for number, color in enumerate(colors):
        sample, members = make_sample("photos", "text_image", number, False, color)
        samples.append((with_hashes(replace(sample, query=Input(), negatives=()), members), members))
    shards = (store_shard(store, "uncaptioned", "photos", 0, samples),)
    publish_manifest(
        store, with_duplicates(store, Manifest("uncaptioned", {"photos": SourceInfo("text_image", 4, shards)}))
    )


def test_pictures_without_a_query_are_candidates(whole: Path, tmp_path: Path, model: str) -> None:
    """A pool of train and of the split `uncaptioned`, one of whose pictures is also in train."""
    shutil.copytree(whole / "data", tmp_path / "data")
    publish_uncaptioned(tmp_path / "data", [100, 2, 101, 102])
    pools = [{"sources": ["blue"]}, {"split": "uncaptioned"}]
    changes = {"sources": ["blue"], "pools": pools, "depth": 13, "vectors": str(whole / "mined/vectors")}
    mine.run(spec_of(tmp_path, model, **changes))
    table = open_table(str(tmp_path / "mined"))
    assert [(pool.split, pool.source) for pool in table.manifest.pools] == [
        ("train", "blue"),
        ("uncaptioned", "photos"),
    ]
    rows = [table.rows("blue", shard) for shard in range(2)]
    numbers = [some.candidate[some.span(row)].tolist() for some in rows for row in range(len(some))]
    # Eleven of blue, then the four pictures, of which the second shows what blue 2 shows.
    everything = {*range(11), 11, 13, 14}
    assert [set(found) for found in numbers] == [everything - {index} for index in range(11)]
    is_photo = np.concatenate([some.candidate for some in rows]) >= 11
    assert (np.isnan(np.concatenate([some.owner for some in rows])) == is_photo).all()
    assert not np.isnan(np.concatenate([some.recall for some in rows])).any()

    selecting = {"negatives": {"margin": None}, "choice": "spread", "negatives_per_sample": 13}
    select.run(
        SelectSpec.model_validate(
            {
                "kind": "select",
                "table": str(tmp_path / "mined"),
                "out": str(tmp_path / "chosen"),
                "selection": selecting,
                "trusted": True,
            }
        )
    )
    assert "<article>" in (tmp_path / "chosen/report.html").read_text()
    mixture = MixtureConfig(weights={"blue": 1.0})
    chosen = {"candidates": str(tmp_path / "chosen"), "negatives_per_sample": 15}
    reader = Reader(DataConfig(root=str(tmp_path / "data"), mixture=mixture, **chosen))
    batch = reader.batch(build_plan(reader.tables(), mixture, global_batch=8), 0, 0, 1)
    for sample in batch.batch:
        shown = [int(one.visuals[0].frames[0, 0, 0, 0]) for one in sample.negatives if one.visuals]
        assert sorted(shown) == sorted({*range(11), 100, 101, 102} - {int(sample.sample.key)})
