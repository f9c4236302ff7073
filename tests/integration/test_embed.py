"""Job of kind `embed`: what is stored, what a second run does, and that nothing but the items decides the bytes."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import rzen
from jobs.cli import main
from jobs.data import ingest
from jobs.data.specs import IngestSpec
from jobs.embedding import embed
from jobs.embedding.engine import embed_items
from jobs.embedding.specs import EmbedSpec
from pipelines.config import DataConfig
from pipelines.feed.reader import Reader
from pipelines.samples import DecodedSample
from pipelines.storage.location import open_store
from pipelines.storage.publish import MARK
from rzen.embedding.corpus import MANIFEST
from tests.data import publish
from tests.kills import run_until_a_part_is_stored
from tests.tiny import tiny_export
from tests.vectors import scenes

pytestmark = [pytest.mark.ray, pytest.mark.slow]
COLUMNS = ["split", "source", "index", "modality", "title", "origin", "target_sha256", "vector"]
SIZES = {"red": ("text_image", 140), "blue": ("text_image", 20)}
BAD = (7, 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_export(tmp_path_factory.mktemp("model"))


def spec_of(folder: Path, model: str, **changes: Any) -> EmbedSpec:
    fields: dict[str, Any] = {
        "kind": "embed",
        "model": model,
        "data": {"root": str(folder / "data")},
        "splits": ["train"],
        "out": str(folder / "vectors"),
        "samples_per_part": 32,
        "cpus_per_actor": 0.5,
        "cpus_per_task": 0.5,
    }
    return EmbedSpec.model_validate(fields | changes)


def make_data(folder: Path, sizes: dict[str, tuple[str, int]] = SIZES, bad: Collection[int] = ()) -> None:
    publish(open_store(str(folder / "data")), sizes, bad={"red": bad}, duplicates={"blue": [3, 5]})


def files(folder: Path) -> dict[str, bytes]:
    """The files of an embedded corpus by name."""
    root = folder / "vectors"
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def vector_files(folder: Path) -> dict[str, bytes]:
    """The same without the manifests, which say where the data are. The names of their versions stay."""
    manifests = (MANIFEST, "versions/")
    return {name: b"" if name.startswith(manifests) else data for name, data in files(folder).items()}


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "vectors" / MANIFEST).read_text())
    return content


def rows(folder: Path) -> list[dict[str, Any]]:
    store = open_store(str(folder / "vectors"))
    tables = [pq.read_table(io.BytesIO(store.read(part))) for part in manifest(folder)["parts"]]
    assert all(table.column_names == COLUMNS for table in tables)
    return [row for table in tables for row in table.to_pylist()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: str, ray_cluster: None) -> Path:
    """Folder of a run with one actor that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    make_data(folder, bad=BAD)
    result = embed.run(spec_of(folder, model))
    # Blue shows 18 colors of red, and among them the two that red has as broken files.
    assert (result["vectors"], result["embedded"], result["skipped"]) == (158, 140, {"unsupported_format": 2})
    return folder


def test_every_target_has_the_vector_of_itself_alone(whole: Path, model: str) -> None:
    embedder = rzen.load(model)
    reader = Reader(DataConfig(root=str(whole / "data")))
    alone = {}
    for source, size in reader.sizes().items():
        for index, sample in enumerate(reader.samples(source, range(size))):
            if isinstance(sample, DecodedSample):
                alone[source, index] = sample.sample, embedder.encode([sample.positive])[0]
    found = rows(whole)
    assert {(row["source"], row["index"]) for row in found} == set(alone)
    assert len(found) == manifest(whole)["num_vectors"] == 158
    for row in found:
        sample, vector = alone[row["source"], row["index"]]
        assert np.abs(np.array(row["vector"]) - vector).max() < 1e-5
        told = (sample.query.text, sample.origin, sample.target_sha256, "image", "train")
        assert (row["title"], row["origin"], row["target_sha256"], row["modality"], row["split"]) == told


