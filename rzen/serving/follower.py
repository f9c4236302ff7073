"""Follows a place where model and corpus are replaced: loads new ones while the engine answers, and tries them first.

    new files -> load -> held-out queries -> a share of the requests -> all requests, or the pair before

A pair that is given up, or wrong, is not tried again until the place has another one. One that could not be read is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field

from pipelines.config import Config, NonNegativeInt
from pipelines.errors import UserError
from pipelines.storage.location import read_object
from pipelines.stored_json import parse_json
from rzen.serving.canary import CanaryConfig, Trial
from rzen.serving.engine import Engine
from rzen.serving.served import Place, Served
from rzen.serving.types import SearchRequest, ServedInput, Wish

Outcome = Literal["ok", "failed", "given_up"]
_log = logging.getLogger(__name__)
_POLL_S = 0.1
_LOOK_S = 5.0
_TOP_K = 10
_MAX_BYTES = 16 << 20


class HeldOutQuery(Config):
    """A query and the target that it should find."""

    query: str = Field(min_length=1)
    source: str
    index: NonNegativeInt
    split: str = "train"
    instruction: str | None = None


class Follower:
    """Keeps an engine at what a place has. `where` finds the place, which may move. Use it from the engine's loop.

    `on_exchange` is called with the outcome of each exchange after the first model.
    """

    def __init__(
        self,
        engine: Engine,
        where: Callable[[], Place],
        canary: CanaryConfig | None = None,
        on_exchange: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        self._engine, self._where, self._canary, self._on_exchange = engine, where, canary, on_exchange
        self._seen = self._used = ""
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Load the first model. Raises `UserError`."""
        place, tag = await self._look()
        await self._engine.reload(place)
        self._seen = self._used = tag

    async def watch(self, every_s: float) -> None:
        """Look again and again."""
        while True:
            await asyncio.sleep(every_s)
            await self.refresh()

    async def refresh(self) -> None:
        """Load what is at the place, if it has changed since it was loaded or tried last. Returns after its trial."""
        async with self._lock:
            try:
                place, tag = await self._look()
                if tag == self._seen:
                    return
                self._seen = tag
                if tag == self._used:  # the place went back to the pair that answers
                    return
                outcome = await self._exchange(place, tag)
            except Exception as error:  # noqa: BLE001 such as no memory for both: nothing may end the watching
                outcome = "failed"
                if isinstance(error, OSError):  # the store may answer the next time
                    self._seen = ""
                _log.error("the model was not replaced, and the one before still answers: %s", error)
            self._on_exchange(outcome)

    async def _look(self) -> tuple[Place, str]:
        def look() -> tuple[Place, str]:
            place = self._where()
            return place, place.tag()

        return await asyncio.to_thread(look)

    async def _has_moved(self, tag: str) -> bool:
        try:
            return (await self._look())[1] != tag
        except (UserError, OSError):  # it may be unreachable for a moment
            return False

    async def _exchange(self, place: Place, tag: str) -> Outcome:
        served = await self._engine.prepare(place)
        before = self._engine.served
        trusted = False
        try:
            trusted = await self._is_trusted(served, before, tag)
        finally:
            self._engine.use(served if trusted else before)
            if not trusted:
                served.close()
        if trusted:
            self._used = tag
        return "ok" if trusted else "given_up"

    async def _is_trusted(self, served: Served, before: Served, tag: str) -> bool:
        """Return whether a new pair may answer all requests, after its trial if there is one."""
        if self._canary is None:
            return True
        queries = await asyncio.to_thread(read_held_out, self._canary.held_out, served.place.endpoint)
        if queries and served.corpus is not None and before.corpus is not None:
            old, new = [await held_out_score(self._engine, one, queries) for one in (before, served)]
            if new < old - self._canary.max_drop:
                _log.error("%s is given up: it scores %.4f on held-out queries, %.4f before", served.version, new, old)
                return False
        trial = Trial(self._canary)
        self._engine.try_out(served, trial)
        next_look_s = time.monotonic() + _LOOK_S
        while (verdict := trial.verdict()) == "wait":
            await asyncio.sleep(_POLL_S)
            if time.monotonic() > next_look_s:
                if await self._has_moved(tag):
                    _log.warning("the trial of version %s ends: another one took its place", served.version)
                    return False
                next_look_s = time.monotonic() + _LOOK_S
        if verdict == "give up":
            failed = f"{trial.new.failed} of {trial.new.total} requests failed"
            before_it = f"{trial.old.failed} of {trial.old.total}"
            _log.error("version %s is given up: %s, %s of the version before", served.version, failed, before_it)
        return verdict == "adopt"


def read_held_out(url: str | None, endpoint: str | None) -> list[HeldOutQuery]:
    """Return the queries of a file of JSON lines, none for None. Raises `UserError` with the line that is wrong."""
    if url is None:
        return []
    lines = read_object(url, _MAX_BYTES, endpoint).decode().splitlines()
    fix = 'write {"query": "a red square", "source": "photos", "index": 3}'
    return [
        parse_json(line, f"{url}:{number}", HeldOutQuery, fix) for number, line in enumerate(lines, 1) if line.strip()
    ]


async def held_out_score(engine: Engine, served: Served, queries: Sequence[HeldOutQuery]) -> float:
    """Return the mean reciprocal rank of the right targets, 0 for one that is not among the first 10 hits."""
    total = 0.0
    for one in queries:
        wish = Wish(instruction=one.instruction)
        found = await engine.search_with(served, SearchRequest(ServedInput(one.query), wish=wish, top_k=_TOP_K))
        right = (one.split, one.source, one.index)
        ranks = [hit["rank"] for hit in found.hits if (hit["split"], hit["source"], hit["index"]) == right]
        total += 1 / ranks[0] if ranks else 0.0
    return total / len(queries)
