"""Runs that train a re-ranker, before Ray starts: what is refused, what is planned, and what their page shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli import main
from jobs.spec.load import Document
from jobs.sweeps.finetunes import check_train
from jobs.training.page import RunPage
from jobs.training.runs import METRICS, Run, to_lines
from jobs.training.specs import TrainSpec
from jobs.training.start import check_lists, plan_of
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.samples import Sample
from pipelines.shards.duplicates import with_duplicates
from pipelines.shards.manifest import Manifest, SourceInfo, publish_manifest
from pipelines.storage.location import open_store
from rzen.training.telemetry import metrics_of
from tests.data import make_sample, publish, publish_candidates, store_shard
from tests.specs import BACKBONE

NUM_SAMPLES = 8


def spec_of(root: Path, **changes: Any) -> TrainSpec:
    return TrainSpec.model_validate(fields_of(root, **changes))


def fields_of(root: Path, loss: str = "bce", **data: Any) -> dict[str, Any]:
    return {
        "kind": "train",
        "name": "reranker",
        "run": {"root": str(root / "runs")},
        "data": {"root": str(root / "data"), "negatives_per_sample": 3, **data},
        "model": {"backbone": BACKBONE, "dtype": "float32"},
        "objective": {"kind": "rerank", "loss": loss, "prompt": {"max_visual_tokens": 4}},
        "global_batch": 4,
        "steps": 2,
    }


def publish_as(root: Path, change: Callable[[Sample], Sample]) -> Manifest:
    """A source whose samples are changed."""
    store = open_store(str(root / "data"))
    store.ensure_bucket()
    made = [make_sample("red", "a", number, bad=False) for number in range(NUM_SAMPLES)]
    shard = store_shard(store, "train", "red", 0, [(change(sample), members) for sample, members in made])
    manifest = with_duplicates(store, Manifest("train", {"red": SourceInfo("a", NUM_SAMPLES, (shard,))}))
    publish_manifest(store, manifest)
    return manifest


def check(spec: TrainSpec) -> None:
    reader = Reader(spec.data)
    check_lists(spec, reader, plan_of(spec, reader))


def test_a_source_without_negatives_is_refused(tmp_path: Path) -> None:
    manifest = publish_as(tmp_path, lambda sample: replace(sample, negatives=()))
    with pytest.raises(UserError, match=r"source red: has no negatives: none in its first 8 samples, and no candidate"):
        check(spec_of(tmp_path))
    stored = open_store(str(tmp_path / "data"))
    publish_candidates(open_store(str(tmp_path / "table")), stored, manifest, {"red": {0: [1]}})
    check(spec_of(tmp_path, candidates=str(tmp_path / "table")))


def test_negatives_of_the_samples_are_enough(tmp_path: Path) -> None:
    publish(open_store(str(tmp_path / "data")), {"red": ("a", NUM_SAMPLES)})
    check(spec_of(tmp_path))


def test_graded_pairs_are_refused(tmp_path: Path) -> None:
    publish_as(tmp_path, lambda sample: replace(sample, relevance=float(sample.key)))
    with pytest.raises(UserError, match=r"source red: has graded pairs, .*; leave it out of data\.mixture\.weights"):
        check(spec_of(tmp_path))


def planned(root: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any]) -> Any:
    path = root / "spec.yaml"
    path.write_text(yaml.safe_dump(fields))
    status = main(["plan", str(path), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_plan_counts_pairs_and_undivided_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(open_store(str(tmp_path / "data")), {"red": ("a", NUM_SAMPLES)})
    found = {}
    for loss in ("bce", "listwise"):
        status, plan = planned(tmp_path, capsys, fields_of(tmp_path, loss))
        (found[loss],) = plan["runs"]
        assert (status, found[loss]["mistakes"], found[loss]["steps"]) == (0, [], 2)
        assert found[loss]["memory_bytes"]["activations"] > 0
    pair, whole = (found[loss]["largest_input_tokens"] for loss in ("bce", "listwise"))
    assert whole == 4 * pair  # the positive and three negatives
    publish_as(tmp_path, lambda sample: replace(sample, negatives=()))
    status, plan = planned(tmp_path, capsys, fields_of(tmp_path))
    assert status == 1
    assert "has no negatives" in plan["runs"][0]["mistakes"][0]


def test_sweeps_of_embedders_refuse_a_reranker(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"objective.kind=rerank trains no embedder, and this job compares embedders"):
        check_train(Document(fields_of(tmp_path), "stage.yaml", tmp_path))


def test_the_page_shows_the_metrics_of_a_reranker(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    publish(open_store(str(tmp_path / "data")), {"red": ("a", NUM_SAMPLES)})
    run = Run(spec)
    run.begin({"sources": []})
    values = dict.fromkeys(metrics_of(spec.objective), 0.5)
    rows = [{"step": step, "source": "red", "task": "a", **values, "skipped": 0} for step in range(2)]
    run.store.write(METRICS, to_lines(rows))
    RunPage(run, ["red"], None).write()
    page = run.store.read("index.html").decode()
    assert "Mean probability of yes" in page
    assert "Temperature of each task" not in page
    assert "jobs/reranker.yaml" in page
