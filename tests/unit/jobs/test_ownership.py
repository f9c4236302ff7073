"""Every kind of job, given a place of others or of another process: one error that says so, and all stays."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.runtime import inputs
from jobs.runtime.lease import Lease, hold_output
from jobs.spec.kinds import find_kind, kind_names
from pipelines.errors import UserError
from pipelines.storage.location import open_store
from pipelines.storage.publish import claim
from tests.data import publish
from tests.specs import evaluate, stage

OTHERS = {"thesis.docx": b"mine", "results.json": b"mine", "config.json": b"mine", "train/a.tar": b"mine"}
PLACE = "place"
SPECS = {
    "corpus": "kind: corpus\nout: {0}/place\n",
    "ingest": "kind: ingest\ninput: {0}/photos\nout: {0}/place\n",
    "index": "kind: index\nsources: {{s: {{urls: [{0}/data/train/red], task: t, query: {{text: txt}}, "
    "positive: {{media: jpg}}}}}}\nout: {0}/place\n",
    "export_data": "kind: export_data\ndata: {0}/data\nformat: webdataset\nout: {0}/place\n",
    "curate": "kind: curate\ndata: {{root: {0}/data}}\ncache: {0}/cache\nout: {0}/place\n",
    "train": "kind: train\nname: place\nbase: stage.yaml\nrun: {{root: {0}, overwrite: true}}\n",
    "finetunes": "kind: finetunes\nstage: stage.yaml\nruns: {{a: {{}}, b: {{seed: 1}}}}\n"
    "soups: {{uniform: {{method: mean}}}}\nout: {0}/place\n",
    "soup": "kind: soup\nmodels: {{a: {{base: {0}/b, adapter: {0}/a}}, b: {{base: {0}/b, adapter: {0}/c}}}}\n"
    "soups: {{uniform: {{method: mean}}}}\nout: {0}/place\n",
    "ablation": "kind: ablation\nstage: stage.yaml\nbaseline: one\nvariants:\n  one: {{}}\n"
    "  two: {{optim: {{lr: 0.1}}}}\nseeds: 2\nevaluate: {{spec: evaluate.yaml}}\nout: {0}/place\n",
    "retrain": "kind: retrain\nstage: stage.yaml\nevaluate: {{spec: evaluate.yaml}}\nregistry: {0}/place\n",
    "evaluate": "kind: evaluate\nmodels: {{m: {{base: {0}/b}}}}\ndata: {{root: {0}/data}}\ncache: {0}/cache\n"
    "out: {0}/place\n",
    "export": "kind: export\nmodel: {{base: {0}/b}}\nout: {0}/place\n",
    "emoji": "kind: emoji\nout: {0}/place\n",
    "check": "kind: check\nmodel: {0}/b\ndata: {{root: {0}/data}}\nout: {0}/place\n",
    "embed": "kind: embed\nmodel: {0}/b\ndata: {{root: {0}/data}}\nout: {0}/place\n",
    "mine": "kind: mine\nmodel: {0}/b\ndata: {{root: {0}/data}}\nout: {0}/place\n",
    "cluster": "kind: cluster\ntable: {0}/table\nout: {0}/place\n",
    "select": "kind: select\ntable: {0}/table\nout: {0}/place\n",
    "judge": "kind: judge\ntable: {0}/table\ndata: {{root: {0}/data}}\nmodel: {{base: {0}/b}}\nout: {0}/place\n",
    "search": "kind: search\nvectors: {0}/vectors\nqueries: [red]\nhtml: {0}/place/thesis.docx\n",
    "pipeline": "kind: pipeline\nname: p\nstate: {0}/place\njobs: {{one: {{spec: corpus.yaml}}}}\n",
}


LEASED = {
    "corpus": "corpus",
    "ingest": "dataset",
    "index": "dataset",
    "export_data": "data export",
    "curate": "candidates",
    "train": "run",
    "finetunes": "soups",
    "soup": "soups",
    "ablation": "ablation",
    "retrain": "registry",
    "evaluate": "evaluation",
    "export": "model",
    "emoji": "corpus",
    "check": "check",
    "embed": "vectors",
    "mine": "candidates",
    "select": "candidates",
    "cluster": "candidates",
    "judge": "candidates",
    "pipeline": "pipeline",
}
"""Kinds that hold a lease -> what their output is marked as."""


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_kind_with_an_output_is_tried() -> None:
    assert set(SPECS) == {name for name in kind_names() if find_kind(name).makes}


@pytest.fixture(autouse=True)
def _inputs_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a job reads is checked before its output. These jobs do not get as far as reading all of it."""
    monkeypatch.setattr(inputs, "check_inputs", lambda spec: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the specs read."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json").write_text('{"model_type": "qwen2_vl"}')
    (tmp_path / "b/model.safetensors").touch()
    (tmp_path / "photos/a.jpg").write_bytes(b"a")
    for split in ("train", "held_out"):
        publish(open_store(str(tmp_path / "data")), {"red": ("text_image", 16)}, split=split)
    (tmp_path / "stage.yaml").write_text(stage(str(tmp_path), steps=2))
    (tmp_path / "evaluate.yaml").write_text(evaluate(f"{tmp_path}/data"))
    (tmp_path / "corpus.yaml").write_text(f"kind: corpus\nout: {tmp_path}/corpus\n")
    for kind, spec in SPECS.items():
        (tmp_path / f"job-{kind}.yaml").write_text(spec.format(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kind", SPECS)
def test_files_of_others_are_refused_and_stay(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, data in OTHERS.items():
        (folder / PLACE / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / PLACE / path).write_bytes(data)
    assert main(["run", str(folder / f"job-{kind}.yaml")]) == 1
    told = capsys.readouterr().err
    assert "that rzen did not write" in told, told
    assert any(Path(path).name in told for path in OTHERS), told
    assert content(folder / PLACE) == OTHERS


@pytest.mark.parametrize("kind", LEASED)
def test_a_second_process_on_an_output_is_refused(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(str(folder / PLACE))
    with hold_output(store, LEASED[kind], "works"):
        before = content(folder / PLACE)
        assert main(["run", str(folder / f"job-{kind}.yaml")]) == 1
        assert f"(process {os.getpid()}) works here" in capsys.readouterr().err
        assert content(folder / PLACE) == before


def test_an_output_of_another_kind_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, mark in LEASED.items():
        claim(open_store(str(folder / PLACE)), "something else")
        assert main(["run", str(folder / f"job-{kind}.yaml")]) == 1
        assert f"holds a something else, not a {mark}; name another folder" in capsys.readouterr().err


def test_a_job_of_a_pipeline_cannot_take_the_name_of_the_lease(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = SPECS["pipeline"].replace("one:", "lease:").format(folder)
    (folder / "named.yaml").write_text(spec)
    assert main(["validate", str(folder / "named.yaml")]) == 1
    assert "lease is the name of another file in `state`; rename the job" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["corpus", "emoji", "soup", "evaluate", "ablation"])
def test_a_job_that_has_lost_its_lease_writes_no_result(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process may write there by now. What a job computes is left out here."""
    for module in ("jobs.evaluation.evaluate", "jobs.sweeps.ablation"):
        monkeypatch.setattr(f"{module}.ray_cluster", nullcontext)
    monkeypatch.setattr("jobs.evaluation.evaluate.check_workers", lambda spec: None)
    monkeypatch.setattr("jobs.evaluation.evaluate._bundles", lambda spec, cache: [])
    monkeypatch.setattr("jobs.training.launch.launch", lambda specs, max_parallel, **_: {})
    monkeypatch.setattr("jobs.sweeps.ablation._scored", lambda group, evaluate: dict.fromkeys(group))
    monkeypatch.setattr("jobs.sweeps.ablation.facts", lambda evaluate, elapsed_s: {})
    monkeypatch.setattr("jobs.data.emoji.fetch_package", lambda package: b"")
    monkeypatch.setattr("jobs.data.emoji.read_emoji", lambda *given: ([], []))
    monkeypatch.setattr("jobs.data.emoji.write_emoji", lambda made, *given: (made / "a.jsonl").write_text("{}") and {})
    monkeypatch.setattr("jobs.sweeps.soup.SoupBuilder._key", lambda builder, given: "")
    monkeypatch.setattr("jobs.sweeps.soup.SoupBuilder._make", lambda builder, name, soup: {})

    def lost(lease: Lease) -> None:
        raise UserError("lease.json", "was not renewed in time", "give the command again")

    monkeypatch.setattr(Lease, "check", lost)
    assert main(["run", str(folder / f"job-{kind}.yaml")]) == 1
    assert "lease.json: was not renewed in time" in capsys.readouterr().err
    before = {"rzen-output.json", "registered.json"}  # what a job writes when it has just taken its lease
    assert not {path for path in content(folder / PLACE) if path.endswith((".html", ".json", ".jsonl", ".md"))} - before
