"""Every kind of job, given a place that holds files of others: one error that names them, and they stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.cli import main
from jobs.spec.kinds import kind_names
from pipelines.storage.location import open_store
from tests.data import publish
from tests.specs import evaluate, stage

OTHERS = {"thesis.docx": b"mine", "results.json": b"mine", "config.json": b"mine", "train/a.tar": b"mine"}
PLACE = "place"
SPECS = {
    "corpus": "kind: corpus\nout: {0}/place\n",
    "ingest": "kind: ingest\ninput: {0}/photos\nout: {0}/place\n",
    "index": "kind: index\nsources: {{s: {{urls: [{0}/data/train/red], task: t, query: {{text: txt}}, "
    "positive: {{media: jpg}}}}}}\nout: {0}/place\n",
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
    "embed": "kind: embed\nmodel: {0}/b\ndata: {{root: {0}/data}}\nout: {0}/place\n",
    "search": "kind: search\nvectors: {0}/vectors\nqueries: [red]\nhtml: {0}/place/thesis.docx\n",
    "pipeline": "kind: pipeline\nname: p\nstate: {0}/place\njobs: {{one: {{spec: corpus.yaml}}}}\n",
}


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_kind_is_tried() -> None:
    assert SPECS.keys() == kind_names().keys()


@pytest.mark.parametrize("kind", SPECS)
def test_files_of_others_are_refused_and_stay(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, data in OTHERS.items():
        (tmp_path / PLACE / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / PLACE / path).write_bytes(data)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"a")
    publish(open_store(str(tmp_path / "data")), {"red": ("text_image", 16)})
    (tmp_path / "stage.yaml").write_text(stage(str(tmp_path), steps=2))
    (tmp_path / "evaluate.yaml").write_text(evaluate(f"{tmp_path}/data"))
    (tmp_path / "corpus.yaml").write_text(f"kind: corpus\nout: {tmp_path}/corpus\n")
    (tmp_path / "job.yaml").write_text(SPECS[kind].format(tmp_path))

    assert main(["run", str(tmp_path / "job.yaml")]) == 1
    told = capsys.readouterr().err
    assert "that rzen did not write" in told, told
    assert any(Path(path).name in told for path in OTHERS), told
    assert content(tmp_path / PLACE) == OTHERS
