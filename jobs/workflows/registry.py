"""The registry of models in a store: what was made, which one is the champion, and how it came to that.

models/{id}/            adapter or model, as `publish_folder` writes it, and lineage.json, written last, never changed
promotions/000003.json  the third champion: model, the one before it, reason and gate; never changed
champion.json           the newest promotion again, for whoever serves it; at most one promotion behind
retrainings/{id}.json       what a scheduled retraining did
lease.json              who retrains now, and until when

A promotion is whoever writes the next number first. `champion.json` follows; a promoter that dies between the two
leaves the rest to the next one who looks.
"""

from __future__ import annotations

import getpass
import json
import platform
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.runtime.models import publish_folder
from jobs.runtime.records import as_json
from pipelines.errors import UserError
from pipelines.storage.store import Store

CHAMPION, LEASE, MODELS, PROMOTIONS, RETRAININGS, LINEAGE = (
    "champion.json",
    "lease.json",
    "models",
    "promotions",
    "retrainings",
    "lineage.json",
)


@dataclass(frozen=True)
class Champion:
    """The model that is in use, by the promotion of this number (from 1 on)."""

    generation: int
    model: str


class Registry:
    """Models below one folder of a store. Everything is written so that no two writers undo each other."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def publish(self, model: str, folder: Path, lineage: Mapping[str, Any]) -> None:
        """Adds a model, which is there when its lineage is. Raises `UserError` if there is one of this id already."""
        place = self.store.child(MODELS).child(model)
        if place.exists(LINEAGE):
            raise UserError(place.url, "is there already, and models never change", "publish it under another id")
        publish_folder(folder, place)
        content = {**lineage, "id": model, **_signature()}
        if not place.write_if(LINEAGE, as_json(content), None):
            raise UserError(
                place.url, "was published by somebody else at the same time", "look at it: rzen registry show"
            )

    def has(self, model: str) -> bool:
        """Whether a model of this id is there, whole."""
        return self.store.child(MODELS).child(model).exists(LINEAGE)

    def models(self) -> list[str]:
        """Ids of all models, oldest first."""
        names = {path.split("/")[1] for path in self.store.list(MODELS) if path.endswith(f"/{LINEAGE}")}
        return sorted(names, key=lambda model: (self.lineage(model)["at"], model))

    def lineage(self, model: str) -> dict[str, Any]:
        """What a model was made of, and how. Raises `UserError` if there is no such model."""
        try:
            return _read(self.store, f"{MODELS}/{model}/{LINEAGE}")
        except FileNotFoundError as error:
            raise UserError(self.store.url, f"has no model {model!r}", "rzen registry list tells the ids") from error

    def url(self, model: str) -> str:
        """Folder of a model."""
        return self.store.child(MODELS).child(model).url

    def champion(self) -> Champion | None:
        """The newest promotion; brings `champion.json` up to it. None before the first."""
        newest = self._newest()
        if newest == 0:
            return None
        promotion = _read(self.store, _path(newest))
        pointer, tag = self._pointer()
        if pointer < newest:
            content = {
                "generation": newest,
                "model": promotion["model"],
                "url": self.url(promotion["model"]),
                **_signature(),
            }
            self.store.write_if(CHAMPION, as_json(content), tag)  # if it fails, another has done it
        return Champion(newest, str(promotion["model"]))

    def promote(
        self, model: str, *, reason: str, instead_of: Champion | None, report: Mapping[str, Any] | None = None
    ) -> Champion:
        """Makes a model the champion in place of the one that the decision was about.

        Raises `UserError` if there is another champion by now, or no such model.
        """
        self.lineage(model)
        generation = (instead_of.generation if instead_of else 0) + 1
        content = {
            "generation": generation,
            "model": model,
            "previous": instead_of.model if instead_of else None,
            "reason": reason,
            "report": report,
            **_signature(),
        }
        if self._newest() >= generation or not self.store.write_if(_path(generation), as_json(content), None):
            now = self.champion()
            problem = f"has another champion by now: {now.model if now else 'none'}"
            raise UserError(self.store.url, problem, "compare with that one: give the command again")
        promoted = self.champion()
        assert promoted is not None
        return promoted

    def rollback(self, reason: str) -> Champion:
        """Promotes the model that was the champion before, once more. Raises `UserError` if there was none."""
        now = self.champion()
        previous = _read(self.store, _path(now.generation))["previous"] if now else None
        if previous is None:
            raise UserError(self.store.url, "has no champion before the present one", "rzen registry promote MODEL")
        return self.promote(str(previous), reason=reason, instead_of=now)

    def promotions(self) -> list[dict[str, Any]]:
        """All of them, oldest first."""
        return [_read(self.store, path) for path in self.store.list(PROMOTIONS)]

    def record(self, id: str, content: Mapping[str, Any]) -> None:
        """Replaces what is known of a retraining run."""
        self.store.write(f"{RETRAININGS}/{id}.json", as_json({**content, "id": id, **_signature()}))

    def retraining(self, id: str) -> dict[str, Any]:
        """What is known of a retraining run; nothing, if it is new."""
        path = f"{RETRAININGS}/{id}.json"
        return _read(self.store, path) if self.store.exists(path) else {}

    def retrainings(self) -> list[dict[str, Any]]:
        """All of them, oldest first."""
        found = [_read(self.store, path) for path in self.store.list(RETRAININGS)]
        return sorted(found, key=lambda retraining: str(retraining["at"]))

    @contextmanager
    def lease(self, seconds: float) -> Iterator[Lease]:
        """The right to retrain, renewed while the block runs. Raises `UserError` if somebody else has it.

        One that is not renewed, because its holder was killed, ends after `seconds`.
        """
        self.store.ensure_bucket()
        lease = Lease(self.store, seconds)
        lease.take()
        try:
            yield lease
        finally:
            lease.release()

    def _newest(self) -> int:
        return max((int(Path(path).stem) for path in self.store.list(PROMOTIONS)), default=0)

    def _pointer(self) -> tuple[int, str | None]:
        if not self.store.exists(CHAMPION):
            return 0, None
        data, tag = self.store.read_tagged(CHAMPION)
        return int(json.loads(data)["generation"]), tag


class Lease:
    """One holder's hold on `lease.json`."""

    def __init__(self, store: Store, seconds: float) -> None:
        self._store = store
        self._seconds = seconds
        self._id = uuid.uuid4().hex
        self._tag: str | None = None
        self._until_s = 0.0
        self._released = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    def take(self) -> None:
        """Raises `UserError` if somebody else has it."""
        if self._store.exists(LEASE):
            data, self._tag = self._store.read_tagged(LEASE)
            other = json.loads(data)
            if other["until"] > time.time():
                left = max(0.0, other["until"] - time.time())
                place, who = f"{self._store.url}/{LEASE}", f"{other['by']} retrains"
                raise UserError(
                    place, f"{who} (since {other['at']})", f"wait for it; it ends within {left:.0f} s of its death"
                )
        if not self._renew():
            raise UserError(
                f"{self._store.url}/{LEASE}", "somebody else began at the same moment", "nothing is left to do"
            )
        self._keeper.start()

    def check(self) -> None:
        """Raises `UserError` if it was lost: the machine slept, or the store was away for too long."""
        if time.time() > self._until_s:
            raise UserError(f"{self._store.url}/{LEASE}", "was not renewed in time", "give the command again")

    def release(self) -> None:
        """Ends it now, if it is still held."""
        self._released.set()
        self._keeper.join()
        if time.time() < self._until_s:
            self._renew(0.0)

    def _renew(self, seconds: float | None = None) -> bool:
        until_s = time.time() + (self._seconds if seconds is None else seconds)
        content = {"holder": self._id, "until": until_s, "nonce": uuid.uuid4().hex, **_signature()}
        if not self._store.write_if(LEASE, as_json(content), self._tag):
            return False
        data, self._tag = self._store.read_tagged(LEASE)
        self._until_s = until_s if json.loads(data)["holder"] == self._id else 0.0
        return self._until_s > 0

    def _keep(self) -> None:
        while not self._released.wait(self._seconds / 3):
            try:
                if not self._renew():
                    self._until_s = 0.0
                    return
            except UserError:  # the store is away; there are two more turns
                continue


def _path(generation: int) -> str:
    return f"{PROMOTIONS}/{generation:06d}.json"


def _signature() -> dict[str, str]:
    return {"at": datetime.now(UTC).isoformat(timespec="microseconds"), "by": f"{getpass.getuser()}@{platform.node()}"}


def _read(store: Store, path: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(store.read(path))
    return content
