"""A checked spec to the handler of its kind."""

from __future__ import annotations

import importlib
from typing import Any

from jobs.cluster import set_environment
from jobs.load import Document
from jobs.spec import AblationSpec, FinetunesSpec, PipelineSpec, Spec


def named_specs(spec: Spec, document: Document) -> list[Spec]:
    """The checked specs of the files that a spec names, with what it changes in them; `document` is what it was read
    from.
    """
    from jobs.ablation import resolve as resolve_arms
    from jobs.finetunes import resolve as resolve_runs
    from jobs.pipeline import resolve_stations

    match spec:
        case PipelineSpec():
            return [station for station, _ in resolve_stations(spec, document).values()]
        case FinetunesSpec():
            return list(resolve_runs(spec, document).values())
        case AblationSpec():
            runs, evaluate = resolve_arms(spec, document)
            return [*runs.values(), evaluate]
    return []


def run_spec(spec: Spec, document: Document) -> dict[str, Any]:
    """Runs a checked spec in its handler, `jobs/{kind}.py`. Returns what it made, under `outputs` its places."""
    set_environment()
    handler = importlib.import_module(f"jobs.{spec.kind}")
    if isinstance(spec, AblationSpec | FinetunesSpec | PipelineSpec):  # these name other files
        result: dict[str, Any] = handler.run(spec, document)
    else:
        result = handler.run(spec)
    return result
