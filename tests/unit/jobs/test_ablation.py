"""Ablations: what is refused, the statistics by hand, and the report from canned scores."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from jobs.cli import main
from jobs.evaluation.specs import EvaluateSpec
from jobs.spec.load import check, override, read_document
from jobs.sweeps.ablation import Finished, resolve, write_report
from jobs.sweeps.registration import register
from jobs.sweeps.specs import AblationSpec
from jobs.training.specs import TrainSpec
from pipelines.errors import UserError
from pipelines.storage.location import open_store
from rzen.evaluation.ablation import (
    MEAN,
    Contrast,
    Effect,
    Scores,
    contrast_table,
    contrasts,
    difference_table,
    effects,
    paired_interval,
    plot_contrasts,
    plot_effects,
    score_table,
)
from rzen.evaluation.results import Result
from tests.paths import ROOT

JOB = """\
kind: ablation
stage: stage.yaml
set: {steps: 7}
variants:
  baseline: {objective: {hardness: null}}
  hardness: {objective: {hardness: {alpha: 3.0}}}
seeds: [4, 9]
evaluate: {spec: evaluate.yaml, set: {dtype: float32}}
out: out
"""


def written(folder: Path, job: str = JOB) -> str:
    (folder / "stage.yaml").write_text("kind: train\nname: s\ndata: {root: d}\nmodel: {backbone: a/b}\n")
    (folder / "evaluate.yaml").write_text("kind: evaluate\nmodels: {x: {base: y}}\ndata: {root: d}\nout: o\n")
    (folder / "job.yaml").write_text(job)
    return str(folder / "job.yaml")


def resolved(path: str, *overrides: str) -> tuple[dict[tuple[str, int], TrainSpec], EvaluateSpec]:
    document = override(read_document(path), overrides)
    spec = check(document)
    assert isinstance(spec, AblationSpec)
    return resolve(spec, document)


def test_every_variant_and_seed_is_a_run_of_its_own(tmp_path: Path) -> None:
    runs, evaluate = resolved(written(tmp_path))
    assert list(runs) == [("baseline", 4), ("hardness", 4), ("baseline", 9), ("hardness", 9)]
    assert [(run.name, run.seed, run.steps) for run in runs.values()] == [
        ("baseline-s4", 4, 7),
        ("hardness-s4", 4, 7),
        ("baseline-s9", 9, 7),
        ("hardness-s9", 9, 7),
    ]
    alphas = [run.objective.hardness.alpha if run.objective.hardness else None for run in runs.values()]
    assert alphas == [None, 3.0, None, 3.0]
    assert (evaluate.dtype, list(evaluate.models)) == ("float32", ["run"])


def test_an_variant_cannot_change_the_name_or_seed_of_its_runs(tmp_path: Path) -> None:
    runs, _ = resolved(written(tmp_path), "variants.hardness.name=mine", "variants.hardness.seed=1")
    assert (runs["hardness", 9].name, runs["hardness", 9].seed) == ("hardness-s9", 9)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("seeds=1", "seeds=1: must be an integer >= 2 or a list of integer >= 0 with at least 2 entries"),
        ("seeds=[3]", "seeds=[3]"),
        ("seeds=[3, 3]", "seeds=[3, 3] names one twice"),
        ("baseline=plain", "baseline='plain' is not one of the variants: baseline, hardness"),
        ("variants.hardness=null", "value should have at least 2 items after validation, not 1"),
        ("variants.same={objective: {hardness: null}}", "variant 'same' trains the same as variant 'baseline'"),
        ("variants.wrong={objective: {hardnes: null}}", "objective.hardnes is not a setting; did you mean 'hardness'?"),
        ("contrasts.one={hardness: 1, plain: -1}", "contrasts.one names 'plain', which is none of baseline, hardness"),
        (
            "contrasts.one={hardness: 1}",
            "contrasts.one={'hardness': 1.0} must have weights other than 0 that add up to 0",
        ),
        ("contrasts.one={hardness: 0, baseline: 0}", "must have weights other than 0 that add up to 0"),
        ("set.kind=evaluate", "name is not a setting"),
        ("evaluate.spec=stage.yaml", "models is not a setting"),
        ("evaluate.set.chunk_tokens=0", "chunk_tokens=0: input should be greater than or equal to 1"),
    ],
)
def test_what_could_not_be_compared_is_refused(tmp_path: Path, change: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        resolved(written(tmp_path), change)
    assert expected in str(caught.value)


def test_shipped_variants_add_one_part_each_and_all_of_them() -> None:
    document = read_document(ROOT / "jobs/variants.yaml")
    spec = check(document)
    assert isinstance(spec, AblationSpec)
    runs, _ = resolve(spec, document)
    assert spec.seed_list == list(range(10))

    def parts(variant: str) -> set[str]:
        run = runs[variant, 0]
        on = {
            "hardness": run.objective.hardness is not None,
            "false_negatives": run.objective.false_negatives is not None,
            "temperature": run.objective.temperature.learnable,
            "merged_classification": run.data.mixture.groups != {},
            "system_prompt": run.model.prompt.template == "rzen_paper",
            "resampling": run.data.mixture.resample is not None,
        }
        return {part for part, is_on in on.items() if is_on}

    every = list(spec.variants)
    assert (every[0], every[-1], len(every)) == ("baseline", "all", 8)
    assert {variant: parts(variant) for variant in every} == {
        "baseline": set(),
        **{variant: {variant} for variant in every[1:-1]},
        "all": set(every[1:-1]),
    }


def test_a_pipeline_checks_the_variants_of_its_station(capsys: pytest.CaptureFixture[str]) -> None:
    job = ["validate", str(ROOT / "jobs/ablation.yaml"), "--set"]
    assert main([*job, "jobs.ablation.set.seeds=12"]) == 0
    assert main([*job, "jobs.ablation.set.variants.alike.objectiv=1"]) == 1
    assert "objectiv is not a setting; did you mean 'objective'?" in capsys.readouterr().err


# --- statistics


def test_interval_by_hand() -> None:
    """Sample deviation of 1, 2, 3, 4 is sqrt(5 / 3); t of 3 degrees of freedom is 3.182."""
    mean, low, high = paired_interval([1.0, 2.0, 3.0, 4.0])
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - 3.182 * math.sqrt(5 / 3) / 2, 2.5 + 2.0540), abs=1e-4)


@pytest.mark.parametrize("freedom", [*range(1, 31), 60])
def test_table_of_t_holds_what_lies_within_95_percent(freedom: int) -> None:
    """The density of Student's t, integrated: independent of the table. Above 30 the interval is a little wider."""
    deviations = np.r_[np.ones((freedom + 1) // 2), -np.ones((freedom + 1) // 2), np.zeros((freedom + 1) % 2)]
    _, low, high = paired_interval(deviations.tolist())
    half_width = (high - low) / 2 / (statistics.stdev(deviations) / math.sqrt(len(deviations)))
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    x = np.linspace(-half_width, half_width, 200_001)
    inside = np.trapezoid(np.exp(scale) * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x)
    assert 0.9499 < inside < (0.9501 if freedom <= 30 else 0.955)


# Seeds differ by ten points. The variant is one point better in each, a little more or less. The variants list seeds
# in different orders, as runs that were done at different times do.
NOISY: Scores = {
    "baseline": {1: {"a": 0.10}, 2: {"a": 0.20}, 3: {"a": 0.30}, 4: {"a": 0.40}},
    "better": {4: {"a": 0.411}, 2: {"a": 0.209}, 1: {"a": 0.111}, 3: {"a": 0.309}},
}


def unpaired(scores: Scores, baseline: str) -> list[Effect]:
    """Planted: an interval from the spread of each variant by itself (Welch)."""
    ours, theirs = ([values["a"] for values in scores[variant].values()] for variant in ("better", baseline))
    difference = statistics.fmean(ours) - statistics.fmean(theirs)
    half = 2.447 * math.sqrt(statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs))
    return [Effect("better", "a", statistics.fmean(ours), difference, difference - half, difference + half, 4)]


def paired_by_order(scores: Scores, baseline: str) -> list[Effect]:
    """Planted: runs are paired as they come."""
    pairs = zip(scores["better"].values(), scores[baseline].values(), strict=True)
    differences = [ours["a"] - theirs["a"] for ours, theirs in pairs]
    return [Effect("better", "a", 0.26, *paired_interval(differences), 4)]


def check_paired(function: Callable[[Scores, str], Sequence[Effect]]) -> None:
    """Differences 0.011, 0.009, 0.009, 0.011: mean 0.01, deviation 0.001155, half width 3.182 * 0.001155 / 2."""
    effect = next(some for some in function(NOISY, "baseline") if (some.variant, some.task) == ("better", "a"))
    assert (effect.score, effect.difference) == pytest.approx((0.26, 0.01))
    assert (effect.low, effect.high) == pytest.approx((0.008163, 0.011837), abs=1e-6)


def test_runs_of_one_seed_are_paired() -> None:
    check_paired(effects)


@pytest.mark.parametrize("fault", [unpaired, paired_by_order])
def test_planted_ways_of_comparing_are_caught(fault: Callable[[Scores, str], list[Effect]]) -> None:
    with pytest.raises(AssertionError):
        check_paired(fault)


def test_mean_of_the_tasks_is_taken_within_each_run() -> None:
    scores: Scores = {
        "baseline": {0: {"a": 0.2, "b": 0.4}, 1: {"a": 0.3, "b": 0.5}},
        "other": {0: {"a": 0.3, "b": 0.3}, 1: {"a": 0.4, "b": 0.4}},
    }
    found = {(some.variant, some.task): some for some in effects(scores, "baseline")}
    mean = found["other", MEAN]
    assert (mean.score, mean.difference, mean.low, mean.high) == pytest.approx((0.35, 0, 0, 0))
    assert found["baseline", MEAN] == Effect("baseline", MEAN, pytest.approx(0.35), 0.0, 0.0, 0.0, 2)


@pytest.mark.parametrize("missing", [{1: {"a": 0.1}}, {1: {"a": 0.1}, 2: {"b": 0.1}, 3: {"a": 0.1}, 4: {"a": 0.1}}])
def test_runs_that_are_missing_are_not_passed_over(missing: dict[int, dict[str, float]]) -> None:
    with pytest.raises(ValueError, match="better was not scored on the seeds and tasks of baseline"):
        effects({**NOISY, "better": missing}, "baseline")


# --- contrasts

FACTORIAL: Scores = {
    "none": {1: {"a": 0.30, "b": 0.5}, 2: {"a": 0.40, "b": 0.5}, 3: {"a": 0.20, "b": 0.5}},
    "one": {1: {"a": 0.32, "b": 0.5}, 2: {"a": 0.41, "b": 0.5}, 3: {"a": 0.23, "b": 0.5}},
    "two": {3: {"a": 0.21, "b": 0.5}, 1: {"a": 0.31, "b": 0.5}, 2: {"a": 0.43, "b": 0.5}},
    "both": {1: {"a": 0.38, "b": 0.5}, 2: {"a": 0.48, "b": 0.5}, 3: {"a": 0.30, "b": 0.5}},
}
INTERACTION = {"both": 1.0, "one": -1.0, "two": -1.0, "none": 1.0}


def unpaired_contrasts(scores: Scores, weights: Mapping[str, Mapping[str, float]]) -> list[Contrast]:
    """Planted: an interval from the spread of each variant by itself."""
    ((name, parts),) = weights.items()
    values = {variant: [by_task["a"] for by_task in scores[variant].values()] for variant in parts}
    mean = math.fsum(weight * statistics.fmean(values[variant]) for variant, weight in parts.items())
    half = 4.303 * math.sqrt(math.fsum(statistics.variance(some) / len(some) for some in values.values()))
    return [Contrast(name, "a", mean, mean - half, mean + half)]


def without_signs(scores: Scores, weights: Mapping[str, Mapping[str, float]]) -> list[Contrast]:
    """Planted: the last variant is subtracted from the first, and the others are not used."""
    return contrasts(scores, {name: {"both": 1.0, "none": -1.0} for name in weights})


def check_interaction(function: Callable[[Scores, Mapping[str, Mapping[str, float]]], Sequence[Contrast]]) -> None:
    """Sums by seed 0.05, 0.04, 0.06: mean 0.05, deviation 0.01, half width 4.303 * 0.01 / sqrt(3) = 0.024843."""
    first = function(FACTORIAL, {"interaction": INTERACTION})[0]
    assert (first.name, first.task) == ("interaction", "a")
    assert (first.difference, first.low, first.high) == pytest.approx((0.05, 0.025157, 0.074843), abs=1e-6)


def test_an_interaction_is_summed_within_each_seed() -> None:
    check_interaction(contrasts)


@pytest.mark.parametrize("fault", [unpaired_contrasts, without_signs])
def test_planted_contrasts_are_caught(
    fault: Callable[[Scores, Mapping[str, Mapping[str, float]]], list[Contrast]],
) -> None:
    with pytest.raises(AssertionError):
        check_interaction(fault)


def test_one_variant_minus_the_baseline_is_the_difference_to_it() -> None:
    found = contrasts(FACTORIAL, {"one": {"one": 1, "none": -1}})
    expected = [some for some in effects(FACTORIAL, "none") if some.variant == "one"]
    assert [some.task for some in found] == ["a", "b", MEAN]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.difference, ours.low, ours.high) == pytest.approx((theirs.difference, theirs.low, theirs.high))


