"""What commands that take a spec share: their options, and how a spec is read, changed and run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from jobs.commands.output import print_error, print_text
from jobs.spec.job import JobConfig
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
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, for scripts")]


def read_spec(path: str, changes: Sequence[str] | None) -> tuple[JobConfig, Document]:
    """Return the checked spec of a file with each `a.b=c` of `changes` on top, and the document it was read from."""
    document = override(read_document(path), changes or ())
    return check(document), document


def run_file(
    path: str, changes: Sequence[str] | None, settings: Mapping[str, Any] | None = None, kind: str | None = None
) -> None:
    """Run the spec of a file with `settings` (dotted key -> value) and then `changes` on top.

    Raise `UserError` if the spec is not of the `kind` that the command runs.
    """
    from jobs.runtime.dispatch import named_specs, run_spec

    spec, document = read_spec(path, [*as_changes(settings or {}), *(changes or ())])
    if kind and spec.kind != kind:
        raise UserError(path, f"kind={spec.kind!r} is not a spec of kind {kind}", f"use `rzen run {path}`")
    print_warnings(spec, named_specs(spec, document), document)
    run_spec(spec, document)


def print_warnings(spec: JobConfig, named: Sequence[JobConfig], document: Document) -> None:
    """Print the settings without effect of a spec, and of those that it names, to the standard error."""
    for text in warnings(spec, named, document):
        print_error(f"warning: {text}")


def as_changes(settings: Mapping[str, Any]) -> list[str]:
    """Return dotted key -> value as `key=value` texts. JSON is YAML, so that every value is read as it was given."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def print_json(content: Any) -> None:
    """Print JSON for scripts."""
    print_text(json.dumps(redacted(content), indent=1))
