"""The model registry in a store: published models, the champion, and the history of promotions.

    models/{id}/            adapter or model, and lineage.json, which is written last; never changed
    exports/{id}/           the same with its base, for servers, if retraining embeds a corpus
    corpora/{id}/           vectors of that corpus by the model
    promotions/000003.json  third promotion: model, the champion before it, reason and gate report, and the pair that
                            servers load: the export, and a version of the vectors; never changed
    champion.json           copy of the newest promotion for whoever serves the model; at most one promotion behind
    retrainings/{id}.json   what a scheduled retraining run did
    lease.json              who retrains at present, and until when

A promotion belongs to the process that writes the next number first. `champion.json` follows. If a process dies
between the two writes, the next one that reads the registry writes `champion.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypeVar

from typing_extensions import TypedDict

from jobs.runtime.lease import Lease, hold_lease
from jobs.runtime.records import as_json, signature
from jobs.serving.pairs import CHAMPION, FIX, PairFile, read_champion
from pipelines.config import PositiveInt
from pipelines.errors import UserError
from pipelines.storage.location import open_store
from pipelines.storage.publish import claim, is_published, publish_folder
from pipelines.storage.store import Store
from pipelines.stored_json import parse_json, stored_file

KIND = "registry"
LINEAGE = "lineage.json"
MODELS, PROMOTIONS, RETRAININGS = "models", "promotions", "retrainings"
EXPORTS, CORPORA = "exports", "corpora"

T = TypeVar("T")


@stored_file
class PromotionFile(TypedDict):
    """A file of `promotions/`."""

    generation: PositiveInt
    model: str
    previous: str | None
    reason: str
    at: str
    by: str
    report: dict[str, Any] | None
    pair: NotRequired[PairFile | None]


@stored_file
class Verdict(TypedDict):
    """What the gate decided."""

    promote: bool
    reasons: list[str]


@stored_file
class LineageFile(TypedDict):
    """`lineage.json` of a model."""

    id: str
    at: str
    by: str
    base: NotRequired[str | None]
    data: NotRequired[dict[str, Any]]
    verdict: NotRequired[Verdict]


@stored_file
class RetrainingFile(TypedDict):
    """A file of `retrainings/`."""

    id: str
    at: str
    outcome: str
    data: NotRequired[dict[str, Any]]


@dataclass(frozen=True)
class Champion:
    """The model in use, and the number of its promotion, from 1 on."""

    generation: int
    model: str


class Registry:
    """Models below one folder of a store. No two writers overwrite each other's records."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def publish(self, model: str, folder: Path, lineage: Mapping[str, Any]) -> None:
        """Add a model. It exists once its lineage is written. Raise `UserError` if there is one of this id already."""
        place = self.store.child(MODELS).child(model)
        claim(self.store, KIND)
        if place.exists(LINEAGE):
            raise UserError(place.url, "is there already, and models never change", "publish it under another id")
        publish_folder(folder, place)
        content = {**lineage, "id": model, **signature()}
        if not place.write_if(LINEAGE, as_json(content), None):
            problem = "was published by another process at the same time"
            raise UserError(place.url, problem, "compare the two: rzen registry show")

    def has(self, model: str) -> bool:
        """Return whether a complete model of this id is there."""
        return self.store.child(MODELS).child(model).exists(LINEAGE)

    def models(self) -> list[str]:
        """Return the ids of all models, oldest first."""
        names = {path.split("/")[1] for path in self.store.list(MODELS) if path.endswith(f"/{LINEAGE}")}
        return sorted(names, key=lambda model: (self.lineage(model)["at"], model))

    def lineage(self, model: str) -> dict[str, Any]:
        """Return what a model was made of, and how. Raise `UserError` if there is no such model."""
        try:
            return {**_read(self.store, f"{MODELS}/{model}/{LINEAGE}", LineageFile)}
        except FileNotFoundError as error:
            raise UserError(self.store.url, f"has no model {model!r}", "rzen registry list prints the ids") from error

    def url(self, model: str) -> str:
        """Return the folder of a model."""
        return self.store.child(MODELS).child(model).url

    def champion(self) -> Champion | None:
        """Return the newest promotion, and write `champion.json` if it is behind. None before the first promotion."""
        newest = self._newest()
        if newest == 0:
            return None
        promotion = _read(self.store, _path(newest), PromotionFile)
        pointer, tag = self._pointer()
        if pointer < newest:
            content = {
                "generation": newest,
                "model": promotion["model"],
                "url": self.url(promotion["model"]),
                "pair": promotion.get("pair"),
                **signature(),
            }
            self.store.write_if(CHAMPION, as_json(content), tag)  # if it fails, another process has done it
        return Champion(newest, str(promotion["model"]))

    def pair(self, model: str) -> PairFile | None:
        """Return what servers load of a model: its export, and the live vectors of its corpus. None without both."""
        from rzen.embedding.corpus import read_vectors_file

        export, corpus = self.exports(model), self.corpora(model)
        if not is_published(export):
            return None
        try:
            version = read_vectors_file(corpus).get("version")
        except FileNotFoundError:
            return None
        return (version and PairFile(model=export.url, corpus=corpus.url, corpus_version=version)) or None

    def exports(self, model: str) -> Store:
        """Return the folder of a model with its base, for servers."""
        return self.store.child(EXPORTS).child(model)

    def corpora(self, model: str) -> Store:
        """Return the folder of the corpus that a model embedded."""
        return self.store.child(CORPORA).child(model)

    def promote(
        self,
        model: str,
        *,
        reason: str,
        instead_of: Champion | None,
        report: Mapping[str, Any] | None = None,
        pair: PairFile | None = None,
    ) -> Champion:
        """Make a model the champion, and `pair` what servers load. `instead_of` is the champion it was compared with.

        Raise `UserError` if the champion is another one by now, if there is no such model, or no such version of the
        corpus.
        """
        self.lineage(model)
        if pair is not None:
            self._check_version(pair)
        generation = (instead_of.generation if instead_of else 0) + 1
        content = {
            "generation": generation,
            "model": model,
            "previous": instead_of.model if instead_of else None,
            "reason": reason,
            "report": report,
            "pair": pair,
            **signature(),
        }
        if self._newest() >= generation or not self.store.write_if(_path(generation), as_json(content), None):
            now = self.champion()
            problem = f"has another champion by now: {now.model if now else 'none'}"
            raise UserError(self.store.url, problem, "give the command again to compare with that one")
        promoted = self.champion()
        assert promoted is not None
        return promoted

    def rollback(self, reason: str) -> Champion:
        """Promote the champion before the present one again, with the pair that servers loaded then.

        Raise `UserError` if there was none, or if its version of the corpus is gone.
        """
        now = self.champion()
        previous = _read(self.store, _path(now.generation), PromotionFile)["previous"] if now else None
        if now is None or previous is None:
            raise UserError(self.store.url, "has no champion before the present one", "rzen registry promote MODEL")
        before = [one for one in self.promotions()[: now.generation - 1] if one["model"] == previous]
        return self.promote(previous, reason=reason, instead_of=now, pair=before[-1].get("pair") if before else None)

    def _check_version(self, pair: PairFile) -> None:
        from rzen.embedding.corpus import read_version

        store = open_store(pair["corpus"], getattr(self.store, "endpoint", None))
        if read_version(store, pair["corpus_version"]) is None:
            problem = f"has no version {pair['corpus_version']} any more"
            fix = "embed the corpus again with the model, and give `rzen registry promote MODEL`"
            raise UserError(pair["corpus"], problem, fix)

    def promotions(self) -> list[dict[str, Any]]:
        """Return all promotions, oldest first."""
        return [{**_read(self.store, path, PromotionFile)} for path in self.store.list(PROMOTIONS)]

    def record(self, id: str, content: Mapping[str, Any]) -> None:
        """Replace the record of a retraining run."""
        self.store.write(f"{RETRAININGS}/{id}.json", as_json({**content, "id": id, **signature()}))

    def retraining(self, id: str) -> dict[str, Any]:
        """Return the record of a retraining run, empty if it is new."""
        path = f"{RETRAININGS}/{id}.json"
        return {**_read(self.store, path, RetrainingFile)} if self.store.exists(path) else {}

    def retrainings(self) -> list[dict[str, Any]]:
        """Return the records of all retraining runs, oldest first."""
        found = [{**_read(self.store, path, RetrainingFile)} for path in self.store.list(RETRAININGS)]
        return sorted(found, key=lambda retraining: str(retraining["at"]))

    @contextmanager
    def lease(self, seconds: float) -> Iterator[Lease]:
        """Hold the right to retrain while the block runs. Raise `UserError` if another process holds it."""
        claim(self.store, KIND)
        with hold_lease(self.store, seconds, "retrains") as lease:
            yield lease

    def _newest(self) -> int:
        paths = self.store.list(PROMOTIONS)
        if other := [path for path in paths if not re.fullmatch(rf"{PROMOTIONS}/\d{{6,}}\.json", path)]:
            raise UserError(f"{self.store.url}/{other[0]}", "is not a promotion", "move it elsewhere")
        return max((int(Path(path).stem) for path in paths), default=0)

    def _pointer(self) -> tuple[int, str | None]:
        if not self.store.exists(CHAMPION):
            return 0, None
        data, tag = self.store.read_tagged(CHAMPION)
        return read_champion(data, self.store)["generation"], tag


def _path(generation: int) -> str:
    return f"{PROMOTIONS}/{generation:06d}.json"


def _read(store: Store, path: str, kind: type[T]) -> T:
    return parse_json(store.read(path), f"{store.url}/{path}", kind, FIX)
