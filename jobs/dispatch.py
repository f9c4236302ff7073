"""A checked spec to the handler of its kind."""

from __future__ import annotations

import importlib
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
