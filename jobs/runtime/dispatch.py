"""A checked spec to the handler of its kind."""

from __future__ import annotations

import importlib
from typing import Any

from jobs.runtime.cluster import set_environment
from jobs.spec.load import Document
from jobs.spec.schema import AblationSpec, FinetunesSpec, PipelineSpec, RetrainSpec, SoupSpec, Spec

_NAMING = AblationSpec | FinetunesSpec | PipelineSpec | RetrainSpec | SoupSpec  # these name other files

_ROOMS = {
    "corpus": "data",
    "ingest": "data",
    "index": "data",
    "train": "training",
    "finetunes": "sweeps",
    "soup": "sweeps",
    "ablation": "sweeps",
    "retrain": "workflows",
    "evaluate": "evaluation",
    "benchmark": "evaluation",
    "export": "serving",
    "embed": "embedding",
    "search": "serving",
    "pipeline": "workflows",
}


def named_specs(spec: Spec, document: Document) -> list[Spec]:
    """The checked specs of the files that a spec names, with what it changes in them; `document` is what it was read
    from.
    """
    if not isinstance(spec, _NAMING):
        return []
    named: list[Spec] = _handler(spec).named(spec, document)
    return named


def run_spec(spec: Spec, document: Document) -> dict[str, Any]:
    """Runs a checked spec in its handler, that of its kind. Returns what it made, under `outputs` its places."""
    set_environment()
    handler = _handler(spec)
    result: dict[str, Any] = handler.run(spec, document) if isinstance(spec, _NAMING) else handler.run(spec)
    return result


def _handler(spec: Spec) -> Any:
    return importlib.import_module(f"jobs.{_ROOMS[spec.kind]}.{spec.kind}")
