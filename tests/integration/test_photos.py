"""A folder without captions: searched with a model that exists, and refused by training with the line to write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cli import main
from tests.paths import ROOT
from tests.tiny import tiny_export
from tests.vectors import clip, document, picture

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
NAME = 'my "odd" photos: #1'


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Working folder in which the jobs of jobs/photos.yaml have run on `NAME`."""
    folder = tmp_path_factory.mktemp("photos")
    files = {"1 [final].png": picture(1), "2024/日没.png": picture(2), "clip.mp4": clip(1), "scan.pdf": document(1)}
    files |= {"cut.png": picture(3)[:200], "empty.jpg": b"", "IMG_1.heic": b"x", "same.png": picture(1)}
    for name, data in files.items():
        path = folder / NAME / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    tiny_export(folder)
    before = Path.cwd()
    os.chdir(folder)
    assert run("photos", folder, f"vars.model={folder}/model", "jobs.embed.set.cpus_per_actor=0.5") == 0
    yield folder
    os.chdir(before)


def run(name: str, folder: Path, *changes: str) -> int:
    """Run a spec with absolute outputs, because Ray's workers were started in another folder."""
    out = folder / "runs" / name
    every = [f"vars.media={json.dumps(NAME)}", f"vars.out={out}", f"vars.store={out}/store", *changes]
    return main(["run", str(ROOT / f"jobs/{name}.yaml"), *(word for change in every for word in ("--set", change))])


def test_every_medium_that_can_be_decoded_is_found(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((searched / "runs/photos/store/data/report.json").read_text())
    assert report["accepted"]["uncaptioned"] == {"text_image": 3, "text_page": 1, "text_video": 1}
    assert report["rejected"] == {"empty_file": 1, "unsupported_format": 1, "corrupt_image": 1}
    for query in ("2024/日没.png", "clip.mp4", "scan.pdf"):
        assert main(["search", f"{NAME}/{query}", "--set", "html=null"]) == 0
        first = capsys.readouterr().out.split(" 1.000 ")[1].splitlines()[0]
        assert query in first
    assert main(["search", "two dogs on a beach", "--html", "hits.html"]) == 0
    # One of two equal files is shown.
    assert capsys.readouterr().out.count(".png") == 2
    assert (searched / "hits.html").read_text().count("data:image/webp") == 8 + 3  # the clip has 8 frames


def test_training_names_the_file_and_the_line(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("folder", searched) == 1
    told = capsys.readouterr()
    out = " ".join(told.out.split())
    assert (
        f"5 media and pages without a caption can be searched, but not trained on. To train on them, write {searched}"
        in out
    )
    assert '{"file": "1 [final].png", "caption": "what it shows"}' in out
    assert "runs/folder/store/data/train: has no pair to train on; caption the raw files" in told.err
