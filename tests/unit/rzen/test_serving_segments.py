"""The server with a corpus whose long videos are divided: moments, their pictures and clips, hits like a hit."""

from __future__ import annotations

import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import rzen
from pipelines.media.decode import Decoder
from pipelines.samples import TimeRange, Visual
from rzen.serving.engine import Engine, EngineSettings
from rzen.serving.place import Place
from tests.serving import http_server
from tests.tiny import tiny_export
from tests.vectors import MEDIA, clip, embed_folder, picture, scenes

COLORS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
Json = Any


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `model`, and its `vectors` of a film of five colors, a clip and a picture."""
    root = tmp_path_factory.mktemp("moments")
    model = tiny_export(root)
    (root / "media").mkdir()
    (root / "media/film.mp4").write_bytes(scenes(COLORS, 2))
    (root / "media/short.mp4").write_bytes(clip(1))
    (root / "media/photo.png").write_bytes(picture(1))
    embed_folder(Path(model), root / "media", root / "vectors", "--segment-seconds", "2")
    (root / "name").write_text(model)
    return root


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    engine = Engine(EngineSettings(media=MEDIA))
    engine.load(Place((root / "name").read_text(), corpus=str(root / "vectors")))
    with http_server(engine) as url:
        yield url
    engine.close()


def search(url: str, **body: Any) -> Json:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/v1/search", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())["data"]
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]["message"]


def get(url: str) -> tuple[int, bytes, Any]:
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def address(hit: Json, route: str, start_s: float | None = None, end_s: float | None = None) -> str:
    asked = "" if end_s is None else f"?start_s={start_s}&end_s={end_s}"
    return f"/v1/{route}/{hit['split']}/{hit['source']}/{hit['index']}{asked}"


def test_hits_have_their_times_and_a_video_may_count_once(url: str, root: Path) -> None:
    single = search(url, query="a color", top_k=7)
    assert len(single) == 7
    assert {(hit["start_s"], hit["end_s"]) for hit in single} == {
        (None, None), (0, 2), (2, 4), (4, 6), (6, 8), (8, 10)
    }  # fmt: skip
    offline = rzen.load((root / "name").read_text()).search(root / "vectors", "a color", top_k=7)
    assert [(hit.origin, hit.start_s) for hit in offline] == [(hit["origin"], hit["start_s"]) for hit in single]
    grouped = search(url, query="a color", top_k=3, group=True)
    assert [hit["rank"] for hit in grouped] == [1, 2, 3]
    assert {hit["origin"] for hit in grouped} == {"film.mp4", "short.mp4", "photo.png"}
    (film,) = (hit for hit in grouped if hit["origin"] == "film.mp4")
    of_film = [hit for hit in single if hit["origin"] == "film.mp4"]
    assert [film["start_s"], *(moment["start_s"] for moment in film["moments"])] == [hit["start_s"] for hit in of_film]
    assert film["score"] == of_film[0]["score"]
    assert [hit["moments"] for hit in grouped if hit is not film] == [[], []]
    assert len(search(url, query="a color", top_k=1, group=True)) == 1
    late = search(url, query="a color", filters=["start_s>=6"])
    assert {hit["start_s"] for hit in late} == {6, 8}


def test_hits_like_a_hit_are_those_of_its_vector(url: str, root: Path) -> None:
    film = next(hit for hit in search(url, query="a color", filters=["start_s=4"]))
    place = {name: film[name] for name in ("split", "source", "index", "start_s")}
    found = search(url, like=place, top_k=7)
    assert len(found) == 6
    assert all(hit["start_s"] != 4 for hit in found)
    model = rzen.load((root / "name").read_text())
    with Decoder(MEDIA) as decoder:
        (blue,) = decoder.segments((root / "media/film.mp4").read_bytes(), [TimeRange(4, 6)])
    assert isinstance(blue, Visual)
    expected = model.search(root / "vectors", blue.frames, top_k=7)
    assert (expected[0].start_s, expected[0].score) == (4, pytest.approx(1, abs=1e-4))
    assert [(hit["origin"], hit["start_s"]) for hit in found] == [(hit.origin, hit.start_s) for hit in expected[1:]]
    (photo,) = search(url, query="a color", modalities=["image"])
    like_photo = search(url, like={name: photo[name] for name in ("split", "source", "index")}, group=True)
    assert {hit["origin"] for hit in like_photo} == {"film.mp4", "short.mp4"}

    assert search(url, like=place | {"start_s": 5}) == (404, "the corpus does not have the target that like names")
    assert search(url, like=place | {"index": 99})[0] == 404
    for wrong in (
        "film",
        {"split": "train"},
        place | {"index": "0"},
        place | {"start_s": "4"},
        place | {"index": True},
    ):
        assert search(url, like=wrong)[0] == 400
    assert search(url, like=place, query="x") == (400, "query and like are both given; use one of them")
    assert search(url)[0] == 400


@pytest.mark.parametrize("number", range(5))
def test_a_segment_has_its_own_picture_and_clip(url: str, number: int) -> None:
    (film,) = search(url, query="a color", filters=[f"start_s={2 * number}"])
    status, data, headers = get(f"{url}{address(film, 'pictures', 2 * number, 2 * number + 2)}")
    assert (status, headers["Content-Type"]) == (200, "image/webp")
    assert np.abs(np.asarray(Image.open(io.BytesIO(data))).mean((0, 1)) - COLORS[number]).max() < 10
    status, data, headers = get(f"{url}{address(film, 'clips', 2 * number, 2 * number + 2)}")
    assert (status, headers["Content-Type"]) == (200, "video/mp4")
    start_s, end_s = float(headers["x-rzen-start-s"]), float(headers["x-rzen-end-s"])
    assert end_s - start_s == pytest.approx(2, abs=0.002)
    with Decoder(MEDIA) as decoder:
        (shown,) = decoder.segments(data, [TimeRange(start_s, end_s)])
    assert isinstance(shown, Visual)
    assert np.abs(shown.frames.mean((0, 1, 2)) - COLORS[number]).max() < 10


def test_whole_videos_play_and_other_targets_do_not(url: str) -> None:
    (short, *_) = search(url, query="a color", filters=["origin=short.mp4"])
    status, data, headers = get(f"{url}{address(short, 'clips')}")
    assert (status, headers["x-rzen-start-s"], headers["x-rzen-end-s"]) == (200, "0.000", "2.000")
    with Decoder(MEDIA) as decoder:
        assert decoder.video_length(data) == pytest.approx(2)
    (photo,) = search(url, query="a color", modalities=["image"])
    assert get(f"{url}{address(photo, 'clips')}")[0] == 404
    assert get(f"{url}{address(short | {'index': 99}, 'clips')}")[0] == 404
    assert get(f"{url}{address(short | {'split': 'other'}, 'clips')}")[0] == 404
    for wrong in ("start_s=1", "start_s=2&end_s=1", "start_s=-1&end_s=1", "start_s=a&end_s=b", "start_s=0&end_s=inf"):
        assert get(f"{url}{address(short, 'clips')}?{wrong}")[0] == 400
        assert get(f"{url}{address(short, 'pictures')}?{wrong}")[0] == 400
