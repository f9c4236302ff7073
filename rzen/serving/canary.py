"""A trial of a new model and corpus: a share of the requests, until they are trusted or given up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from pipelines.config import Config, PositiveFloat, PositiveInt

Verdict = Literal["wait", "adopt", "give up"]
_ROUNDING = 1e-6
_ENOUGH_FAILURES = 3
"""With fewer, one unlucky request would end a trial."""


class CanaryConfig(Config):
    """How a new model and corpus are tried before they answer all requests. They are given up if they are worse."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the requests that the new pair answers during the trial."""
    requests: PositiveInt = 200
    """Answers of the new pair after which the trial ends."""
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


class Trial:
    """Decides which requests the new pair answers, and when that is enough. `now` gives seconds."""

    def __init__(self, config: CanaryConfig, now: Callable[[], float] = time.monotonic) -> None:
        self._config, self._now = config, now
        self._end_s = now() + config.timeout_s
        self._due = 0.0
        self.old, self.new = Outcomes(), Outcomes()

    def takes_next(self) -> bool:
        """Return whether the next request is one of the new pair. Of any n in a row, it gets n times its fraction.

        It gets none once it is to be given up.
        """
        if self.verdict() == "give up":
            return False
        self._due += self._config.fraction
        if self._due < 1 - _ROUNDING:
            return False
        self._due -= 1
        return True

    def verdict(self) -> Verdict:
        """Return what to do now."""
        worse = self.new.error_fraction > self.old.error_fraction + self._config.max_error_fraction
        if worse and self.new.failed >= _ENOUGH_FAILURES:
            return "give up"
        if self.new.total < self._config.requests and self._now() < self._end_s:
            return "wait"
        return "give up" if worse else "adopt"
