"""A lease on a folder in a store: the right to write there, for one process at a time.

The holder is named in a JSON file of the folder. It renews the lease while it works. Two processes that try at the same
time cannot both succeed, because the file is only replaced if it is still the version that was read.

The file is deleted when its holder ends. A process that finds a holder at work is refused, or waits for its end for
`RZEN_LEASE_PATIENCE_S` seconds. RayJobs wait, because pods of two attempts may overlap.

If the holder is killed, the next process takes the lease. On the same machine it sees at once that the holder is gone.
On another machine it watches the file for the seconds that the lease was taken for. Clocks of two machines are never
compared.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from typing_extensions import TypedDict

from jobs.runtime.progress import say
from jobs.runtime.records import as_json, signature
from pipelines.errors import UserError
from pipelines.storage.faults import brief_patience
from pipelines.storage.publish import LEASE, check_replaceable, claim
from pipelines.storage.store import Store
from pipelines.stored_json import parse_json, stored_file

LEASE_S = 60.0
PATIENCE = "RZEN_LEASE_PATIENCE_S"
_log = logging.getLogger(__name__)
_FIX = "delete the file if no other process works here"
_RENEWALS = 3  # within the time of a lease, so that two may fail
_POLL_S = 0.5


@contextmanager
def hold_output(store: Store, kind: str, activity: str) -> Iterator[Lease]:
    """Claim a folder for an output of this kind, and hold its lease while the block runs.

    Raise `UserError` if the folder belongs to others, or if another process holds its lease.
    """
    claim(store, kind)
    with hold_lease(store, LEASE_S, activity) as lease:
        yield lease


@contextmanager
def hold_version(store: Store, activity: str) -> Iterator[Lease]:
    """Hold the lease of a model's folder, whose next version the block publishes.

    Raise `UserError` if the folder belongs to others, or if another process holds its lease.
    """
    check_replaceable(store)
    with hold_lease(store, LEASE_S, activity) as lease:
        yield lease


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
    """`lease.json`: who holds the lease, for how long, until when (seconds since 1970), and who wrote it when."""

    holder: str
    activity: str
    seconds: float
    until: float
    machine: str | None
    process: int
    started: str | None
    by: str
    at: str


class _HeldError(UserError):
    """Another process holds the lease."""


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
        self._is_taken = False
        self._told: set[str] = set()
        self._released = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    def take(self) -> None:
        """Take the lease. Raise `UserError` if another process holds it, after `RZEN_LEASE_PATIENCE_S` seconds (0)."""
        patience_s = float(os.environ.get(PATIENCE) or 0)
        deadline_s = time.monotonic() + patience_s
        while True:
            try:
                self._take()
                break
            except _HeldError as error:
                if time.monotonic() >= deadline_s:
                    raise
                self._say("end", f"{error.problem}; waiting for its end, up to {patience_s:.0f} s")
                time.sleep(_POLL_S)
        self._keeper.start()

    def _say(self, awaited: str, text: str) -> None:
        """Print why nothing happens, once for each thing that is awaited."""
        if awaited not in self._told:
            self._told.add(awaited)
            say(f"  {self._place}: {text}", "yellow")

    def _take(self) -> None:
        other, self._tag = self._read()
        if other is not None:
            alive = _is_alive(other)
            if alive is None:
                self._wait_for_silence(other)
            elif alive:
                raise self._taken(other)
        if not self._renew():
            raise _HeldError(self._place, "another process started at the same moment", "wait until it has finished")

    def check_not_taken(self) -> None:
        """Raise `UserError` if another process has taken the lease.

        A lease that could not be renewed while the store did not answer is still this process's, if nobody has taken
        it until the store answers again.
        """
        if self._is_taken:
            raise UserError(
                self._place, "was taken by another process", "end one of the two, then give the command again"
            )

    def check(self) -> None:
        """Raise `UserError` if the lease was lost because the machine slept or the store did not answer.

        Writers call it before they publish.
        """
        self.check_not_taken()
        if time.monotonic() > self._until_s:
            raise UserError(self._place, "was not renewed in time", "give the command again")

    def release(self) -> None:
        """End the lease, if it is still held: as long as it is, no other process takes it."""
        self._released.set()
        self._keeper.join()
        if time.monotonic() > self._until_s:
            return
        try:
            with brief_patience():
                self._store.delete(LEASE)
        except UserError as error:  # it ends by itself, and what was held may have ended with an error of its own
            _log.warning("lease not given back: %s", error)

    def _read(self) -> tuple[LeaseFile | None, str | None]:
        try:
            data, tag = self._store.read_tagged(LEASE)
        except FileNotFoundError:
            return None, None
        return parse_json(data, self._place, LeaseFile, _FIX), tag

    def _wait_for_silence(self, other: LeaseFile) -> None:
        """Wait until a holder on another machine has let its time pass. Raise `UserError` if it renews the lease."""
        seconds = other["seconds"]
        self._say("silence", f"{_holder(other)}; if it was killed, this goes on in {seconds:.0f} s")
        deadline_s = time.monotonic() + seconds
        while (left_s := deadline_s - time.monotonic()) > 0:
            time.sleep(min(_POLL_S, left_s))
            now, tag = self._read()
            if tag != self._tag:
                self._tag = tag
                if now is None:  # the holder has ended
                    return
                raise self._taken(now)

    def _taken(self, other: LeaseFile) -> UserError:
        return _HeldError(self._place, _holder(other), "wait until it has finished, or end it")

    def _renew(self) -> bool:
        until_s = time.monotonic() + self._seconds
        content = {
            "holder": self._id,
            "activity": self._activity,
            "seconds": self._seconds,
            "until": time.time() + self._seconds,  # for people, and for processes of this machine
            "machine": _machine(),
            "process": os.getpid(),
            "started": _started(os.getpid()),
            "nonce": uuid.uuid4().hex,
            **signature(),
        }
        written = self._store.write_if(LEASE, as_json(content), self._tag)
        if not written:
            now, tag = self._read()
            if now is not None and now["holder"] == self._id:  # an earlier renewal, whose answer never came
                self._tag = tag
                written = self._store.write_if(LEASE, as_json(content), self._tag)
        if not written:
            return False
        now, self._tag = self._read()
        self._until_s = until_s if now is not None and now["holder"] == self._id else 0.0
        return self._until_s > 0

    def _keep(self) -> None:
        while not self._released.wait(self._seconds / _RENEWALS):
            try:
                if not self._renew():
                    self._until_s = 0.0
                    self._is_taken = True
                    return
            except UserError as error:  # the store did not answer; there are more attempts before the lease ends
                _log.warning("lease not renewed, trying again: %s", error)


class HeldLeases(ExitStack):
    """Leases of several outputs, which are given back together."""

    def __init__(self) -> None:
        super().__init__()
        self._held: list[Lease] = []

    def hold_output(self, store: Store, kind: str, activity: str) -> None:
        """Claim a folder and hold its lease. Raise `UserError` as `hold_output` does."""
        self._held.append(self.enter_context(hold_output(store, kind, activity)))

    def check_not_taken(self) -> None:
        """Raise `UserError` if another process has taken one of them."""
        for lease in self._held:
            lease.check_not_taken()


def active_holder(store: Store) -> LeaseFile | None:
    """Return who works in a folder at present. None if nobody does.

    A holder on another machine counts as long as its time has not passed by the clock of this one.
    """
    try:
        content = parse_json(store.read(LEASE), f"{store.url}/{LEASE}", LeaseFile, _FIX)
    except FileNotFoundError:
        return None
    alive = _is_alive(content)
    if alive is None:
        alive = time.time() < content["until"]
    return content if alive else None


def _holder(content: LeaseFile) -> str:
    return f"{content['by']} (process {content['process']}) {content['activity']} here, seen at {content['at']}"


def _is_alive(content: LeaseFile) -> bool | None:
    """Return whether a holder on this machine still works. None for one on another machine."""
    if _machine() is None or content["machine"] != _machine():
        return None
    return time.time() < content["until"] and _started(content["process"]) == content["started"]


def _machine() -> str | None:
    """Return what identifies the running system and its numbering of processes, None if it does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return None


def _started(process: int) -> str | None:
    """Return when a process of this machine started, in ticks since boot. None if there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