def test_contrasts_need_the_runs_of_their_variants_only() -> None:
    scores = {**FACTORIAL, "two": {1: {"a": 0.3, "b": 0.5}}}
    assert len(contrasts(scores, {"one": {"one": 1, "none": -1}})) == 3
    with pytest.raises(ValueError, match="two was not scored on the seeds and tasks of both"):
        contrasts(scores, {"interaction": INTERACTION})


def test_one_task_has_no_mean_of_tasks() -> None:
    assert {some.task for some in effects(NOISY, "baseline")} == {"a"}


# --- registration


def registered(spec: AblationSpec, folder: Path, has_begun: bool) -> str:
    return register(spec, open_store(str(folder)), has_begun)


def test_a_report_says_what_was_registered_and_what_changed_since(tmp_path: Path) -> None:
    def spec(*overrides: str) -> AblationSpec:
        found = check(override(read_document(written(tmp_path)), overrides))
        assert isinstance(found, AblationSpec)
        return found

    out = tmp_path / "out"
    first = registered(spec("seeds=3"), out, has_begun=False)
    assert re.fullmatch(r"registered before the first run, \d{4}-\d\d-\d\d \d\d:\d\d UTC", first)
    assert registered(spec("seeds=[0, 1, 2]"), out, has_begun=True) == first
    assert registered(spec("seeds=3", "notes=[a remark]", "max_parallel=1"), out, has_begun=True) == first
    added = ("variants.third={steps: 9}", "contrasts.one={hardness: 1, baseline: -1}", "seeds=4")
    changed = registered(spec(*added), out, has_begun=True)
    assert changed == f"{first}; changed since: variants.third, contrasts.one, seeds"
    removed = registered(spec("seeds=3", "variants.baseline.steps=9"), out, has_begun=True)
    assert removed == f"{first}; changed since: variants.baseline"
    assert not registered(spec(*added), out, has_begun=False).endswith("seeds")  # nothing was trained yet
    (out / "registered.json").unlink()
    assert registered(spec(), out, has_begun=True) == "not registered before the first run"
    assert not (out / "registered.json").exists()


