"""The pipeline of U-MARVEL on a corpus of seconds: every job runs, and each stage is scored against the one before."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.training.runs import METRICS, read_rows
from pipelines.candidates.table import open_table
from pipelines.storage.location import open_store
from tests.umarvel import STAGES, options

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]


def test_the_pipeline_runs_and_every_stage_is_compared(tmp_path: Path, ray_cluster: None) -> None:
    assert main(["run", *options(tmp_path, steps=3, checkpoint_steps=3)]) == 0
    for stage in STAGES:
        rows = json.loads((tmp_path / f"scores_{stage}/results.json").read_text())["rows"]
        assert {row["model"] for row in rows} >= {"before", stage}
        assert {row["pool"] for row in rows} >= {"task", "mixed"}  # local and global
        assert all(0 <= row["value"] <= 1 for row in rows)
    teacher = open_table(str(tmp_path / "store/teacher"), None)
    assert teacher.manifest.stage == "select"
    assert "judge" in teacher.manifest.made_from
    rows = read_rows(open_store(str(tmp_path / "store/runs/distil")), METRICS)
    assert len(rows) == 3
    assert all(math.isfinite(row["loss"]) and row["loss"] > 0 for row in rows)
    adapters = [stage for stage in STAGES if (tmp_path / f"store/runs/{stage}/adapter").is_dir()]
    assert adapters == ["instruct", "hard", "distil"]
