"""Settings that every kind of job shares, and the types that specs are built from."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field

from pipelines.config import Config, NonNegativeInt

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=60)]
T = TypeVar("T")


def _without_none(entries: object) -> object:
    return {k: v for k, v in entries.items() if v is not None} if isinstance(entries, dict) else entries


Named = Annotated[dict[Name, T], BeforeValidator(_without_none)]
"""Name -> entry. `null` removes an entry of the file that this one is based on."""


class FileChanges(Config):
    """A spec file that another spec names, and the changes to it."""

    spec: str
    """YAML file of the job, relative to the file that names it."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Changes to that file, as nested mappings."""


class SubmitConfig(Config):
    """How `rzen submit` hands the job to a cluster. `rzen run` ignores these settings."""

    cpus: Annotated[float, Field(ge=0)] = 0.0
    """Logical CPUs that the job's own process reserves. With more than 0 it may run on a node other than the head."""
    memory_bytes: NonNegativeInt = 0
    """Memory in bytes that the job's own process reserves."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the job and its workers. The dashboard shows them: put no secrets here."""
    excludes: list[str] = Field(default_factory=list)
    """What is not sent to the cluster, as patterns of .gitignore: `data/`, `*.bin`. They are added to those of
    .gitignore and .rayignore files. Files of the spec are always sent."""
    retries: NonNegativeInt = 0
    """How often `rzen submit` repeats a job whose process was lost with its node. A job that ended by itself, or that
    could not be placed, is not repeated. It would end the same way again."""


class JobConfig(Config):
    """Base of every spec. A kind of job adds its settings in a subclass (`jobs/spec/kinds.py`)."""

    kind: str
    """Kind of the job: one of those that `rzen kinds` lists."""
    submit: SubmitConfig = SubmitConfig()
    """How `rzen submit` hands the job to a cluster."""
