"""What becomes of a fault: the table of all faults of object stores and disks, and waiting for an outage to end.

    fix      only the user can fix it: reported at once
    again    one answer was bad, and the next may be good: asked again for some seconds
    wait     the service is away or overloaded: waited for, with messages

How long an outage is waited for depends on whether the endpoint has ever answered. One that never has is more likely a
wrong address. One that has is waited for `RZEN_STORE_PATIENCE_S` seconds, 10 minutes by default. Processes that are
given a store know that it has answered elsewhere. A lost worker is no fault of storage: training then restarts
(`jobs/training/fit.py`).
"""

from __future__ import annotations

import errno
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

Remedy = Literal["fix", "again", "wait"]
PATIENCE = "RZEN_STORE_PATIENCE_S"
_PATIENCE_S = 600.0
_FIRST_PATIENCE_S = 25.0  # with an endpoint that answers with errors from the start
_UNREACHABLE_PATIENCE_S = 3.0  # with an endpoint that has never answered
_PAUSES_S = (0.1, 0.3, 1.0, 3.0, 6.0, 10.0)  # at most, between attempts; the last one is repeated
_REPORT_AFTER_S = 5.0
_REPORT_EVERY_S = 30.0
_log = logging.getLogger(__name__)


class BadAnswerError(Exception):
    """An answer that cannot be used."""


class UnavailableError(Exception):
    """A service that does not answer, or asks to come again later."""


# A code is that of an answer, and counts before its status. Other errors are found by the names of their classes.
_OF_CODES: dict[str, Remedy] = {
    "SlowDown": "wait",
    "RequestTimeout": "wait",
    "ThrottlingException": "wait",
    "RequestLimitExceeded": "wait",
    "NotImplemented": "fix",
    "QuotaExceeded": "fix",
}
_OF_STATUSES: dict[int, Remedy] = {429: "wait", 501: "fix", 505: "fix", 507: "fix"}
_OF_ERRORS: dict[str, Remedy] = {  # by name, so that a disk needs no client of object stores
    "BadAnswerError": "again",
    "FlexibleChecksumError": "again",
    "IncompleteReadError": "again",
    "ResponseStreamingError": "again",
    "ReadTimeoutError": "wait",
    "UnavailableError": "wait",
    "ConnectionClosedError": "wait",
    "ConnectionError": "wait",
}
_UNREACHABLE = "ConnectionError"
OF_DISKS = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "the quota is used up: free some space, or choose another place",
    errno.EFBIG: "the file size limit is reached: raise `ulimit -f`, or write smaller shards",
    errno.EACCES: "check the owner and the permissions",
    errno.EPERM: "check the owner and the permissions",
    errno.EROFS: "the file system is read-only: choose another place",
}
"""Fix of each fault of a disk: the user has to deal with all of them. Only checkpoints are tried again."""

_answered: set[str | None] = set()
_report: list[Callable[[str], None]] = []
_limits_s: list[float] = []


def remedy_of(error: Exception) -> Remedy:
    """Return what to do about a fault of an object store."""
    if (answer := _answer_of(error)) is not None:
        status, code = int(answer["ResponseMetadata"]["HTTPStatusCode"]), str(answer["Error"]["Code"])
        return _OF_CODES.get(code) or _OF_STATUSES.get(status) or ("wait" if status >= 500 else "fix")
    return next((remedy for name in _names_of(error) if (remedy := _OF_ERRORS.get(name))), "fix")


def _answer_of(error: Exception) -> dict[str, Any] | None:
    """Return the answer of an object store that an error of botocore holds."""
    answer = getattr(error, "response", None)
    return answer if isinstance(answer, dict) and "Error" in answer else None


def _names_of(error: Exception) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]


def note_answer(endpoint: str | None) -> None:
    """Remember that an endpoint (None: AWS) has answered, to this process or to the one that sent it here."""
    _answered.add(endpoint)


def has_answered(endpoint: str | None) -> bool:
    """Return whether an endpoint is known to have answered."""
    return endpoint in _answered


def report_outages(report: Callable[[str], None]) -> None:
    """Call `report` with messages on outages, instead of logging them."""
    _report[:] = [report]


@contextmanager
def brief_patience(seconds: float = 5.0) -> Iterator[None]:
    """Wait for no outage longer than this while the block runs, in any thread: the user wants to stop."""
    _limits_s.append(seconds)
    try:
        yield
    finally:
        _limits_s.remove(seconds)


class Attempts:
    """The attempts of one operation on an endpoint."""

    def __init__(self, endpoint: str | None) -> None:
        self._endpoint = endpoint
        self._began_s = time.monotonic()
        self._count = 0
        self._reported_s: float | None = None

    def wait(self, error: Exception) -> bool:
        """Wait for the next attempt after a fault. Return False if there is none."""
        remedy = remedy_of(error)
        if remedy != "wait" and _answer_of(error) is not None:
            note_answer(self._endpoint)
        elapsed_s = time.monotonic() - self._began_s
        left_s = self._patience_s(error, remedy) - elapsed_s
        is_first = self._count == 0 and remedy == "again"  # it may have taken all the time
        if left_s <= 0 and not is_first:
            return False
        since_s = _REPORT_AFTER_S if self._reported_s is None else self._reported_s + _REPORT_EVERY_S
        if remedy == "wait" and elapsed_s >= since_s:
            self._reported_s = elapsed_s
            where, waited = self._endpoint or "AWS", f"{elapsed_s:.0f} s"
            _say(f"no proper answer from {where} for {waited} ({error}); trying again for up to {left_s:.0f} s")
        time.sleep(_PAUSES_S[min(self._count, len(_PAUSES_S) - 1)] * random.uniform(0.5, 1.0))
        self._count += 1
        return True

    def succeed(self) -> None:
        """Remember that the endpoint answers."""
        note_answer(self._endpoint)
        if self._reported_s is not None:
            _say(f"{self._endpoint or 'AWS'} answers again after {time.monotonic() - self._began_s:.0f} s")

    def _patience_s(self, error: Exception, remedy: Remedy) -> float:
        if remedy == "fix":
            return 0.0
        if remedy == "wait" and has_answered(self._endpoint):
            return min([float(os.environ.get(PATIENCE) or _PATIENCE_S), *_limits_s])
        names = _names_of(error)
        nobody_there = _UNREACHABLE in names and "ConnectionClosedError" not in names
        return _UNREACHABLE_PATIENCE_S if nobody_there else _FIRST_PATIENCE_S


def _say(text: str) -> None:
    if _report:
        _report[0](text)
    else:
        _log.warning("%s", text)