# --- the report

FOUND = [
    Effect("baseline", "text_image", 0.2, 0.0, 0.0, 0.0, 3),
    Effect("hardness", "text_image", 0.251, 0.051, 0.012, 0.09, 3),
    Effect("resampling", "text_image", 0.19, -0.01, -0.03, 0.01, 3),
    Effect("baseline", MEAN, 0.3, 0.0, 0.0, 0.0, 3),
    Effect("hardness", MEAN, 0.3, 0.0, -0.01, 0.01, 3),
    Effect("resampling", MEAN, 0.28, -0.02, -0.03, -0.01, 3),
]


def test_tables_of_scores_and_differences() -> None:
    assert score_table(FOUND) == (
        "| variant | Text → image | Mean of the tasks |\n| --- | ---: | ---: |\n"
        "| baseline | 20.0 | 30.0 |\n| hardness | 25.1 | 30.0 |\n| resampling | 19.0 | 28.0 |\n"
    )
    assert difference_table(FOUND, "baseline") == (
        "| variant | Text → image | Mean of the tasks |\n| --- | ---: | ---: |\n"
        "| hardness | **+5.1 [+1.2, +9.0]** | +0.0 [-1.0, +1.0] |\n"
        "| resampling | -1.0 [-3.0, +1.0] | **-2.0 [-3.0, -1.0]** |\n"
    )


