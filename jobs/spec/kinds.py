"""The kinds of job, and what the rest of rzen has to know about each of them.

A kind is declared once, as a `Kind` next to its spec class in its own folder (`jobs/data/specs.py`). Everything that
differs from kind to kind is asked here: validation, dispatch, pipelines, submission, the command line and the
generator of Kubernetes manifests. This module names the declarations and imports them when they are needed, so that
checking a spec loads neither torch nor Ray.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Literal

from jobs.spec.job import JobConfig
from jobs.spec.nearest import did_you_mean
from jobs.spec.no_effect import NoEffect
from pipelines.errors import UserError
from pipelines.storage.urls import is_local

GROUP = "rzen.kinds"
"""Entry point group in which an installed package registers kinds of its own: `name = "module:KIND"`."""
_BUILT_IN = {
    "corpus": "jobs.data.specs:CORPUS",
    "emoji": "jobs.data.specs:EMOJI",
    "ingest": "jobs.data.specs:INGEST",
    "index": "jobs.data.specs:INDEX",
    "export_data": "jobs.data.specs:EXPORT_DATA",
    "curate": "jobs.curation.specs:CURATE",
    "train": "jobs.training.kind:TRAIN",
    "finetunes": "jobs.sweeps.specs:FINETUNES",
    "soup": "jobs.sweeps.specs:SOUP",
    "ablation": "jobs.sweeps.specs:ABLATION",
    "retrain": "jobs.workflows.specs:RETRAIN",
    "evaluate": "jobs.evaluation.specs:EVALUATE",
    "export": "jobs.serving.specs:EXPORT",
    "embed": "jobs.embedding.specs:EMBED",
    "mine": "jobs.mining.specs:MINE",
    "select": "jobs.mining.specs:SELECT",
    "cluster": "jobs.mining.specs:CLUSTER",
    "judge": "jobs.judging.specs:JUDGE",
    "check": "jobs.serving.specs:CHECK",
    "search": "jobs.serving.specs:SEARCH",
    "serve": "jobs.serving.specs:SERVE",
    "pipeline": "jobs.workflows.specs:PIPELINE",
}
InputType = Literal["embedder", "checkpoint", "adapter", "dataset", "vectors", "table", "folder"]
"""What a setting must name. An `embedder` is a checkpoint that makes vectors, which a re-ranker does not."""


@dataclass(frozen=True)
class Kind:
    """What rzen knows about a kind of job. Functions are dotted names, such as `jobs.data.ingest:run`."""

    name: str
    spec: type[JobConfig]
    """Settings of the job. The first line of its docstring describes the kind."""
    run: str
    """Handler: `run(spec)`, or `run(spec, document)` for a kind with `named`. It returns a JSON object whose `outputs`
    lists the places that it wrote."""
    reads: Mapping[str, str]
    """Setting -> what the job reads there."""
    makes: Mapping[str, str]
    """Setting -> what the job writes there."""
    inputs: Callable[[Any], Mapping[str, InputType]] | None = None
    """Function of a checked spec: setting -> what must exist there when the job starts. The job is refused otherwise,
    before it connects to Ray. Settings that are null, and what the job itself makes, are left out."""
    named: str | None = None
    """Function `named(spec, document)`: the checked specs of the files that a spec names, with the changes to them."""
    fingerprint: str | None = None
    """Function `fingerprint(spec)`: identifies the raw files that the job reads, as JSON. A pipeline repeats the job
    when it changes. Jobs that only read what earlier jobs wrote need none."""
    gpus: Callable[[Any, Sequence[JobConfig]], float] | None = None
    """How many GPUs the job can use at once, from its spec and the specs that it names."""
    local: str = ""
    """Why every job of the kind needs local files and so has no RayJob on Kubernetes. Such kinds have no `gpus`."""
    places: Callable[[Any], Mapping[str, str]] | None = None
    """Function of a checked spec: setting -> path or URL that tasks on any node read or write. Where one is on a local
    disk, all nodes must share it."""
    no_effect: tuple[NoEffect, ...] = ()
    """Settings that have no effect under a condition. `rzen validate` and `rzen run` warn of them."""
    impossible: Callable[[Any], str | None] | None = None
    """Function of a checked spec: what cannot work on the cluster that it asks for. An error when a file is checked."""
    resumes: bool = True
    """Whether the same command resumes an interrupted job. Otherwise it starts again."""
    not_science: frozenset[str] = frozenset({"submit"})
    """Settings, as dotted keys, that never change the result: they are not part of a run's identity."""

    def __post_init__(self) -> None:
        if (self.gpus is None) != bool(self.local):
            raise ValueError(f"kind {self.name!r} must have either `gpus` or a reason to be `local`")

    @property
    def summary(self) -> str:
        """One sentence about the kind."""
        return (self.spec.__doc__ or "").strip().splitlines()[0]

    def science(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings (plain, as JSON) that decide the result: all but `not_science`."""
        kept = dict(settings)
        for key in self.not_science:
            _remove(kept, key)
        return kept


def _remove(settings: dict[str, Any], key: str) -> None:
    """Remove a dotted key, copying the mappings on the way."""
    first, dot, rest = key.partition(".")
    if not dot:
        settings.pop(first, None)
    elif isinstance(inner := settings.get(first), dict):
        settings[first] = dict(inner)
        _remove(settings[first], rest)


@cache
def kind_names() -> dict[str, str]:
    """Return name -> dotted name of the declaration: the kinds of rzen, then those of installed packages."""
    installed = {point.name: point.value for point in entry_points(group=GROUP)}
    return _BUILT_IN | {name: value for name, value in installed.items() if name not in _BUILT_IN}


def find_kind(name: str) -> Kind:
    """Return the kind of this name. Raise `UserError` if there is none, or if its package cannot be imported."""
    declared = _BUILT_IN.get(name) or kind_names().get(name)
    if declared is None:
        raise UserError(f"kind {name!r}", "is not a kind of job", did_you_mean(name, kind_names()))
    try:
        found = pkgutil.resolve_name(declared)
    except (ImportError, AttributeError) as error:
        raise UserError(f"kind {name!r}", f"{declared} cannot be imported: {error}", "fix its entry point") from error
    if not isinstance(found, Kind) or found.name != name:
        raise UserError(f"kind {name!r}", f"{declared} is not the declaration of {name!r}", "fix its entry point")
    return found


def gpus_of(spec: JobConfig, named: Sequence[JobConfig] = ()) -> float:
    """Return how many GPUs a job can use at once. `named` are the specs that it names."""
    gpus = find_kind(spec.kind).gpus
    return gpus(spec, named) if gpus else 0.0


def local_places(spec: JobConfig) -> dict[str, str]:
    """Return setting -> place of a spec that is on a local disk, where nodes of a cluster would look in vain."""
    places = find_kind(spec.kind).places
    return {setting: url for setting, url in places(spec).items() if is_local(url)} if places else {}


def no_gpus(spec: JobConfig, named: Sequence[JobConfig]) -> float:
    """Return 0, for kinds that use no GPU."""
    return 0.0
