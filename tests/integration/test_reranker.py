"""A re-ranker from a candidate table to a judge, on a cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from jobs.cli import main
from pipelines.candidates.table import open_table
from pipelines.storage.location import open_store
from rzen.config import PairPromptConfig, RerankObjectiveConfig
from rzen.training.telemetry import metrics_of
from tests.data import publish, publish_candidates
from tests.specs import BACKBONE

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PROMPT = PairPromptConfig(template="lamra", max_visual_tokens=4)


def test_a_reranker_is_trained_and_judges(ray_cluster: None, tmp_path: Path) -> None:
    stored = open_store(str(tmp_path / "data"))
    manifest = publish(stored, {"red": ("text_image", 24)}, bad={"red": [7]})
    publish(stored, {"red": ("text_image", 13)}, split="held_out")
    candidates = {"red": {n: [(n + 1 + some) % 24 for some in range(1 + n % 5)] for n in range(24)}}
    publish_candidates(open_store(str(tmp_path / "table")), stored, manifest, candidates)
    train = {
        "kind": "train",
        "name": "reranker",
        "run": {"root": str(tmp_path / "runs")},
        "data": {"root": str(tmp_path / "data"), "candidates": str(tmp_path / "table"), "negatives_per_sample": 4},
        "feed": {"samples_per_task": 16, "cpus_per_task": 0.5},
        "model": {"backbone": BACKBONE, "lora": {"rank": 2}, "dtype": "float32", "gradient_checkpointing": False},
        "objective": {"kind": "rerank", "prompt": PROMPT.model_dump()},
        "global_batch": 4,
        "steps": 4,
        "checkpoint": {"every_steps": 2},
        "cluster": {"workers": 2, "cpus_per_worker": 0.5, "chunk_tokens": "auto", "memory_gib": 1},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(train))
    assert main(["run", str(tmp_path / "train.yaml")]) == 0
    run = tmp_path / "runs" / "reranker"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    objective = RerankObjectiveConfig(kind="rerank")
    assert all(set(row) == {"step", "source", "task", *metrics_of(objective)} for row in rows)
    scores = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    assert [score["step"] for score in scores] == [0, 2, 4]
    assert scores[0]["sources"]["red"]["candidates"] == 8
    assert "Mean probability of yes" in (run / "index.html").read_text()
    judge = {
        "kind": "judge",
        "table": str(tmp_path / "table"),
        "data": {"root": str(tmp_path / "data")},
        "model": {"base": str(run / "backbone"), "adapter": str(run / "adapter")},
        "out": str(tmp_path / "judged"),
        "cpus_per_actor": 0.5,
        "gpus_per_actor": 0,
    }
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump(judge))
    assert main(["run", str(tmp_path / "judge.yaml")]) == 0
    judged = open_table(str(tmp_path / "judged"), None).manifest
    assert judged.stage == "judge"
    assert judged.settings["judge"]["prompt"] == PROMPT.model_dump()
