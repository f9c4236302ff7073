"""What commands that take a spec share: their options, and how a spec is read, changed and run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.commands.output import print_error, print_text
from jobs.spec.job import JobConfig
from jobs.spec.kinds import find_kind
from jobs.spec.load import Document, check, override, read_document
from jobs.spec.no_effect import warnings
from pipelines.errors import UserError
from pipelines.redaction import redacted

SpecPath = Annotated[str, typer.Argument(metavar="SPEC", help="YAML file", show_default=True)]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="A.B=C",
        help="change a setting, such as optim.lr=1e-4 (value in YAML; may be repeated)",
        show_default=False,
    ),
]
ResultAsJson = Annotated[
    bool, typer.Option("--json", help="print the result as JSON, and progress to the standard error")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, for scripts")]


Address = Annotated[
    str | None,
    typer.Option(
        help="address of the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, then RAY_ADDRESS, then "
        "http://127.0.0.1:8265)",
        show_default=False,
    ),
]


def gpus_here() -> dict[str, Any]:
    """Return the setting by which models run on the CPUs of this machine, if it has no GPU and no cluster is named."""
    if Path("/dev/nvidia0").exists() or "RAY_ADDRESS" in os.environ:
        return {}
    return {"gpus_per_actor": 0}


def read_spec(path: str, changes: Sequence[str] | None, kind: str | None = None) -> tuple[JobConfig, Document]:
    """Return the checked spec of a file with each `a.b=c` of `changes` on top, and the document it was read from.

    Raise `UserError` if the spec is not of the `kind` that the command takes.
    """
    document = override(read_document(path), changes or ())
    spec = check(document)
    if kind and spec.kind != kind:
        raise UserError(path, f"kind={spec.kind!r} is not a spec of kind {kind}", f"use `rzen run {path}`")
    return spec, document


def run_file(
    path: str,
    changes: Sequence[str] | None,
    settings: Mapping[str, Any] | None = None,
    *,
    kind: str | None = None,
    as_json: bool = False,
) -> None:
    """Run the spec of a file with `settings` (dotted key -> value) and then `changes` on top.

    Print its result as JSON if asked for, else only the outputs if the command is quiet. Raise `UserError` if the spec
    is not of the `kind` that the command runs.
    """
    from jobs.runtime.cluster import set_environment
    from jobs.runtime.dispatch import named_specs, run_spec
    from jobs.runtime.progress import is_quiet

    spec, document = read_spec(path, [*as_changes(settings or {}), *(changes or ())], kind)
    set_environment()  # before the libraries that read it, which the next line imports
    print_warnings(spec, named_specs(spec, document), document)
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            result = run_spec(spec, document)
    except KeyboardInterrupt:
        does = "resumes from the last finished job or checkpoint" if find_kind(spec.kind).resumes else "starts again"
        raise KeyboardInterrupt(f"the same command {does}") from None
    if as_json:
        print_json(result)
    elif is_quiet():
        for place in result["outputs"]:
            print_text(place)


def print_warnings(spec: JobConfig, named: Sequence[JobConfig], document: Document) -> None:
    """Print the settings without effect of a spec, and of those that it names, to the standard error."""
    from jobs.runtime.progress import is_quiet

    if is_quiet():
        return
    for text in warnings(spec, named, document):
        print_error(f"warning: {text}")


def as_changes(settings: Mapping[str, Any]) -> list[str]:
    """Return dotted key -> value as `key=value` texts. JSON is YAML, so that every value is read as it was given."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def print_yaml(content: Any) -> None:
    """Print the same as YAML, for people."""
    import yaml

    print_text(yaml.safe_dump(json.loads(json.dumps(redacted(content))), sort_keys=False, allow_unicode=True), end="")


def print_json(content: Any) -> None:
    """Print JSON for scripts."""
    print_text(json.dumps(redacted(content), indent=1))
