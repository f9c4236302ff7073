"""`rzen plan`: figures, files that are missing, and mistakes, without Ray."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jobs.cli import main
from jobs.spec.load import check, override, read_document
from jobs.training import launch
from jobs.training.memory import chunk_of
from jobs.training.runs import METRICS, Run, to_lines
from jobs.training.specs import TrainSpec
from jobs.training.start import plan_of
from pipelines.candidates.types import CandidateManifest, PlanRows, TableData
from pipelines.candidates.write import publish_table
from pipelines.feed.reader import Reader
from pipelines.shards.manifest import Manifest, publish_manifest, read_manifest
from pipelines.storage.location import open_store
from rzen.training.chunk_size import AutoChunk
from tests.benchmarks import synthetic
from tests.data import publish
from tests.paths import ROOT
from tests.specs import evaluate, stage


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a dataset of 24 + 8 samples and a spec of a run on it."""
    monkeypatch.chdir(tmp_path)
    publish(open_store("data"), {"images": ("text_image", 24), "few": ("text_page", 8)})
    Path("stage.yaml").write_text(stage("."))
    return tmp_path


def planned(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict[str, Any]:
    """Return what `rzen plan --json` prints."""
    capsys.readouterr()
    assert main(["plan", *arguments, "--json"]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_steps_epochs_memory_and_hours(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rate = ("--samples-per-s", "0.01")
    (run,) = planned(capsys, "stage.yaml", "--set", "epochs=2", "--set", "cluster.workers=2", *rate)["runs"]
    assert (run["steps"], run["samples"]) == (16, 64)  # (6 + 2) batches of 4, twice
    assert run["sources"] == {
        "few": {"samples": 8, "steps": 4, "epochs": 2.0},
        "images": {"samples": 24, "steps": 12, "epochs": 2.0},
    }
    assert run["hours"] == pytest.approx(64 / 0.01 / 3600)
    parts = run["memory_bytes"]
    assert parts["total"] == sum(parts.values()) - parts["total"] - min(
        parts["activations"] + parts["loss"], parts["update"]
    )
    assert parts["gradients"] % 4 == 0 < parts["weights"] < parts["total"]
    assert run["largest_input_tokens"] == 64 + 64  # the prompt, and a text in steps of 64
    assert main(["plan", "stage.yaml", "--set", "epochs=2", *rate]) == 0
    out = capsys.readouterr().out
    assert "stage: 16 steps of 4 pairs (1 worker), 64 samples" in out
    assert "images         24 samples        12 steps    2.00 epochs" in out
    assert "1.8 hours of steps" in out


def test_more_workers_have_less_each(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def parts(*changes: str) -> dict[str, int]:
        words = [word for change in changes for word in ("--set", change)]
        found: dict[str, int] = planned(capsys, "stage.yaml", *words)["runs"][0]["memory_bytes"]
        return found

    one, two = parts(), parts("cluster.workers=2")
    assert two["optimizer"] == pytest.approx(one["optimizer"] / 2, rel=0.01)
    assert two["activations"] < 0.6 * one["activations"]
    assert parts("cluster.chunk_tokens=140")["activations"] < 0.4 * one["activations"]
    assert parts("model.tune=full")["optimizer"] > 4 * one["optimizer"]


def test_a_finished_run_gives_the_rate(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = check(read_document("stage.yaml"))
    assert isinstance(spec, TrainSpec)
    run = Run(spec)
    run.begin({})
    rates = [1.0, 1.0, 1.0, 4.0, 5.0, 9.0]  # the first steps are slower
    run.store.write(METRICS, to_lines({"step": step, "samples_per_s": rate} for step, rate in enumerate(rates)))
    words = ("stage.yaml", "--like", "runs/stage", "--set", "name=other", "--set", "cluster.workers=2")
    (found,) = planned(capsys, *words)["runs"]
    assert found["hours"] == pytest.approx(32 / (2 * 5.0) / 3600)  # two workers instead of one
    assert main(["plan", "stage.yaml", "--like", "runs"]) == 1
    assert "error: runs: is not the folder of a run" in capsys.readouterr().err
    assert main(["plan", "stage.yaml", "--like", "runs/stage", "--samples-per-s", "2"]) == 1
    assert "contradicts --samples-per-s" in capsys.readouterr().err


MISTAKES = {
    "data.root=nowhere": "nowhere/train/manifest.json: there is no such manifest",
    "data.mixture.weights={pictures: 1}": "data.mixture.weights: unknown source 'pictures'; the data has few, images",
    "global_batch=12": "global_batch: source 'few' has 8 samples, fewer than one batch of 12",
    "model.backbone=nowhere": "nowhere: is neither a directory nor a hub name",
    "model.backbone=empty": "empty: has no config.json",
    "init_adapter=nowhere": "init_adapter nowhere: does not exist; run stage 1 first",
    "objective.matryoshka=[16]": "objective.matryoshka: 16 is not below 16, the width of the model's vectors",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_a_mistake_is_reported_before_anything_starts(
    change: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    assert main(["plan", "stage.yaml", "--set", change]) == 1
    err = capsys.readouterr().err
    assert MISTAKES[change] in err


def test_a_source_that_drops_make_too_small_is_reported_before_ray_starts(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_launch", None)  # which starts Ray
    fingerprint = read_manifest(open_store("data"), "train").sources["few"].fingerprint
    table = CandidateManifest("curate", TableData("data", "train", {"few": fingerprint}))
    publish_table(open_store("drops"), table, {"few": PlanRows.of(np.arange(8) >= 5, np.full(8, -1))})
    lost = "error: global_batch: source 'few' has 3 samples of 8 (tables drop 5), fewer than one batch of 4; lower"
    for command in ("plan", "run"):
        assert main([command, "stage.yaml", "--set", "data.curation=[drops]"]) == 1
        assert lost in capsys.readouterr().err
    assert main(["plan", "stage.yaml", "--set", "data.curation=[drops]", "--set", "global_batch=2"]) == 0
    assert re.search(r"few +3 samples", capsys.readouterr().out)


def test_all_mistakes_are_reported_at_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ("data.root=nowhere", "model.backbone=empty", "init_adapter=nowhere")
    found = planned(capsys, "stage.yaml", *(word for change in changes for word in ("--set", change)), status=1)
    assert len(found["runs"][0]["mistakes"]) == 3
    found = planned(capsys, "stage.yaml", "--memory-gib", "0.0001", status=1)
    assert "more than 0.0 GiB; lower cluster.chunk_tokens" in found["runs"][0]["mistakes"][0]


def test_a_run_of_other_settings_is_a_mistake(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = check(read_document("stage.yaml"))
    assert isinstance(spec, TrainSpec)
    Run(spec).begin({})
    found = planned(capsys, "stage.yaml", status=1)
    assert "holds a run with other settings" in found["runs"][0]["mistakes"][0]


def test_an_empty_split_and_missing_models_are_mistakes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish_manifest(open_store("empty"), Manifest("train", {}))
    reranker = {"rerank": {"model": {"base": "no/reranker/here", "dtype": "float32"}, "tune": {"root": "empty_too"}}}
    publish_manifest(open_store("empty_too"), Manifest("train", {}))
    Path("evaluate.yaml").write_text(evaluate("empty") + yaml.safe_dump(reranker))
    found = planned(capsys, "evaluate.yaml", status=1)
    assert found["mistakes"] == [
        "evaluate: models nowhere: does not exist; check the path, or run the job that makes it",
        "evaluate: rerank.model no/reranker/here: does not exist; check the path, or run the job that makes it",
        "evaluate: empty_too train: has no samples; ingest with held_out_fraction above 0, or name another split",
        "evaluate: empty train: has no samples; ingest with held_out_fraction above 0, or name another split",
    ]


def test_jobs_of_a_pipeline_read_what_earlier_ones_make(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later = {"name": "later", "init_adapter": "./runs/stage/adapter", "model": {"backbone": "./runs/stage/backbone"}}
    pipeline = {
        "kind": "pipeline",
        "name": "both",
        "state": "state",
        "jobs": {
            "first": {"spec": "stage.yaml"},
            "second": {"spec": "stage.yaml", "set": later},
            "third": {"spec": "evaluate.yaml", "set": {"models": {"not_ours": {"base": "./runs/stage/backbone"}}}},
        },
    }
    Path("evaluate.yaml").write_text(evaluate("data"))
    Path("pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    found = planned(capsys, "pipeline.yaml", "--samples-per-s", "1")
    assert [run["name"] for run in found["runs"]] == ["stage", "later"]
    assert found["hours"] == pytest.approx(2 * 32 / 3600)
    first, second = found["runs"]
    assert second["to_come"] == {key: later.get(key) or "./runs/stage/backbone" for key in second["to_come"]}
    assert set(second["to_come"]) == {"init_adapter", "model.backbone"}
    assert second["memory_bytes"] == first["memory_bytes"]  # the backbone is that of the first job
    assert found["to_come"] == ["./runs/stage/backbone"]
    pipeline["jobs"] = {"second": pipeline["jobs"]["second"]}  # type: ignore[index]
    Path("pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    assert len(planned(capsys, "pipeline.yaml", status=1)["runs"][0]["mistakes"]) == 2


def test_the_largest_chunk_that_fits_is_planned(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    auto = ("stage.yaml", "--set", "cluster.chunk_tokens=auto")
    (one,) = planned(capsys, *auto)["runs"]
    assert one["chunk_tokens"] == 128  # no limit is known: one input at a time, the least
    limit = one["memory_bytes"]["total"] * 2.5 / 0.9 / 2**30
    (fitted,) = planned(capsys, *auto, "--set", f"cluster.memory_gib={limit}")["runs"]
    assert fitted["chunk_tokens"] % 128 == 0 < 128 < fitted["chunk_tokens"]
    assert one["memory_bytes"]["total"] < fitted["memory_bytes"]["total"] <= 0.9 * limit * 2**30


def test_a_chunk_that_was_found_is_taken_again(root: Path) -> None:
    auto = override(read_document("stage.yaml"), ["cluster.chunk_tokens=auto", "cluster.memory_gib=2"])
    spec = check(auto)
    assert isinstance(spec, TrainSpec)
    run, plan = Run(spec), plan_of(spec, Reader(spec.data))
    run.begin({})
    first = chunk_of(run, plan)
    assert isinstance(first, AutoChunk)
    assert (first.memory_bytes, first.longest) == (2 << 30, 128)
    assert [share.pairs for share in first.shares] == [4]
    run.record_chunk(256)
    assert chunk_of(run, plan) == 256
    other = check(override(auto, ["cluster.chunk_tokens=512"]))
    assert isinstance(other, TrainSpec)
    assert chunk_of(Run(other), plan) == 512  # who names a size gets it
    anew = check(override(auto, ["run.overwrite=true", "seed=5"]))
    assert isinstance(anew, TrainSpec)
    Run(anew).begin({})
    assert isinstance(chunk_of(Run(anew), plan), AutoChunk)


@pytest.mark.parametrize(("name", "rate"), [("stage2_1gpu", 7), ("stage2_8gpu", 56)])
def test_comments_of_shipped_specs_say_what_the_planner_says(
    name: str, rate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    publish(open_store("runs/data"), {"images": ("text_image", 768)})
    backbone = Path("Qwen/Qwen2-VL-2B-Instruct")
    backbone.mkdir(parents=True)
    synthetic.SHAPES["2b"].config.save_pretrained(backbone)
    (backbone / "model.safetensors").touch()
    spec = ROOT / "jobs" / f"{name}.yaml"
    (run,) = planned(capsys, str(spec), "--set", "init_adapter=null", "--samples-per-s", str(rate))["runs"]
    text = spec.read_text()
    said = re.findall(r"^#  +(?:memory of a )?(\w+) +([0-9.]+) GiB", text, re.MULTILINE)
    found = {
        ("worker" if part == "total" else part): f"{size / 2**30:.2f}" for part, size in run["memory_bytes"].items()
    }
    assert dict(said) == {part: found[part] for part, _ in said}
    assert len(said) == 7
    whole = run["chunk_tokens"] // run["largest_input_tokens"]
    assert f"of a chunk: {whole} images of 1,280 tokens" in text
    assert f"{run['global_batch'] // run['workers']} pairs each" in text
    steps = 100_000 // 768
    hours = run["hours"] * steps / run["steps"]
    length = f"100,000 samples are {steps} steps of 768. At {rate} samples/s, which is our estimate"
    assert f"{length}, they take {hours:.1f} hours" in text


def test_planning_imports_no_ray(root: Path) -> None:
    program = "import sys; from jobs.cli import main; main(['plan', 'stage.yaml']); assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})
