"""Command `new`: a spec of your own, to start from."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from jobs.commands.options import read_spec
from jobs.commands.output import print_text
from jobs.spec.explain import explain
from jobs.spec.kinds import find_kind
from jobs.spec.load import read_document, shipped_specs
from jobs.spec.schema import schema_of_all
from pipelines.errors import UserError

SHEBANG = "#!/usr/bin/env -S python -m jobs.run"
SCHEMA = "rzen.schema.json"
_WIDTH = 100  # letters of a line


def new(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="kind of job: `rzen kinds` lists them")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file to write")],
) -> None:
    """Write a spec of your own: executable, on top of a shipped spec, checked by editors.

    Says what is left to fill in. The file may be in any folder. An existing file is never replaced.
    """
    from jobs.runtime.dispatch import named_specs

    summary = find_kind(kind).summary
    if file.exists():
        raise UserError(str(file), "exists already", "name another file")
    base = _shipped_spec(kind)
    lines = [SHEBANG, f"# yaml-language-server: $schema={SCHEMA}", f"# {summary}"]
    if base is None:
        lines += [f"kind: {kind}", *_required(kind)]
    else:
        lines += [f"base: {base}            # `rzen explain --kind {kind}` lists the settings that you can change here"]
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = file.parent / SCHEMA
    if not schema.exists():
        schema.write_text(json.dumps(schema_of_all(), indent=1) + "\n")
    file.write_text("\n".join(lines) + "\n")
    file.chmod(0o755)
    try:
        named_specs(*read_spec(str(file), None))
    except UserError as error:
        print_text(f"{file}: fill in what is missing:\n{error}")
    else:
        print_text(
            f"{file}: valid {kind} job; `rzen submit {file}` sends it to a cluster, `rzen run {file}` runs it here"
        )


def _shipped_spec(kind: str) -> str | None:
    """Return the shipped spec of a kind, the one of its name first. None for a kind of another package."""
    names = sorted(shipped_specs(), key=lambda name: Path(name).stem != kind)
    return next((name for name in names if read_document(name).data.get("kind") == kind), None)


def _required(kind: str) -> list[str]:
    """Return the settings that a spec of a kind must have, as comments with their documentation."""
    (whole,) = explain("", kind)
    lines = []
    for name, text in whole.setting.settings.items():
        (found,) = explain(name, kind)
        if found.setting.required and name != "kind":
            lines += [f"# {line}" for line in textwrap.wrap(text, _WIDTH)] + [f"# {name}:"]
    return lines
