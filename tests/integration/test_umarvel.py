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
from tests.paths import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]
STAGES = ["nli", "pairs", "instruct", "hard", "distil"]
SMALL = {
    "jobs.corpus.set.corpus": "{num_images: 60, num_composed: 0, num_documents: 0, num_clips: 0, num_texts: 60}",
    "jobs.ingest.set.held_out_fraction": "0.2",
} | {
    f"jobs.{name}.set.{key}": value
    for name in (*STAGES, "reranker")
    for key, value in (("steps", "3"), ("global_batch", "8"), ("checkpoint.every_steps", "3"))
}


def test_the_pipeline_runs_and_every_stage_is_compared(tmp_path: Path, ray_cluster: None) -> None:
    changes = SMALL | {"vars.out": str(tmp_path), "vars.store": str(tmp_path / "store")}
    command = [
        "run",
        str(ROOT / "jobs/umarvel_demo.yaml"),
        *(w for k, v in changes.items() for w in ("--set", f"{k}={v}")),
    ]
    assert main(command) == 0
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
