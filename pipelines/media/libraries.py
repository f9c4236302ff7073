"""The libraries that decode media: which are used, and how optional ones are imported."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from pipelines.config import MediaConfig
from pipelines.imports import import_extra, without_modules
from pipelines.media.sandbox import exclude_from_cpu_limit
from pipelines.samples import MediaKind

# What a library imports in addition if it is installed. Networks that recognize the layout of pages would triple the
# CPU time of importing pymupdf, to 0.9 s in every process that decodes.
_UNUSED = {"pymupdf": ("pymupdf.layout", "pymupdf4llm")}
_DISTRIBUTION = {"pyav": "av"}  # names of packages that differ from those of the settings


def library_versions(config: MediaConfig) -> dict[MediaKind, str]:
    """Return the libraries and versions that decode each kind of media, for the record of a job."""
    libraries: dict[MediaKind, list[str]] = {
        "image": ["pillow", "pillow-heif"] if find_spec("pillow_heif") else ["pillow"],
        "video": [config.video_backend],
        "document": [config.document_backend],
    }
    return {
        kind: ", ".join(f"{name} {version(_DISTRIBUTION.get(name, name))}" for name in names)
        for kind, names in libraries.items()
    }


def import_optional(library: str, setting: str, instead: str) -> Any:
    """Import a library that a setting asks for. Raises `UserError` if it is not installed.

    `instead` is the value of the setting that needs no extra. The import does not count towards the CPU limit of a
    sandbox.
    """
    with exclude_from_cpu_limit(), without_modules(*_UNUSED.get(library, ())):
        return import_extra(library, library, f"{setting}={library}", f"{setting}: {instead}")
