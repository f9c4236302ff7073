"""`rzen embed --segment-seconds`: long videos become segments that a search finds, incrementally and after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import rzen
from jobs.cli import main
from jobs.embedding import embed
from jobs.serving.targets import Targets
from pipelines.samples import TimeRange
from rzen.embedding.corpus import MANIFEST, CorpusHit, read_corpus
from rzen.index.types import TargetPlace
from tests.inline import embed_here, without_ray
from tests.tiny import tiny_export
from tests.vectors import clip, damaged, picture, scenes

RED, GREEN, BLUE, YELLOW, CYAN = (250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)
COLORS = [RED, GREEN, BLUE, YELLOW, CYAN]
INSTRUCTION = "Understand the content of the provided video."
Json = Any


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_export(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder with a video of five colors, 2 s each, a clip of 2 s, and a picture."""
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "film.mp4").write_bytes(scenes(COLORS, 2))
    (folder / "short.mp4").write_bytes(clip(1))
    (folder / "photo.png").write_bytes(picture(1))
    return folder


def run(capsys: pytest.CaptureFixture[str], model: str, media: Path, *options: str) -> tuple[Json, str]:
    """Result and progress of `rzen embed`."""
    command = ["embed", model, str(media), str(media.parent / "vectors"), "--json", "--set", "data.media.frames=4"]
    assert main([*command, *options]) == 0
    told = capsys.readouterr()
    return json.loads(told.out), told.err


def hits(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> list[Json]:
    assert main(["search", "colors", "--vectors", str(folder), "--json", "--set", "html=null", *options]) == 0
    found: list[Json] = json.loads(capsys.readouterr().out)["searches"][0]["hits"]
    return found


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "parts").iterdir()}


