"""`python -m jobs.run SPEC [--set a.b=c]`, the same as `rzen run`; also the shebang of every shipped spec."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from jobs.cluster import set_environment
from jobs.load import Document
from jobs.spec import FinetunesSpec, PipelineSpec, Spec


def run_spec(spec: Spec, document: Document) -> dict[str, Any]:
    """Runs a checked spec in its handler, `jobs/{kind}.py`. Returns what it made, under `outputs` its places."""
    set_environment()
    handler = importlib.import_module(f"jobs.{spec.kind}")
    if isinstance(spec, FinetunesSpec | PipelineSpec):  # these name other files
        result: dict[str, Any] = handler.run(spec, document)
    else:
        result = handler.run(spec)
    return result


if __name__ == "__main__":
    from jobs.cli import main

    sys.exit(main(["run", *sys.argv[1:]]))
