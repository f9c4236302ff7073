"""What `make demo` runs for a folder of media, whatever its name."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.spec.load import check, override, read_document
from jobs.workflows.pipeline import resolve_jobs
from jobs.workflows.specs import PipelineSpec
from pipelines.storage.location import open_store
from tests.data import publish
from tests.paths import ROOT

ODD = "my 'odd' \"photos\": #1 \\ é"


def demo(*variables: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-n", "demo", "VENV=venv", *variables]
    # `make test` hands its own flags to the commands that it starts.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("variables", "spec", "stores"),
    [
        ([], "demo", "runs/demo/store"),
        (["STORE=s3"], "demo", "s3://rzen-demo"),
        (["CORPUS=emoji"], "emoji", "runs/emoji/store"),
        ([f"MEDIA={ODD}"], "folder", "runs/folder/store"),
        ([f"TABLE={ODD}"], "table", "runs/table/store"),
        ([f"TABLE={ODD}", "STORE=s3"], "table", "s3://rzen-table"),
        ([f"MEDIA={ODD}", "STORE=s3"], "folder", "s3://rzen-folder"),
        ([f"MEDIA={ODD}", "MODEL=a model"], "photos", "runs/photos/store"),
        ([f"MEDIA={ODD}", "MODEL=a model", "STORE=s3://bucket/x"], "photos", "s3://bucket/x"),
    ],
)
def test_each_kind_of_demo_has_its_own_output(variables: list[str], spec: str, stores: str) -> None:
    *_, last = demo(*variables).stdout.splitlines()
    words = shlex.split(last)
    start = words.index("venv/bin/rzen")
    assert words[start + 1 : start + 3] == ["run", f"jobs/{spec}.yaml"]
    document = override(read_document(str(ROOT / f"jobs/{spec}.yaml")), words[start + 4 :: 2])
    pipeline = check(document)
    assert isinstance(pipeline, PipelineSpec)
    assert pipeline.vars["store"] == stores
    assert pipeline.vars.get("media") == (ODD if spec in ("folder", "photos") else None)
    assert pipeline.vars.get("table") == (ODD if spec == "table" else None)
    if spec == "photos":
        assert pipeline.vars["model"] == "a model"
    ingest, _ = resolve_jobs(pipeline, document)["ingest"]
    assert ingest.model_dump()["out"] == f"{stores}/data"
    if spec == "table":
        assert ingest.model_dump(exclude_unset=True)["sources"] == {"table": {"table": ODD}}


def test_a_folder_with_any_sources_can_be_trained_on(tmp_path: Path) -> None:
    """The demo trains on groups of sources by name, which a folder of your own need not have."""
    publish(open_store(str(tmp_path / "data")), {"text_image": ("text_image", 40), "others": ("text_text", 9)})
    changes = {"vars.store": tmp_path, "vars.media": tmp_path}
    assert main(["plan", "jobs/folder.yaml", *(f"--set={name}={value}" for name, value in changes.items())]) == 0


def test_a_model_without_a_folder_is_an_error() -> None:
    done = demo("MODEL=a")
    assert done.returncode != 0
    assert "MODEL searches a folder: name it with MEDIA" in done.stderr


def test_a_table_and_a_folder_are_two_demos() -> None:
    done = demo("TABLE=a.csv", "MEDIA=b")
    assert done.returncode != 0
    assert "TABLE and MEDIA are two demos: name one of them" in done.stderr
