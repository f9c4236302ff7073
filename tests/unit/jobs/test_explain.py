import json

import pytest

from jobs.cli import main
from jobs.spec.explain import explain
from jobs.spec.kinds import find_kind, kind_names
from jobs.spec.load import read_document


def test_a_setting_is_explained_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "objective.hardness.alpha"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "objective.hardness.alpha of train"
    assert "type       number > 0" in lines
    assert "default    9.0" in lines
    place = read_document("jobs/stage2.yaml").places["objective", "hardness", "alpha"]
    assert f"set in     {place}: 9.0" in lines


def test_a_group_lists_the_settings_inside(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "optim"]) == 0
    out = capsys.readouterr().out
    assert "\n  lr                 Peak learning rate (paper)\n" in out
    assert "type" not in out


@pytest.mark.parametrize(
    ("key", "type_", "required", "default"),
    [
        ("name", "string of at most 60 letters and that matches ^[A-Za-z0-9][A-Za-z0-9_-]*$", True, None),
        ("steps", "integer >= 1 or null", False, None),
        ("cluster.gpus_per_worker", "number >= 0", False, 0.0),
        ("data.mixture.weights", "mapping of names to number > 0 or null", False, None),
        ("data.mixture.resample.every_steps", "integer >= 1", True, None),
        ("data.split", '"train" or "held_out"', False, "train"),
        ("submit.excludes", "list of string", False, []),
        ("submit.excludes.0", "string", False, None),
        ("submit.env.HOME", "string", False, None),
        ("model.backbone.layers", "integer >= 1", False, 2),
        (
            "objective.mined.hardness",
            "mapping or null",
            False,
            {"alpha": 9.0, "gradient": "detached", "normalized": False},
        ),
    ],
)
def test_types_and_defaults_are_those_of_the_models(key: str, type_: str, required: bool, default: object) -> None:
    (found,) = explain(key, "train")
    assert (found.setting.type, found.setting.required, found.setting.default) == (type_, required, default)


def test_kinds_in_which_a_setting_differs_are_kept_apart() -> None:
    by_kinds = {found.kinds: found.setting.no_effect for found in explain("data.mixture.weights")}
    assert by_kinds == {
        ("train",): (),
        ("evaluate",): ("every sample of the split is scored",),
        ("embed",): ("every target is embedded",),
        ("mine",): ("`sources` decides",),
        ("curate",): ("every sample of the split is judged",),
        ("judge",): ("every sample of the table is judged",),
        ("check",): ("the first samples of each source are compared",),
    }


@pytest.mark.parametrize("kind", kind_names())
def test_every_setting_of_a_kind_is_listed_with_its_documentation(kind: str) -> None:
    ((found,),) = [explain("", kind)]
    assert [*found.setting.settings] == [*find_kind(kind).spec.model_fields]
    assert all(found.setting.settings.values())


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["optim.lrr"], "optim.lrr: is not a setting; did you mean 'optim.lr'?"),
        (["optimm.lr", "--kind", "train"], "optimm.lr: is not a setting of kind train; did you mean 'optim.lr'?"),
        (["lr"], "lr: is not a setting; did you mean 'optim.lr'?"),
        (["train"], "train: is not a setting; did you mean `rzen explain --kind train`?"),
        (["qqqq"], "qqqq: is not a setting; `rzen explain --kind KIND` lists the settings of a kind"),
        (["steps.more"], "steps.more: is not a setting; did you mean 'steps'?"),
        (["--kind", "trian"], "kind 'trian': is not a kind of job; did you mean 'train'?"),
    ],
)
def test_unknown_settings_are_answered_with_the_nearest(
    arguments: list[str], fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *arguments]) == 1
    assert capsys.readouterr().err == f"error: {fix}\n"


def test_scripts_read_explanations_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "optim.lr", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["key"], found["kinds"], found["type"], found["default"]) == (
        "optim.lr",
        ["train"],
        "number > 0",
        2e-4,
    )
    assert {place.partition(":")[0] for place in found["shipped"]} >= {"jobs/stage1.yaml", "jobs/stage2.yaml"}
