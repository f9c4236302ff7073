"""`rzen embed` of folders and tables without captions, without Ray: what is found, with conditions and in versions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import rzen
from jobs.cli import main
from tests.inline import without_ray
from tests.tiny import tiny_export
from tests.vectors import document, picture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_export(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)


def test_a_folder_without_captions_is_embedded_indexed_and_searched_with_conditions(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, vectors = tmp_path / "photos", str(tmp_path / "vectors")
    photos.mkdir()
    for number in range(8):
        (photos / f"{number}.png").write_bytes(picture(number))
    (photos / "scan.pdf").write_bytes(document(1))
    (photos / "notes.md").write_text("A first passage\nof two lines.\n\nA second one.\n")
    (photos / "cut.png").write_bytes(picture(1)[:90])
    options = ["--index", "lance", "--json"]
    command = ["embed", model, str(photos), vectors, *options]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["vectors"], first["embedded"], first["index"]) == (11, 11, "lance")
    assert first["unusable"] == {"corrupt_image": 1}

    search = ["search", str(photos / "3.png"), "--vectors", vectors, "--json"]
    assert main([*search, "--filter", "modality=image,page"]) == 0
    hits = json.loads(capsys.readouterr().out)["searches"][0]["hits"]
    assert (hits[0]["origin"], len(hits)) == ("3.png", 9)
    assert hits[0]["score"] == pytest.approx(1, abs=1e-5)
    assert {hit["modality"] for hit in hits} == {"image", "page"}
    assert main([*search, "--filter", "origin!=3.png", "--modality", "image"]) == 0
    assert len(json.loads(capsys.readouterr().out)["searches"][0]["hits"]) == 7
    texts = rzen.load(model).search(vectors, "a passage", modalities=["text"])
    assert {(hit.origin, hit.title) for hit in texts} == {
        ("notes.md:1", "A first passage\nof two lines."),
        ("notes.md:4", "A second one."),
    }

    (photos / "8.png").write_bytes(picture(8))
    (photos / "0.png").unlink()
    assert main(command) == 0
    second = json.loads(capsys.readouterr().out)
    assert (second["vectors"], second["embedded"]) == (11, 1)
    origins = {hit.origin for hit in rzen.load(model).search(vectors, "x", filters={"modality": "image"}, top_k=99)}
    assert origins == {f"{number}.png" for number in range(1, 9)}
    before = rzen.load(model).search(vectors, "x", filters=["modality=image"], top_k=99, version=first["version"])
    assert {hit.origin for hit in before} == {f"{number}.png" for number in range(8)}


def test_a_table_of_paths_needs_no_query(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "products.csv").write_text("photo,name\n" + "".join(f"{n}.png,thing {n}\n" for n in range(4)))
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    options = ["--media", "photo", "--json"]
    for folder, more, title in (("bare", [], ""), ("titled", ["--title", "name"], "thing 2")):
        assert main(["embed", model, str(tmp_path / "products.csv"), str(tmp_path / folder), *options, *more]) == 0
        assert json.loads(capsys.readouterr().out)["vectors"] == 4
        (best,) = rzen.load(model).search(tmp_path / folder, tmp_path / "2.png", top_k=1)
        assert (best.title, best.source, round(best.score, 4)) == (title, "products", 1.0)
