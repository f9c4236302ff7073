"""Kinds of job: each declared once, and a kind of the user's own from one folder and one line."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from jobs.cli import main
from jobs.spec.job import JobConfig
from jobs.spec.kinds import Kind, find_kind, gpus_of, kind_names, no_gpus
from pipelines.errors import UserError
from tests.plug_in import write_plug_in


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of an installed package with the kind `count`."""
    site = tmp_path / "site"
    write_plug_in(site)
    monkeypatch.syspath_prepend(site)
    kind_names.cache_clear()
    yield site
    kind_names.cache_clear()
    sys.modules.pop("counting", None)


def has_field(model: type[BaseModel], key: str) -> bool:
    """Return whether a dotted key is a setting of the spec; only settings of its own level are looked up in models."""
    first, _, rest = key.partition(".")
    field = model.model_fields.get(first)
    if field is None or not rest:
        return field is not None
    annotations = get_args(field.annotation) or (field.annotation,)
    return any(isinstance(one, type) and issubclass(one, BaseModel) and has_field(one, rest) for one in annotations)


@pytest.mark.parametrize("name", sorted(kind_names()))
def test_every_kind_is_declared_with_settings_that_exist(name: str) -> None:
    kind = find_kind(name)
    assert kind.name == name
    assert kind.summary.endswith(".")
    assert kind.makes or name == "serve"
    for key in [*kind.reads, *kind.makes, *kind.not_science]:
        assert has_field(kind.spec, key), key


def test_a_field_that_is_not_there_is_seen() -> None:
    train = find_kind("train").spec
    assert not has_field(train, "dat")
    assert not has_field(train, "optim.zero")


def test_settings_that_are_not_science_are_left_out() -> None:
    settings = {"name": "a", "run": {"root": "x"}, "data": {"root": "y", "split": "train"}, "optim": {"zero_stage": 1}}
    assert find_kind("train").science(settings) == {"name": "a", "data": {"split": "train"}, "optim": {}}
    assert settings["data"] == {"root": "y", "split": "train"}


def test_a_kind_says_how_many_gpus_it_uses_or_why_it_is_local() -> None:
    fields = {"name": "x", "spec": JobConfig, "run": "m:run", "reads": {}, "makes": {}}
    for wrong in ({}, {"gpus": no_gpus, "local": "reads a local folder"}):
        with pytest.raises(ValueError, match="either `gpus` or a reason to be `local`"):
            Kind(**fields, **wrong)  # type: ignore[arg-type]


def test_a_mistyped_kind_is_answered_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text("kind: trian\n")
    assert main(["validate", str(tmp_path / "job.yaml")]) == 1
    assert "job.yaml:1: kind='trian' is not a kind of job; did you mean 'train'?" in capsys.readouterr().err


def write_specs(folder: Path) -> None:
    (folder / "text").write_text("a\nb\n")
    (folder / "count.yaml").write_text(f'kind: count\nfile: "{folder}/text"\nout: "{folder}/lines.json"\n')
    (folder / "all.yaml").write_text(
        f'kind: pipeline\nname: all\nstate: "{folder}/state"\njobs:\n  first: {{spec: count.yaml}}\n'
    )


def test_a_kind_of_another_package_validates(plug_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_specs(tmp_path)
    assert main(["validate", str(tmp_path / "count.yaml"), str(tmp_path / "all.yaml")]) == 0
    assert main(["validate", str(tmp_path / "count.yaml"), "--set", "fil=x"]) == 1
    assert "fil is not a setting; did you mean 'file'?" in capsys.readouterr().err
    assert gpus_of(find_kind("count").spec.model_validate({"kind": "count", "file": "x", "out": "y"})) == 0.0


@pytest.mark.ray
def test_a_kind_of_another_package_runs_in_a_pipeline(plug_in: Path, tmp_path: Path, ray_cluster: None) -> None:
    write_specs(tmp_path)
    for expected in ('{"lines": 2, "runs": 1}', '{"lines": 2, "runs": 1}'):  # the second time it is done already
        assert main(["run", str(tmp_path / "all.yaml")]) == 0
        assert (tmp_path / "lines.json").read_text() == expected
    (tmp_path / "text").write_text("a\nb\nc\n")
    assert main(["run", str(tmp_path / "all.yaml")]) == 0
    assert (tmp_path / "lines.json").read_text() == '{"lines": 3, "runs": 2}'


def test_a_package_that_cannot_be_imported_is_named(plug_in: Path) -> None:
    (plug_in / "counting.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(UserError, match="kind 'count': counting:COUNT cannot be imported: No module named"):
        find_kind("count")
    sys.modules.pop("counting", None)
    (plug_in / "counting.py").write_text("COUNT = 1\n")
    with pytest.raises(UserError, match="counting:COUNT is not the declaration of 'count'"):
        find_kind("count")