def test_python_and_the_command_find_the_same_in_what_was_written(
    whole: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    embedder = rzen.load(model)
    vectors = str(whole / "vectors")
    hits = embedder.search(vectors, "red 3", top_k=3)
    capsys.readouterr()
    assert main(["search", "red 3", "--vectors", vectors, "--top-k", "3", "--set", "html=null"]) == 0
    printed = re.findall(r"^ *(\d) +(\S+) +image +.* (\S+) *$", capsys.readouterr().out, re.MULTILINE)
    assert printed == [(str(hit.rank), f"{hit.score:.3f}", hit.origin) for hit in hits]
    assert len(printed) == 3
    target = Reader(DataConfig(root=str(whole / "data"))).inputs("red", [(30, "positive")])
    (found,) = embedder.search(vectors, target, top_k=1)
    assert [(hit.source, hit.index) for hit in found] == [("red", 30)]
    assert found[0].score == pytest.approx(1, abs=1e-5)


def test_a_second_run_embeds_nothing_and_keeps_every_file(whole: Path, model: str) -> None:
    before = files(whole)
    times = {path: path.stat().st_mtime_ns for path in (whole / "vectors").rglob("*.parquet")}
    assert embed.run(spec_of(whole, model))["embedded"] == 0
    assert {path: path.stat().st_mtime_ns for path in (whole / "vectors").rglob("*.parquet")} == times
    after = files(whole)
    assert json.loads(after.pop(MANIFEST)) == json.loads(before.pop(MANIFEST)) | {"num_embedded": 0}
    (version,) = (name for name in after if name.startswith("versions/"))
    assert version == f"versions/{manifest(whole)['version']}.json"
    assert json.loads(after.pop(version)) == json.loads(before.pop(version)) | {"num_embedded": 0}
    assert after == before
    assert {name.partition("/")[0] for name in after} == {"parts", "listings", MARK}


def test_a_corpus_that_grew_by_a_tenth_embeds_a_tenth_and_what_has_gone_is_dropped(
    tmp_path: Path, model: str, ray_cluster: None
) -> None:
    make_data(tmp_path, {"red": ("text_image", 100)})
    embed.run(spec_of(tmp_path, model))
    before = files(tmp_path)
    make_data(tmp_path, {"red": ("text_image", 110)})
    assert embed.run(spec_of(tmp_path, model))["embedded"] == 10
    assert manifest(tmp_path)["num_vectors"] == len(rows(tmp_path)) == 110
    whole_parts = [name for name in before if "-000000096-" not in name and name.startswith("parts/")]
    assert len(whole_parts) == 2 * 3
    assert {name: before[name] for name in whole_parts}.items() <= files(tmp_path).items()
    first, second = (json.loads(before[MANIFEST]), manifest(tmp_path))
    assert second["previous"] == [first["version"]]
    old = rzen.load(model).search(tmp_path / "vectors", "red", top_k=200, version=first["version"])
    assert len(old) == 100, "the version before stays readable"
    make_data(tmp_path, {"red": ("text_image", 40)})
    assert embed.run(spec_of(tmp_path, model, keep_versions=0))["embedded"] == 0
    assert manifest(tmp_path)["num_vectors"] == len(rows(tmp_path)) == 40
    left = {name for name in files(tmp_path) if name.startswith("parts/")}
    assert len(left) == 2 * 2


def test_another_way_of_embedding_embeds_everything_again(whole: Path, tmp_path: Path, model: str) -> None:
    shutil.copytree(whole / "vectors", tmp_path / "vectors")
    data = {"root": str(whole / "data"), "instructions": False}
    assert embed.run(spec_of(tmp_path, model, data=data))["embedded"] == 140


@pytest.mark.parametrize("actors", [2, pytest.param(3, marks=pytest.mark.long)])
def test_any_number_of_actors_writes_the_same_bytes(whole: Path, tmp_path: Path, model: str, actors: int) -> None:
    make_data(tmp_path, bad=BAD)
    embed.run(spec_of(tmp_path, model, actors=actors))
    assert vector_files(tmp_path) == vector_files(whole)


class Stop(Exception):
    """Stands for a kill."""


def test_a_run_that_stopped_half_way_resumes_to_the_same_bytes(
    whole: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data(tmp_path, bad=BAD)

    def stopped(items: Any, models: Any, workers: Any, on_progress: Any, **more: Any) -> Any:
        def stop(done: int, total: int) -> None:
            if done:
                raise Stop

        return embed_items(items, models, workers, stop)

    monkeypatch.setattr(embed, "embed_items", stopped)
    with pytest.raises(Stop):
        embed.run(spec_of(tmp_path, model))
    parts = sorted((tmp_path / "vectors/unfinished").rglob("*.ids"))
    for path in parts[1:]:  # what actors did ahead: as if the first had been the only one, and the others half written
        path.unlink()
    assert not (tmp_path / "vectors" / MANIFEST).exists()
    monkeypatch.undo()
    result = embed.run(spec_of(tmp_path, model))
    assert result["embedded"] == 140  # those before the stop are counted, too
    assert vector_files(tmp_path) == vector_files(whole)


@pytest.mark.long
def test_a_killed_run_resumes_to_the_same_bytes(whole: Path, tmp_path: Path, model: str) -> None:
    make_data(tmp_path, bad=BAD)
    spec = spec_of(tmp_path, model)
    path = tmp_path / "spec.yaml"
    path.write_text(spec.model_dump_json())
    run_until_a_part_is_stored(path, tmp_path / "vectors", "unfinished/*/*.ids")
    assert list((tmp_path / "vectors").glob("unfinished/*/*.ids"))
    embed.run(spec)
    assert vector_files(tmp_path) == vector_files(whole)


def test_long_videos_are_measured_on_the_cluster_and_their_segments_embedded_by_any_number_of_actors(
    tmp_path: Path, model: str, ray_cluster: None
) -> None:
    films = [scenes([(number * 100, 0, 250 - one * 50) for one in range(4)], 1) for number in range(3)]
    for actors in (1, 2):
        folder = tmp_path / str(actors)
        (folder / "films").mkdir(parents=True)
        for number, film in enumerate(films):  # a shard each
            (folder / f"films/{number}.mp4").write_bytes(film)
        ingest.run(
            IngestSpec(
                kind="ingest",
                input=str(folder / "films"),
                out=str(folder / "data"),
                samples_per_shard=1,
                held_out_fraction=0.0,
                keep_uncaptioned=True,
            )
        )
        spec = spec_of(folder, model, splits=["uncaptioned"], segment_seconds=2.0, actors=actors, samples_per_part=2)
        result = embed.run(spec)
        assert result["segments"] == {"seconds": 2.0, "overlap_s": 0.0, "num_videos": 3, "num_segments": 6}
        assert (result["vectors"], result["embedded"]) == (6, 6)
        assert len([name for name in files(folder) if name.startswith("listings/")]) == 2 * 3
        assert embed.run(spec)["embedded"] == 0
    one, two = (
        {name: data for name, data in files(tmp_path / number).items() if name.startswith("parts/")} for number in "12"
    )
    assert one == two
    assert len(one) == 2 * 3  # the segments of a video stay in one part
