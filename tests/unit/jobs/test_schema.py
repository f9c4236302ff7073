"""JSON Schema of specs: what an editor accepts, marks and explains."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from jobs.cli import main
from jobs.spec.kinds import kind_names
from jobs.spec.schema import schema_of_all, schema_of_kind
from jobs.spec.yaml_text import parse_yaml
from tests.paths import ROOT

SHIPPED = sorted((ROOT / "jobs").glob("*.yaml"))


def problems(schema: dict[str, Any], text: str) -> list[str]:
    content, _ = parse_yaml(text, "a.yaml")
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(content)]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_specs_fit_the_schema_as_they_are_written(path: Path) -> None:
    assert problems(schema_of_all(), path.read_text()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind: train\nnmae: x\n", "'nmae' was unexpected"),
        ("kind: train\nglobal_batch: 1\n", "1 is less than the minimum of 2"),
        ("kind: train\noptim: {lrr: 1}\n", "'lrr' was unexpected"),
        ("kind: trian\n", "'trian' is not valid under any of the given schemas"),
        ("name: x\n", "is not valid under any of the given schemas"),
        ("kind: finetunes\nruns: {a/b: {}}\n", "does not match any of the regexes"),
    ],
)
def test_mistakes_are_marked(text: str, expected: str) -> None:
    assert expected in "\n".join(problems(schema_of_all(), text))


@pytest.mark.parametrize(
    "text",
    [
        "base: other.yaml\nsteps: 3\n",
        "base: other.yaml\nkind: finetunes\nruns: {images: null}\n",
        "kind: evaluate\nmodels: {before: null}\n",
    ],
)
def test_a_file_with_a_base_may_leave_out_and_take_out(text: str) -> None:
    assert problems(schema_of_all(), text) == []


@pytest.mark.parametrize("name", kind_names())
def test_every_setting_is_explained(name: str) -> None:
    schema = schema_of_kind(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    for title, definition in schema["$defs"].items():
        for key, field in definition.get("properties", {}).items():
            assert field.get("description"), f"{title}.{key}"


def test_the_command_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "embed"]) == 0
    assert json.loads(capsys.readouterr().out) == schema_of_kind("embed")
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema_of_all()
    assert main(["schema", "embde"]) == 1
    assert "kind 'embde': is not a kind of job; did you mean 'embed'?" in capsys.readouterr().err
