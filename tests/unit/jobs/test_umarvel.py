"""The pipelines of U-MARVEL: every job reads what an earlier one makes, with the published values, and both agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from jobs.evaluation.specs import EvaluateSpec
from jobs.spec.job import JobConfig
from jobs.spec.kinds import find_kind
from jobs.spec.load import check, override, read_document
from jobs.training.specs import TrainSpec
from jobs.workflows.forecast import _outputs
from jobs.workflows.pipeline import resolve_jobs
from jobs.workflows.specs import PipelineSpec
from rzen.config import ObjectiveConfig
from tests.paths import ROOT

PIPELINES = ("umarvel.yaml", "umarvel_demo.yaml")
GIVEN = {
    "umarvel.yaml": ("runs/data/nli", "runs/data/pairs", "runs/data/mbeir", "runs/data/mbeir_tenth", "data/m-beir"),
    "umarvel_demo.yaml": (),
}
"""What the user brings."""


def jobs_of(name: str, *changes: str) -> dict[str, JobConfig]:
    document = override(read_document(ROOT / "jobs" / name), changes)
    spec = check(document)
    assert isinstance(spec, PipelineSpec)
    return {name: job for name, (job, _) in resolve_jobs(spec, document).items()}


def places_read(job: JobConfig) -> Iterator[str]:
    """Paths in what the kind says it reads."""
    for key in find_kind(job.kind).reads:
        value: Any = job.model_dump()
        for part in key.split("."):
            value = value and value[part]
        yield from paths_in(value)


def paths_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from paths_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from paths_in(inner)
    elif isinstance(value, str) and value.startswith(("runs/", "data/")):
        yield value


def unmade(name: str, *changes: str) -> list[str]:
    """What a job reads that no earlier one makes and the user does not bring."""
    made, missing = [*GIVEN[name]], []
    for number, job in jobs_of(name, *changes).items():
        missing += [
            f"{number}: {path}"
            for path in places_read(job)
            if not any(path == it or path.startswith(f"{it}/") for it in made)
        ]
        made += _outputs(job)
    return missing


@pytest.mark.parametrize("name", PIPELINES)
def test_every_job_reads_what_an_earlier_one_makes(name: str) -> None:
    assert unmade(name) == []
    wrong = "jobs.mine.set.out=runs/elsewhere"
    assert any("negatives" in missing for missing in unmade(name, wrong))


@pytest.mark.parametrize("name", PIPELINES)
def test_each_stage_starts_from_the_one_before_and_is_scored_against_it(name: str) -> None:
    jobs = jobs_of(name)
    stages = ["nli", "pairs", "instruct", "hard", "distil"]
    before = None
    for stage in stages:
        run, scores = jobs[stage], jobs[f"{stage}_scores"]
        assert isinstance(run, TrainSpec)
        assert isinstance(scores, EvaluateSpec)
        assert list(scores.models) == ["before", stage]
        assert (run.model.prompt.template, run.model.readout.pooling) == ("umarvel", "mean")
        assert run.model.readout.direction == "bidirectional"
        if before is not None:
            assert run.model.backbone == before == scores.models["before"].base
        if run.model.tune == "lora":
            assert run.model.lora.scope == "language_model"
            assert run.model.lora.alpha == 2 * run.model.lora.rank
        before = scores.models[stage].base
    reranker = jobs["reranker"]
    assert isinstance(reranker, TrainSpec)
    assert not isinstance(reranker.objective, ObjectiveConfig)


def test_the_values_are_the_published_ones() -> None:
    jobs = jobs_of("umarvel.yaml")
    found = {}
    for name in ("nli", "pairs", "instruct", "hard", "distil"):
        run = jobs[name]
        assert isinstance(run, TrainSpec)
        assert isinstance(run.objective, ObjectiveConfig)
        assert run.optim.weight_decay == 0
        assert run.optim.warmup_fraction == 0.03
        assert (run.objective.hardness, run.objective.false_negatives) == (None, None)
        found[name] = (run.model.lora.rank, run.optim.lr, run.epochs, run.objective.symmetric)
    assert found == {
        "nli": (64, 2e-4, 2.0, 0.0),
        "pairs": (128, 1e-4, 1.0, 0.5),
        "instruct": (128, 4e-4, 1.0, 0.0),
        "hard": (128, 1.5e-5, 1.0, 0.0),
        "distil": (128, 1e-5, 1.0, 0.0),
    }
    distil = jobs["distil"]
    assert isinstance(distil, TrainSpec)
    assert isinstance(distil.objective, ObjectiveConfig)
    teacher = distil.objective.distillation
    assert teacher is not None
    assert (teacher.loss, teacher.contrastive_weight, teacher.teacher_temperature) == ("kl", 0.0, "student")
    assert jobs["mine"].model_dump()["select"]["negatives"]["max_score"] == 0.7


def test_both_have_the_same_jobs() -> None:
    """The demo draws its own data. It merges no adapter of stages that train every weight."""
    real, demo = (jobs_of(name) for name in PIPELINES)
    assert [name for name in demo if name not in real] == ["corpus", "ingest"]
    assert [name for name in real if name not in demo] == ["nli_model", "pairs_model"]
    assert [job.kind for name, job in real.items() if name in demo] == [
        job.kind for name, job in demo.items() if name in real
    ]