def test_table_and_plot_of_contrasts() -> None:
    found = [
        Contrast("interaction", "text_image", 0.05, 0.025, 0.075),
        Contrast("one", "text_image", 0.02, -0.01, 0.05),
    ]
    assert contrast_table(found) == (
        "| contrast | Text → image |\n| --- | ---: |\n"
        "| interaction | **+5.0 [+2.5, +7.5]** |\n| one | +2.0 [-1.0, +5.0] |\n"
    )
    svg = plot_contrasts(found)
    assert "interaction" in svg
    assert plot_contrasts(found) == svg
    assert plot_contrasts([found[1], found[0]]) != svg


def test_plot_is_svg_with_a_panel_for_each_task_and_the_same_every_time() -> None:
    svg = plot_effects(FOUND, "baseline")
    root = ElementTree.fromstring(svg)
    panels = [node.get("id") for node in root.iter() if str(node.get("id")).startswith("axes_")]
    assert panels == ["axes_1", "axes_2"]
    assert plot_effects(FOUND, "baseline") == svg
    assert plot_effects([*FOUND[:-1], Effect("resampling", MEAN, 0.28, -0.02, -0.04, 0.0, 3)], "baseline") != svg


def test_report_says_how_many_seeds_where_when_and_what_the_parts_did(tmp_path: Path) -> None:
    changes = [
        f"out={tmp_path}/out",
        "seeds=[4, 9, 2]",
        "question=Does it help?",
        "notes=[A toy.]",
        "limits=[A model of any size.]",
        "contrasts.gain={hardness: 1, baseline: -1}",
        "contrasts.half={baseline: 0.5, hardness: -0.5}",
    ]
    document = override(read_document(written(tmp_path)), changes)
    spec = check(document)
    assert isinstance(spec, AblationSpec)
    steps = [
        {"skipped": 0, "dropped_fraction": dropped, "effective_fraction": 0.5, "temperature": 0.05}
        for dropped in (0.01, 0.03)
    ]

    def run(value: float) -> Finished:
        metrics = (("hit@1", value), ("ndcg@5", 0.9))
        return Finished(
            [Result("m", "text_image", metric, score, 40, 40, 0.025) for metric, score in metrics], steps, 1000.0
        )

    finished = {("baseline", 4): run(0.1), ("hardness", 4): run(0.15), ("baseline", 9): run(0.2)}
    finished["hardness", 9] = run(0.25)
    where = {"date": "2026-11-21", "revision": "abc", "hardware": "2 CPUs", "registered": "registered at noon"}
    write_report(spec, finished, where)
    page = (tmp_path / "out/ablation.md").read_text()
    assert "* 2 variants x 2 seeds (of 3 requested), 2026-11-21, revision abc\n" in page
    assert "* 2 CPUs; workers computed 4,000 s in training steps" in page
    assert page.startswith("# What the parts change\n\n**Question.** Does it help?\n\n* 2 variants")
    assert (
        "* text_image hit@1\n* registered at noon: variants baseline, hardness; 2 contrasts; seeds 4, 9, 2\n"
        "* power: with 2 seeds, the intervals reach 0.0 to 0.0 points to each side; smaller effects are not seen\n"
        "* A toy.\n"
    ) in page
    assert "* gain: hardness - baseline\n* half: 0.5 baseline - 0.5 hardness\n" in page
    assert "| gain | **+5.0 [+5.0, +5.0]** |" in page
    assert "There are 3 intervals" in page
    assert page.endswith("## What is not shown\n\n* A model of any size.\n")
    assert "| hardness | **+5.0 [+5.0, +5.0]** |" in page
    assert "| baseline | 2.00 | 50.0 | 0.0500 |" in page
    assert "ndcg" not in page
    content = json.loads((tmp_path / "out/ablation.json").read_text())
    assert content["settings"]["spec"]["seeds"] == [4, 9, 2]
    assert [(some["variant"], some["seed"]) for some in content["runs"]] == list(finished)
    assert (tmp_path / "out/ablation.svg").read_text() == plot_effects(
        [Effect(**some) for some in content["effects"]], "baseline"
    )
    assert (tmp_path / "out/contrasts.svg").read_text() == plot_contrasts(
        [Contrast(**some) for some in content["contrasts"]]
    )