def test_a_scene_is_found_by_its_color_with_its_times(
    tmp_path: Path, model: str, media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = tmp_path / "vectors"
    result, told = run(capsys, model, media, "--segment-seconds", "2")
    assert (result["vectors"], result["embedded"]) == (7, 7)
    assert result["segments"] == {"seconds": 2, "overlap_s": 0, "num_videos": 1, "num_segments": 5}
    assert "1 video is longer than 2 s: 5 segments" in told

    embedder, corpus = rzen.load(model), read_corpus(str(vectors))
    targets = Targets(corpus.manifest)
    rows = [row for table in corpus.parts.read_all() for row in table.to_pylist()]
    film = [row for row in rows if row["origin"] == "film.mp4"]
    assert [(row["start_s"], row["end_s"]) for row in film] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    assert {(row["start_s"], row["end_s"]) for row in rows if row not in film} == {(None, None)}
    assert len({row["target_sha256"] for row in rows}) == 7
    for row, color in zip(film, COLORS, strict=True):
        shown = targets.read(row["split"], row["source"], row["index"], TimeRange(row["start_s"], row["end_s"]))
        assert shown is not None
        assert np.abs(np.array(shown.frames).mean((0, 1, 2)) - color).max() < 10
        (best, second) = embedder.search(vectors, [shown], top_k=2)[0]
        assert (best.origin, best.start_s, best.end_s) == ("film.mp4", row["start_s"], row["end_s"])
        assert best.score == pytest.approx(1, abs=1e-5)
        assert second.score < 0.9999
        assert np.abs(embedder.encode([shown])[0] - row["vector"]).max() < 1e-5
        place = TargetPlace(row["split"], row["source"], row["index"], row["start_s"])
        assert corpus.find_row(place) == {"target_sha256": row["target_sha256"], "vector": row["vector"]}

    late = hits(capsys, vectors, "--filter", "start_s>=4", "--filter", "end_s<=8")
    assert {(hit["origin"], hit["start_s"], hit["end_s"]) for hit in late} == {("film.mp4", 4, 6), ("film.mp4", 6, 8)}
    assert {hit["start_s"] for hit in hits(capsys, vectors, "--modality", "image")} == {None}
    assert main(["search", "colors", "--vectors", str(vectors), "--set", f"html={tmp_path}/hits.html"]) == 0
    assert "film.mp4 0:04-0:06" in capsys.readouterr().out
    assert "film.mp4 0:04-0:06" in (tmp_path / "hits.html").read_text()
    groups = read_corpus(str(vectors)).nearest_targets(embedder.encode(["colors"])[0], 3)
    assert sorted(len(group) for group in groups) == [1, 1, 5]
    assert {len({hit.target for hit in group}) for group in groups} == {1}
    assert all(group[0].score == max(hit.score for hit in group) for group in groups)


def test_the_same_command_embeds_nothing_and_another_length_replaces_the_segments(
    tmp_path: Path, model: str, media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = run(capsys, model, media)
    before = parts(tmp_path / "vectors")
    assert "segments" not in json.loads((tmp_path / "vectors" / MANIFEST).read_text())
    first, _ = run(capsys, model, media, "--segment-seconds", "2", "--index", "lance")
    assert (first["vectors"], first["embedded"]) == (7, 5)  # the others have their vectors
    assert run(capsys, model, media, "--segment-seconds", "2", "--index", "lance")[0] == first | {"embedded": 0}
    longer, told = run(capsys, model, media, "--segment-seconds", "4", "--index", "lance")
    # The last two seconds are half a segment, and stay one of their own.
    assert (longer["vectors"], longer["embedded"], longer["segments"]["num_segments"]) == (5, 2, 3)
    assert "segments of 2 s were replaced by segments of 4 s" in told
    found = hits(capsys, tmp_path / "vectors", "--modality", "video", "--filter", "origin=film.mp4")
    assert {(hit["start_s"], hit["end_s"]) for hit in found} == {(0, 4), (4, 8), (8, 10)}
    overlapping, _ = run(capsys, model, media, "--segment-seconds", "4", "--segment-overlap-seconds", "2")
    assert (overlapping["segments"]["num_segments"], overlapping["embedded"]) == (4, 2)
    again, told = run(capsys, model, media, "--set", "keep_versions=0")
    assert (again["vectors"], again["version"]) == (3, whole["version"])
    assert "segments of 4 s were replaced by one vector a video" in told
    assert parts(tmp_path / "vectors").keys() == before.keys()
    names = pq.read_table(next((tmp_path / "vectors/parts").glob("*.parquet"))).column_names
    assert "start_s" not in names


def test_a_run_that_is_killed_ends_with_the_same_bytes(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    film = scenes([(n * 6, 0, 250 - n * 6) for n in range(40)], 1)
    for name in ("one", "other"):
        (tmp_path / name / "media").mkdir(parents=True)
        (tmp_path / name / "media/film.mp4").write_bytes(film)
    options = ("--segment-seconds", "1", "--set", "samples_per_part=16")
    result, _ = run(capsys, model, tmp_path / "one/media", *options)
    assert (result["vectors"], len(parts(tmp_path / "one/vectors"))) == (40, 2)

    class Killed(Exception):
        pass

    def killed(items: Any, models: Any, workers: Any, on_progress: Any, **more: Any) -> Any:
        embed_here(list(items)[:16], models, workers, on_progress)
        raise Killed

    monkeypatch.setattr(embed, "embed_items", killed)
    with pytest.raises(Killed):
        run(capsys, model, tmp_path / "other/media", *options)
    capsys.readouterr()
    monkeypatch.setattr(embed, "embed_items", embed_here)
    assert run(capsys, model, tmp_path / "other/media", *options)[0] == result | {
        "outputs": [str(tmp_path / "other/vectors")]
    }
    assert parts(tmp_path / "other/vectors") == parts(tmp_path / "one/vectors")


def test_long_videos_that_were_embedded_whole_are_named_with_the_option(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "media/lecture.mp4").write_bytes(scenes([RED, BLUE], 31))
    (tmp_path / "media/photo.png").write_bytes(picture(1))
    _, told = run(capsys, model, tmp_path / "media")
    assert "1 video is longer than 1:00 and got one vector" in told
    assert "--segment-seconds 30" in told
    result, told = run(capsys, model, tmp_path / "media", "--segment-seconds", "30")
    assert result["segments"]["num_segments"] == 2
    assert "got one vector" not in told
    _, told = run(capsys, model, tmp_path / "media", "--set", "data.media.max_video_s=61.0")
    assert "1 videos left out, longer than 61 s: --set data.media.max_video_s=14400 takes four hours" in told


def test_a_segment_that_cannot_be_decoded_is_named_and_the_others_stay(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "media/film.mkv").write_bytes(damaged(scenes(COLORS, 2, "matroska", "ffv1"), 4.4, 5.8))
    result, told = run(capsys, model, tmp_path / "media", "--segment-seconds", "2")
    assert (result["vectors"], result["skipped"]) == (4, {"corrupt_video": 1})
    assert result["segments"] == {"seconds": 2, "overlap_s": 0, "num_videos": 1, "num_segments": 4}
    assert "skipped segment: film.mkv 0:04-0:06: corrupt_video" in told
    found = hits(capsys, tmp_path / "vectors")
    assert {hit["start_s"] for hit in found} == {0, 2, 6, 8}


def test_settings_that_do_not_fit_are_refused(model: str, media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["embed", model, str(media), str(media.parent / "vectors")]
    for options, problem in (
        (["--segment-seconds", "0.5"], "segment_seconds"),
        (["--segment-seconds", "30", "--segment-overlap-seconds", "16"], "use at most 15"),
        (["--segment-seconds", "30", "--set", "queries=true"], "leave out one of the two"),
    ):
        assert main([*command, *options]) == 1
        assert problem in capsys.readouterr().err
    assert main([*command, "--segment-overlap-seconds", "5"]) == 0
    assert "segment_overlap_seconds" in capsys.readouterr().err


def test_a_hit_names_its_place(model: str) -> None:
    hit = CorpusHit(1, 0.5, "video", "", "a.mp4", "train", "s", 0, 90.0, 120.0)
    assert (hit.place(), hit.segment, hit.target) == ("a.mp4 1:30-2:00", TimeRange(90, 120), ("train", "s", 0))
    assert CorpusHit(1, 0.5, "video", "", "a.mp4", "train", "s", 0).place() == "a.mp4"
