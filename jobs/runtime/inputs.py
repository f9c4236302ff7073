"""Refuses a job whose models or data do not exist, in a second and before Ray starts.

No weights are read. What is in the files is checked by whoever reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from pydantic import BaseModel

from jobs.spec.job import JobConfig
from jobs.spec.kinds import InputType, find_kind
from pipelines.candidates.table import open_table
from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.storage.location import exists
from pipelines.storage.urls import is_local, local_path
from rzen.embedding.corpus import read_manifest
from rzen.model.locate import check_adapter, check_checkpoint

_Check = Callable[[str, str | None], None]
"""Takes a place and an S3 endpoint."""


def check_inputs(spec: JobConfig) -> None:
    """Raise `UserError` for the first setting that names something missing, or something else than it must."""
    kind = find_kind(spec.kind)
    for key, wanted in (kind.inputs(spec) if kind.inputs else {}).items():
        value: Any = spec
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
        _check(key, value, wanted, getattr(spec, "endpoint", None))


def _check(key: str, value: Any, wanted: InputType, endpoint: str | None) -> None:
    if isinstance(value, DataConfig):
        with errors_of(f"{key}.root", value.root):
            _refuse_file(value.root)
            Reader(value).sizes()
        return
    for setting, place, type_ in _places(key, value, wanted):
        with errors_of(setting, place):
            _CHECKS[type_](place, endpoint)


@contextmanager
def errors_of(setting: str, place: str) -> Iterator[None]:
    """Put a setting and its value before the place of a `UserError` of the block."""
    try:
        yield
    except UserError as error:
        inside = "" if error.place == place else f"{error.place}: "
        raise UserError(f"{setting}={place}", f"{inside}{error.problem}", error.fix) from error


def _places(key: str, value: Any, wanted: InputType) -> Iterator[tuple[str, str, InputType]]:
    """Yield setting, place and type of each place in a value: a text, a model, or several of them by name."""
    if isinstance(value, str):
        yield key, value, wanted
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _places(f"{key}.{name}", inner, wanted)
    elif isinstance(value, BaseModel):
        adapter: str | None = getattr(value, "adapter", None)
        # An adapter says what the two together are.
        yield f"{key}.base", getattr(value, "base"), "checkpoint" if adapter else wanted  # noqa: B009
        if adapter:
            yield f"{key}.adapter", adapter, "adapter"


def _check_any_split(root: str, endpoint: str | None) -> None:
    _refuse_file(root)
    if not exists(root, endpoint):
        raise UserError(root, "does not exist", "name the output of `rzen ingest` or `rzen index`")


def _check_table(url: str, endpoint: str | None) -> None:
    _refuse_file(url)
    open_table(url, endpoint)


def _check_vectors(url: str, endpoint: str | None) -> None:
    _refuse_file(url)
    read_manifest(url, endpoint)


def _check_folder(url: str, endpoint: str | None) -> None:
    _refuse_file(url)
    if not exists(url, endpoint):
        problem = "holds no files" if is_local(url) and local_path(url).is_dir() else "does not exist"
        raise UserError(url, problem, "name a folder of files")


def _refuse_file(url: str) -> None:
    if is_local(url) and local_path(url).is_file():
        raise UserError(url, "is a file", "name a folder")


_CHECKS: dict[InputType, _Check] = {
    "embedder": partial(check_checkpoint, makes_vectors=True),
    "checkpoint": check_checkpoint,
    "adapter": check_adapter,
    "dataset": _check_any_split,
    "vectors": _check_vectors,
    "table": _check_table,
    "folder": _check_folder,
}
