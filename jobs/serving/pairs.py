"""The pair that a registry promotes, a model and the version of the corpus that it embedded, as servers read it.

One write of `champion.json` changes both. A server therefore never sees the model of one promotion and the corpus of
another.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NotRequired

from typing_extensions import TypedDict

from pipelines.config import PositiveInt
from pipelines.errors import UserError
from pipelines.storage.location import open_store
from pipelines.storage.store import Store
from pipelines.stored_json import parse_json, stored_file

if TYPE_CHECKING:
    from rzen.serving.place import Place

CHAMPION = "champion.json"
STORE = "RZEN_STORE"
FIX = "restore the file from a backup of the registry"


@stored_file
class PairFile(TypedDict):
    """What servers load: an exported model and a version of the vectors that it made."""

    model: str
    corpus: str
    corpus_version: str


@stored_file
class ChampionFile(TypedDict):
    """`champion.json`."""

    generation: PositiveInt
    model: str
    pair: NotRequired[PairFile | None]


def read_champion(data: bytes, registry: Store) -> ChampionFile:
    """Return the content of `champion.json`. Raises `UserError` for a damaged one."""
    return parse_json(
        data, f"{registry.url}/{CHAMPION}", ChampionFile, "restore the file from a backup of the registry"
    )


def read_pair(registry: Store) -> PairFile:
    """Return the pair that is promoted now. Raises `UserError` if there is none."""
    try:
        champion = read_champion(registry.read(CHAMPION), registry)
    except FileNotFoundError as error:
        problem = "has no champion yet"
        raise UserError(registry.url, problem, "run a job of kind retrain with `corpus`, or serve a model") from error
    pair = champion.get("pair")
    if pair is None:
        problem = f"promoted {champion['model']} without vectors of a corpus"
        raise UserError(registry.url, problem, "set `corpus` in the spec of kind retrain, or serve a model")
    return {"model": pair["model"], "corpus": pair["corpus"], "corpus_version": pair["corpus_version"]}


def find_place(settings: Mapping[str, Any]) -> Place:
    """Return where model and corpus are: those that are named, or the pair that the registry promotes now.

    `$RZEN_STORE` at the start of a URL is the variable of this machine: no shell reads the settings of a RayService.
    """
    from rzen.serving.place import Place

    found: dict[str, Any] = {
        name: _in_store(value) if isinstance(value, str) else value for name, value in settings.items()
    }
    if (registry := found.pop("registry", None)) is not None:
        found |= read_pair(open_store(registry, found.get("endpoint")))
    if "adapters" in found:
        found["adapters"] = tuple((name, _in_store(url)) for name, url in found["adapters"].items())
    if "dimensions" in found:
        found["dimensions"] = tuple(found["dimensions"])
    return Place(**found)


def _in_store(url: str) -> str:
    variable = f"${STORE}"
    if not url.startswith(variable):
        return url
    if STORE not in os.environ:
        raise UserError(url, f"{STORE} is not set", "set it on every node that answers, or name the whole URL")
    return os.environ[STORE] + url.removeprefix(variable)
