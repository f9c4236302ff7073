"""The job that opens an export in sentence-transformers: what it compares, and that a wrong export fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.cli import main
from rzen.config import ModelIdentity, PromptConfig
from rzen.export.export import ExportOptions, export_model
from rzen.export.opening import has_torchvision
from tests.tiny import tiny_checkpoint
from tests.vectors import publish_mixed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an exported `model` and a dataset of pictures, pages, clips and texts."""
    identity = ModelIdentity(prompt=PromptConfig(max_visual_tokens=16))
    options = ExportOptions(dtype="float32", frames=4)
    export_model(tiny_checkpoint(tmp_path / "base"), None, tmp_path / "model", identity, options)
    publish_mixed(tmp_path / "data", 2)
    return tmp_path


def check(folder: Path) -> int:
    data = f"data={{root: {folder}/data, media: {{frames: 4}}}}"
    sets = [f"model={folder}/model", data, "num_samples=8", f"out={folder}/check"]
    return main(["run", "jobs/check.yaml", *(word for change in sets for word in ("--set", change))])


def test_each_kind_of_input_is_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(folder) == 0
    out = capsys.readouterr().out
    for kind, count in {"image": 2, "page": 2, "text": 8 + 2}.items():
        assert f"  {kind}: {count} inputs differ by at most" in out
    assert json.loads((folder / "check/comparison.json").read_text()).keys() == {"image", "page", "text"}
    assert ("2 videos are left out" in out) != has_torchvision()


def test_an_export_that_other_libraries_read_differently_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "model/1_Pooling/config.json"
    pooling = json.loads(path.read_text())
    path.write_text(json.dumps(pooling | {"pooling_mode_lasttoken": False, "pooling_mode_mean_tokens": True}))
    assert check(folder) == 1
    assert "model: sentence-transformers gives vectors of " in capsys.readouterr().err
