"""Runs a checked spec in the handler of its kind."""

from __future__ import annotations

import logging
import pkgutil
from typing import Any

from jobs.runtime.cluster import set_environment
from jobs.spec.job import JobConfig
from jobs.spec.kinds import find_kind
from jobs.spec.load import Document
from pipelines.imports import without_garbage_collection

_log = logging.getLogger(__name__)


def named_specs(spec: JobConfig, document: Document) -> list[JobConfig]:
    """Return the checked specs of the files that a spec names, with its changes to them.

    `document` is what the spec was read from.
    """
    kind = find_kind(spec.kind)
    if kind.named is None:
        return []
    named: list[JobConfig] = pkgutil.resolve_name(kind.named)(spec, document)
    return named


def run_spec(spec: JobConfig, document: Document) -> dict[str, Any]:
    """Run a checked spec in the handler of its kind. Return its result: `outputs` lists the places that it wrote.

    Raises `UserError` at once for models and data that do not exist.
    """
    from jobs.runtime.inputs import check_inputs  # checking a spec needs none of it

    set_environment()
    kind = find_kind(spec.kind)
    check_inputs(spec)
    _log.info("kind %s: %s", kind.name, kind.run)
    with without_garbage_collection():
        handler = pkgutil.resolve_name(kind.run)
    result: dict[str, Any] = handler(spec, document) if kind.named else handler(spec)
    return result


def raw_input(spec: JobConfig) -> Any:
    """Return what identifies the raw files that a job reads, as JSON. None for a job that reads no raw files."""
    fingerprint = find_kind(spec.kind).fingerprint
    return pkgutil.resolve_name(fingerprint)(spec) if fingerprint else None
