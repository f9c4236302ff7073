from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.spec.load import check, override, read_document
from jobs.sweeps.finetunes import resolve
from jobs.sweeps.specs import FinetunesSpec
from pipelines.errors import UserError

STAGE = """\
kind: train
name: stage
data: {root: runs/data}
model: {backbone: {vocabulary: 400}}
optim: {lr: 1e-3}
"""
JOB = """\
kind: finetunes
stage: stage.yaml
set: {global_batch: 4}
runs:
  images: {data: {mixture: {weights: {a: 1}}}}
  documents: {data: {mixture: {weights: {b: 1}}}}
grid:
  seed: [0, 1]
  optim.lr: [1e-4, 0.5]
out: runs/soups
"""


def job(folder: Path, *changes: str) -> tuple[FinetunesSpec, Any]:
    (folder / "stage.yaml").write_text(STAGE)
    (folder / "job.yaml").write_text(JOB)
    document = override(read_document(folder / "job.yaml"), changes)
    spec = check(document)
    assert isinstance(spec, FinetunesSpec)
    return spec, document


def test_grid_makes_every_combination_of_every_run(tmp_path: Path) -> None:
    specs = resolve(*job(tmp_path))
    assert list(specs) == [
        "images-seed-0-lr-0_0001",
        "images-seed-0-lr-0_5",
        "images-seed-1-lr-0_0001",
        "images-seed-1-lr-0_5",
        "documents-seed-0-lr-0_0001",
        "documents-seed-0-lr-0_5",
        "documents-seed-1-lr-0_0001",
        "documents-seed-1-lr-0_5",
    ]
    last = specs["documents-seed-1-lr-0_5"]
    assert (last.name, last.seed, last.optim.lr, last.global_batch) == ("documents-seed-1-lr-0_5", 1, 0.5, 4)
    assert last.data.mixture.weights == {"b": 1.0}


def test_grid_alone_and_runs_alone_are_jobs_too(tmp_path: Path) -> None:
    assert list(resolve(*job(tmp_path, "runs={images: null, documents: null}"))) == [
        "seed-0-lr-0_0001",
        "seed-0-lr-0_5",
        "seed-1-lr-0_0001",
        "seed-1-lr-0_5",
    ]
    spec, document = job(tmp_path)
    alone = spec.model_copy(update={"grid": {}})
    assert list(resolve(alone, document)) == ["images", "documents"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("grid.seed=[1, 1]", "two runs of the grid have the name 'images-seed-1-lr-0_0001'"),
        ("min_survivors=9", "min_survivors=9 is more than the 8 runs"),
        ("soups={uniform: null}", "soups"),
        (
            "soups.uniform={method: mean, weights: {nobody: 1}}",
            "soups.uniform.weights names 'nobody', which is none of",
        ),
        ("soups.best={method: greedy}", "soups.best: method=greedy chooses by scores; set evaluate"),
        ("soups.best={method: ties, density: 2}", "density"),
    ],
)
def test_jobs_that_cannot_work_are_refused(tmp_path: Path, change: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        job(tmp_path, change)
    assert problem in str(caught.value)


def test_a_mistake_in_the_grid_is_told_with_its_place(tmp_path: Path) -> None:
    spec, document = job(tmp_path, "grid={seed: [0], optim.lr: [-1]}")
    with pytest.raises(UserError, match=r"--set grid=.*optim.lr=-1: input should be greater than 0"):
        resolve(spec, document)


def test_runs_that_make_adapters_and_runs_that_make_models_do_not_mix(tmp_path: Path) -> None:
    spec, document = job(tmp_path, "runs.images.model={tune: full}")
    with pytest.raises(UserError, match=r"train full and lora; give all one model.tune"):
        resolve(spec, document)
