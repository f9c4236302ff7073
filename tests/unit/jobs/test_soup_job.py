"""The job around soups: what it scores, keeps, makes again and tells. Scores are planted; nothing needs Ray."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import jobs.evaluation.evaluate
import jobs.sweeps.soup
from jobs.cli import main
from jobs.evaluation.evaluate import ModelScores
from jobs.evaluation.specs import EvaluateSpec
from pipelines.storage.location import open_store
from rzen.evaluation.results import Result
from tests.adapters import adapter, dense
from tests.data import publish
from tests.specs import evaluate
from tests.tiny import tiny_checkpoint

JOB = """\
kind: soup
models:
  a: {{base: "{0}/base", adapter: "{0}/a"}}
  b: {{base: "{0}/base", adapter: "{0}/b"}}
soups:
  uniform: {{method: mean}}
  greedy: {{method: greedy}}
  searched: {{method: searched, evaluations: 8, at_once: 3}}
evaluate: {{spec: evaluate.yaml}}
out: "{0}/out"
"""


class Judge:
    """In place of evaluation: the best soup has three quarters of b."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, spec: EvaluateSpec, reader: Any, stores: Any) -> dict[str, ModelScores]:
        found = {}
        for name, ref in spec.models.items():
            self.asked.append(name)
            lineage = Path(str(ref.adapter), "soup.json")
            parents = json.loads(lineage.read_text())["parents"] if lineage.is_file() else []
            share = {parent["name"]: parent["coefficient"] for parent in parents}.get("b", 0.0)
            value = 1 - (0.75 - (1.0 if name == "b" else share)) ** 2
            row = Result(name, "text_image", "hit@1", value, 24, 24, 1 / 24)
            found[name] = ModelScores([row], {"text_image": [value]})
        return found


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    for seed, name in enumerate("ab"):
        adapter(tmp_path / name, rank=2, alpha=4, seed=seed)
    tiny_checkpoint(tmp_path / "base")
    publish(open_store(str(tmp_path / "data")), {"red": ("text_image", 24)})
    (tmp_path / "evaluate.yaml").write_text(evaluate(f"{tmp_path}/data"))
    (tmp_path / "job.yaml").write_text(JOB.format(tmp_path))
    judge = Judge()
    monkeypatch.setattr(jobs.evaluation.evaluate, "score", judge)
    monkeypatch.setattr(jobs.sweeps.soup, "ray_cluster", nullcontext)
    return judge


def summary(folder: Path) -> Any:
    return json.loads((folder / "out/summary.json").read_text())


def scores(folder: Path) -> dict[str, float]:
    return {row["model"]: row["value"] for row in summary(folder)["rows"]}


def test_soups_are_chosen_scored_and_told(tmp_path: Path, judge: Judge) -> None:
    assert main(["run", str(tmp_path / "job.yaml")]) == 0
    found = scores(tmp_path)
    assert list(found) == ["a", "b", "uniform", "greedy", "searched"]
    assert found["a"] == pytest.approx(1 - 0.75**2)
    assert found["uniform"] == pytest.approx(1 - 0.25**2)
    assert found["greedy"] == found["b"] == pytest.approx(1 - 0.25**2)  # the mean of both is no better
    assert found["searched"] > 1 - 0.05**2
    searched = summary(tmp_path)["soups"]["searched"]
    assert len(searched["trace"]) <= 8
    assert sum(parent["coefficient"] for parent in searched["parents"]) == pytest.approx(1)
    page = (tmp_path / "out/summary.md").read_text()
    assert "biased upwards" in page
    assert "| searched |" in page
    assert not (tmp_path / "out/candidates").exists()


def results_of(folder: Path) -> dict[str, str]:
    """Every file, and when it was written."""
    return open_store(str(folder / "out")).tags()


def test_a_finished_job_reports_and_no_more(tmp_path: Path, judge: Judge, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "job.yaml")]) == 0
    tags = results_of(tmp_path)
    judge.asked.clear()
    capsys.readouterr()
    assert main(["run", str(tmp_path / "job.yaml")]) == 0
    assert judge.asked == []
    assert results_of(tmp_path) == tags
    assert "searched" in capsys.readouterr().out


def test_scores_are_those_of_the_soup_that_is_there(tmp_path: Path, judge: Judge) -> None:
    assert main(["run", str(tmp_path / "job.yaml")]) == 0
    changed = ["--set", "soups.uniform.weights={a: 3, b: 1}"]
    assert main(["run", str(tmp_path / "job.yaml"), *changed]) == 0
    assert scores(tmp_path)["uniform"] == pytest.approx(1 - 0.5**2)
    adapter(tmp_path / "a", rank=2, alpha=4, seed=7)  # another model in the same place
    judge.asked.clear()
    assert main(["run", str(tmp_path / "job.yaml"), *changed]) == 0
    assert "a" in judge.asked
    assert "b" not in judge.asked


def test_a_soup_among_the_models_counts_as_all_that_it_was_made_of(tmp_path: Path, judge: Judge) -> None:
    plain = ["--set", "evaluate=null", "--set", "soups={greedy: null, searched: null}"]
    assert main(["run", str(tmp_path / "job.yaml"), *plain]) == 0
    adapter(tmp_path / "c", rank=3, alpha=3, seed=5)
    old = (
        f'{{old: {{base: base, adapter: "{tmp_path}/out/uniform/adapter"}}, c: {{base: base, adapter: "{tmp_path}/c"}}'
    )
    more = ["--set", f"models={old}, a: null, b: null}}", "--set", f"out={tmp_path}/more"]
    assert main(["run", str(tmp_path / "job.yaml"), *plain, *more]) == 0
    stirred = dense(tmp_path / "more/uniform/adapter")
    parts = [dense(tmp_path / name) for name in "abc"]
    for name, delta in stirred.items():
        expected = sum(part[name] for part in parts) / 3
        assert (delta - expected).norm() < 1e-6 * expected.norm()


def test_names_of_the_jobs_own_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text(JOB.format(tmp_path).replace("uniform:", "models:"))
    (tmp_path / "evaluate.yaml").write_text(evaluate("data"))
    assert main(["run", str(tmp_path / "job.yaml")]) == 1
    assert "soups.models: the job keeps scores in a folder of this name" in capsys.readouterr().err
