"""Follows a place where model and corpus are replaced: loads new ones while the engine answers, and tries them first.

    new files -> load -> held-out queries -> a share of the requests -> all requests, or the pair before

A pair that is given up, or wrong, is not tried again until the place has another one. One that could not be read is.
All replicas of a server have the same trials, and give a pair up together.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, TypeVar

from pydantic import Field

from pipelines.config import Config, NonNegativeInt
from pipelines.errors import UserError
from pipelines.storage.location import read_object
from pipelines.stored_json import parse_json
from rzen.serving.canary import CanaryConfig, Counts, Ruling, Trial, TrialCoordinator, Trials, Verdict
from rzen.serving.engine import Engine
from rzen.serving.place import Place, TaggedPlace
from rzen.serving.served import Served
from rzen.serving.types import SearchRequest, ServedInput, Wish

Outcome = Literal["ok", "failed", "given_up"]
T = TypeVar("T")
_log = logging.getLogger(__name__)
_POLL_S = 0.5
"""Between two reports of a replica. It pauses a new pair that fails before its report."""
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

    `on_exchange` is called with the outcome of each exchange after the first model. `trials` are those of all replicas.
    None decides for this engine only.
    """

    def __init__(
        self,
        engine: Engine,
        where: Callable[[], Place],
        canary: CanaryConfig | None = None,
        on_exchange: Callable[[Outcome], None] = lambda outcome: None,
        trials: Trials | None = None,
    ) -> None:
        self._engine, self._where, self._canary, self._on_exchange = engine, where, canary, on_exchange
        self._trials = trials or TrialCoordinator(canary or CanaryConfig())
        self._replica = uuid.uuid4().hex
        self._used: TaggedPlace | None = None
        self._seen = ""
        self._verdict: Verdict = "wait"
        """What was decided about the pair that was seen last."""
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Load the first model: what is at the place, or the pair before it while that has not been adopted.

        Raises `UserError`.
        """
        used = found = await self._look()
        if self._canary is not None:
            trusted = await _answer(self._trials.start(found), found)
            if trusted != found and await asyncio.to_thread(trusted.is_there):
                used = trusted
        await self._engine.reload(used.place)
        self._used, self._seen = used, used.tag

    async def watch(self, every_s: float) -> None:
        """Look again and again."""
        while True:
            await asyncio.sleep(every_s)
            await self.refresh()

    async def refresh(self) -> None:
        """Load what is at the place, if it has changed since it was loaded or tried last. Returns after its trial."""
        async with self._lock:
            try:
                found = await self._look()
                is_new = found.tag != self._seen
                if is_new:
                    self._seen, self._verdict = found.tag, "wait"
                verdict = await self._see(found)
                if found == self._used:  # nothing is new, or the place went back to the pair that answers
                    return
                if not is_new and (verdict != "adopt" or self._canary is None):  # others may adopt what failed here
                    return
                outcome = await self._exchange(found, verdict)
            except Exception as error:  # noqa: BLE001 such as no memory for both: nothing may end the watching
                outcome = "failed"
                if isinstance(error, OSError):  # the store may answer the next time
                    self._seen = ""
                _log.error("the model was not replaced, and the one before still answers: %s", error)
            self._on_exchange(outcome)

    async def _look(self) -> TaggedPlace:
        def look() -> TaggedPlace:
            place = self._where()
            return TaggedPlace(place, place.tag())

        return await asyncio.to_thread(look)

    async def _see(self, found: TaggedPlace) -> Verdict:
        """Return what the trials know of a pair. Without trials, every pair is adopted."""
        if self._canary is None:
            return "adopt"
        assert self._used is not None
        return await _answer(self._trials.see(found, self._used, self._verdict), self._verdict)

    async def _has_moved(self, tag: str) -> bool:
        try:
            return (await self._look()).tag != tag
        except (UserError, OSError):  # it may be unreachable for a moment
            return False

    async def _exchange(self, found: TaggedPlace, verdict: Verdict) -> Outcome:
        if verdict == "give up":
            self._verdict = "give up"
            _log.error("%s is given up, as in the other replicas", found.place.model)
            return "given_up"
        served = await self._engine.prepare(found.place)
        before = self._engine.served
        trusted = False
        try:
            trusted = await self._is_trusted(served, before, found)
        finally:
            self._engine.use(served if trusted else before)
            if not trusted:
                served.close()
        if trusted:
            self._used = found
        return "ok" if trusted else "given_up"

    async def _is_trusted(self, served: Served, before: Served, found: TaggedPlace) -> bool:
        """Return whether a new pair may answer all requests, after its trial if it has not been decided."""
        self._verdict = await self._see(found)  # others may have decided during the loading
        if self._canary is None or self._verdict != "wait":
            return self._verdict == "adopt"
        queries = await asyncio.to_thread(read_held_out, self._canary.held_out, served.place.endpoint)
        if queries and served.corpus is not None and before.corpus is not None:
            old, new = [await held_out_score(self._engine, one, queries) for one in (before, served)]
            if new < old - self._canary.max_drop:
                _log.error("%s is given up: it scores %.4f on held-out queries, %.4f before", served.version, new, old)
                self._verdict = "give up"
                await _answer(self._trials.give_up(found), None)
                return False
        return await self._try_out(served, found, Trial(self._canary))

    async def _try_out(self, served: Served, found: TaggedPlace, trial: Trial) -> bool:
        """Return whether a new pair is adopted, after its trial."""
        self._engine.try_out(served, trial)
        next_look_s = time.monotonic() + _LOOK_S
        while (ruling := await self._report(found, trial)).verdict == "wait":
            trial.others = ruling.others
            await asyncio.sleep(_POLL_S)
            if time.monotonic() > next_look_s:
                if await self._has_moved(found.tag):
                    ruling = Ruling("moved", trial.others)
                    break
                next_look_s = time.monotonic() + _LOOK_S
        if ruling.verdict == "moved":
            self._seen = ""  # and look again
            _log.warning("the trial of version %s ends: another one took its place", served.version)
            return False
        self._verdict = ruling.verdict
        if ruling.verdict == "give up":
            whole = trial.counts + ruling.others
            failed = f"{whole.new.failed} of {whole.new.total} requests failed"
            before_it = f"{whole.old.failed} of {whole.old.total}"
            _log.error("version %s is given up: %s, %s of the version before", served.version, failed, before_it)
        return ruling.verdict == "adopt"

    async def _report(self, found: TaggedPlace, trial: Trial) -> Ruling:
        counts = trial.counts + Counts()  # a copy: the engine goes on to count
        return await _answer(self._trials.report(found, self._replica, counts), Ruling("wait", trial.others))


async def _answer(question: Awaitable[T], otherwise: T) -> T:
    """Return the answer of the trials, `otherwise` while they cannot be reached."""
    try:
        return await question
    except OSError as error:
        _log.warning("the coordinator of the trials does not answer: %s", error)
        return otherwise


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
