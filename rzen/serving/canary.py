"""A trial of a new model and corpus: a share of the requests, until they are trusted or given up.

    replicas -> counts of their answers -> TrialCoordinator -> one verdict -> replicas

The replicas of a server have one coordinator, so that they adopt or give up a new pair together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol

from pydantic import Field

from pipelines.config import Config, PositiveFloat, PositiveInt
from rzen.serving.place import TaggedPlace

Verdict = Literal["wait", "adopt", "give up"]
_ROUNDING = 1e-6
_ENOUGH_FAILURES = 3
"""With fewer, one unlucky request would end a trial."""


class CanaryConfig(Config):
    """How a new model and corpus are tried before they answer all requests. They are given up if they are worse."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the requests that the new pair answers during the trial."""
    requests: PositiveInt = 200
    """Answers of the new pair, by all replicas together, after which the trial ends."""
    timeout_s: PositiveFloat = 600.0
    """Seconds after which the trial ends, also with fewer answers."""
    max_error_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Most failures of the new pair, as a share of its answers, above the share of the old pair. Errors of clients do
    not count."""
    held_out: str | None = None
    """JSON lines of queries with the target that is right: `{"query": "a red square", "source": "photos", "index": 3}`.
    Both pairs answer them before the trial. `null` compares no scores."""
    max_drop: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Most that the mean reciprocal rank on `held_out` may be lower than that of the old pair."""


@dataclass(slots=True)
class Outcomes:
    """Answers of a pair during a trial."""

    answered: int = 0
    failed: int = 0

    @property
    def total(self) -> int:
        """Return the number of answers, failures included."""
        return self.answered + self.failed

    @property
    def error_fraction(self) -> float:
        """Return failures as a share of all answers, 0 without any."""
        return self.failed / self.total if self.total else 0.0

    def __add__(self, other: Outcomes) -> Outcomes:
        return Outcomes(self.answered + other.answered, self.failed + other.failed)


@dataclass(frozen=True, slots=True)
class Counts:
    """Answers of the old and of the new pair during a trial."""

    old: Outcomes = field(default_factory=Outcomes)
    new: Outcomes = field(default_factory=Outcomes)

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.old + other.old, self.new + other.new)

    def verdict(self, config: CanaryConfig, is_over: bool) -> Verdict:
        """Return what to do after these answers. `is_over` says whether the time of the trial is."""
        worse = self.new.error_fraction > self.old.error_fraction + config.max_error_fraction
        if worse and self.new.failed >= _ENOUGH_FAILURES:
            return "give up"
        if self.new.total < config.requests and not is_over:
            return "wait"
        return "give up" if worse else "adopt"


class Trial:
    """Decides which requests of a replica the new pair answers."""

    def __init__(self, config: CanaryConfig) -> None:
        self._config = config
        self._due = 0.0
        self.counts = Counts()
        """Answers of this replica. The engine adds to them."""
        self.others = Counts()
        """Answers of all other replicas, as far as they are known here."""

    def takes_next(self) -> bool:
        """Return whether the next request is one of the new pair. Of any n in a row, it gets n times its fraction.

        It gets none while the known answers are so bad that the coordinator will give it up.
        """
        if (self.counts + self.others).verdict(self._config, is_over=False) == "give up":
            return False
        self._due += self._config.fraction
        if self._due < 1 - _ROUNDING:
            return False
        self._due -= 1
        return True


@dataclass(frozen=True, slots=True)
class Ruling:
    """The answer to a report."""

    verdict: Verdict | Literal["moved"]
    """`moved`: the place has another pair by now."""
    others: Counts
    """Answers of all replicas but the one that asked."""


class Trials(Protocol):
    """What a replica asks the coordinator. Raises `OSError` where it cannot be reached."""

    async def start(self, found: TaggedPlace) -> TaggedPlace:
        """Return the pair that a replica should start with."""

    async def see(self, found: TaggedPlace, used: TaggedPlace, known: Verdict) -> Verdict:
        """Return the verdict on what a replica found at the place."""

    async def report(self, found: TaggedPlace, replica: str, counts: Counts) -> Ruling:
        """Return the verdict after a replica's answers."""

    async def give_up(self, found: TaggedPlace) -> None:
        """Give a pair up, whatever was counted."""


class TrialCoordinator:
    """Decides the trials of a server: `Trials` of replicas that are in the same process. `now` gives seconds.

    There is one trial at a time, of what is at the place. If the process is replaced, replicas report all that they
    have counted and what was decided before.
    """

    def __init__(self, config: CanaryConfig, now: Callable[[], float] = time.monotonic) -> None:
        self._config, self._now = config, now
        self._trusted: TaggedPlace | None = None
        self._tag: str | None = None
        self._verdict: Verdict = "wait"
        self._end_s: float | None = None
        self._counts: dict[str, Counts] = {}

    async def start(self, found: TaggedPlace) -> TaggedPlace:
        """Return the pair that was trusted last. The first one is `found`: there is nothing to compare with."""
        if self._trusted is None:
            self._trusted = found
        return self._trusted

    async def see(self, found: TaggedPlace, used: TaggedPlace, known: Verdict) -> Verdict:
        """Return the verdict on what a replica found at the place. A pair that is new there has its trial before it.

        `used` is the pair that answers in this replica. `known` is the verdict on `found` that it heard before.
        """
        if self._trusted is None:  # this process replaces another one
            self._trusted = used
        if self._tag != found.tag:
            heard = known if self._tag is None else "wait"
            self._begin(found.tag, "adopt" if found.tag == self._trusted.tag else heard)
        return self._verdict

    async def report(self, found: TaggedPlace, replica: str, counts: Counts) -> Ruling:
        """Replace the counts of a replica, and decide. A decision stays. The time runs from the first report on."""
        if self._tag is None:
            self._begin(found.tag, "wait")
        others = sum((one for name, one in self._counts.items() if name != replica), Counts())
        if self._tag != found.tag:
            return Ruling("moved", Counts())
        if self._end_s is None:
            self._end_s = self._now() + self._config.timeout_s
        self._counts[replica] = counts
        if self._verdict == "wait":
            self._verdict = (others + counts).verdict(self._config, self._now() >= self._end_s)
        if self._verdict == "adopt":
            self._trusted = found
        return Ruling(self._verdict, others)

    async def give_up(self, found: TaggedPlace) -> None:
        """Give up a pair whose trial has not ended."""
        if self._tag == found.tag and self._verdict == "wait":
            self._verdict = "give up"

    def _begin(self, tag: str, verdict: Verdict) -> None:
        self._tag, self._verdict, self._end_s, self._counts = tag, verdict, None, {}
