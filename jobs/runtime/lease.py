"""A lease on a folder in a store: the right to write there, for one process at a time.

The holder is named in a JSON file of the folder. It renews the lease while it works. If it is killed, the lease ends
after the seconds that it was taken for, and another process may take it. Two processes that try at the same time
cannot both succeed, because the file is only replaced if it is still the version that was read.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from typing_extensions import TypedDict

from jobs.runtime.records import as_json, signature
from pipelines.errors import UserError
from pipelines.storage.store import Store
from pipelines.stored_json import parse_json, stored_file

LEASE = "lease.json"
_log = logging.getLogger(__name__)
_FIX = "delete the file if no other process works here"
_RENEWALS = 3  # within the time of a lease, so that two may fail


@contextmanager
def hold_lease(store: Store, seconds: float, activity: str) -> Iterator[Lease]:
    """Hold the lease of `store` while the block runs. `activity` says what the holder does, such as "retrains".

    Raise `UserError` if another process holds it.
    """
    store.ensure_bucket()
    lease = Lease(store, seconds, activity)
    lease.take()
    try:
        yield lease
    finally:
        lease.release()


@stored_file
class LeaseFile(TypedDict):
    """`lease.json`: who holds the lease, until when (seconds since 1970), and who wrote it when."""

    holder: str
    until: float
    by: str
    at: str


class Lease:
    """The lease of one holder. A thread renews it until it is released."""

    def __init__(self, store: Store, seconds: float, activity: str) -> None:
        self._store = store
        self._seconds = seconds
        self._activity = activity
        self._place = f"{store.url}/{LEASE}"
        self._id = uuid.uuid4().hex
        self._tag: str | None = None
        self._until_s = 0.0
        self._released = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    def take(self) -> None:
        """Take the lease. Raise `UserError` if another process holds it."""
        if self._store.exists(LEASE):
            data, self._tag = self._store.read_tagged(LEASE)
            other = parse_json(data, self._place, LeaseFile, _FIX)
            if other["until"] > time.time():
                left_s = max(0.0, other["until"] - time.time())
                problem = f"{other['by']} {self._activity} (since {other['at']})"
                raise UserError(self._place, problem, f"wait for it; if it was killed, retry in {left_s:.0f} s")
        if not self._renew():
            raise UserError(self._place, "another process started at the same moment", "wait until it has finished")
        self._keeper.start()

    def check(self) -> None:
        """Raise `UserError` if the lease was lost because the machine slept or the store did not answer."""
        if time.time() > self._until_s:
            raise UserError(self._place, "was not renewed in time", "give the command again")

    def release(self) -> None:
        """End the lease, if it is still held."""
        self._released.set()
        self._keeper.join()
        if time.time() < self._until_s:
            self._renew(0.0)

    def _renew(self, seconds: float | None = None) -> bool:
        until_s = time.time() + (self._seconds if seconds is None else seconds)
        content = {"holder": self._id, "until": until_s, "nonce": uuid.uuid4().hex, **signature()}
        if not self._store.write_if(LEASE, as_json(content), self._tag):
            return False
        data, self._tag = self._store.read_tagged(LEASE)
        self._until_s = until_s if parse_json(data, self._place, LeaseFile, _FIX)["holder"] == self._id else 0.0
        return self._until_s > 0

    def _keep(self) -> None:
        while not self._released.wait(self._seconds / _RENEWALS):
            try:
                if not self._renew():
                    self._until_s = 0.0
                    return
            except UserError as error:  # the store did not answer; there are more attempts before the lease ends
                _log.warning("lease not renewed, trying again: %s", error)
