"""Follows a submitted job to its end and prints its log once, whatever happens to the connection. Stops jobs."""

from __future__ import annotations

import asyncio
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import aclosing, suppress

from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.job_submission import JobStatus

from jobs.runtime.job_server import PATIENCE_S, Connection, JobServer, Patience, UnknownJob, Unreachable
from jobs.runtime.progress import say
from pipelines.errors import UserError

_PENDING_S = 10.0
_STOP_POLL_S = 0.5
_REATTACH_S = 300.0  # without a line: Ray's own part of the stream may have died
_LAST_ATTEMPTS = 4
_PAUSES_S = (0.5, 1.0, 2.0, 5.0)  # after a stream without a new line, after a second one, ...
_MAX_REASON = 500  # letters
_LARGE_LOG = 64_000_000  # characters
_NOT_STARTED = {
    "JOB_SUPERVISOR_ACTOR_START_TIMEOUT": "it could not be placed in time",
    "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE": "it could not be placed",
    "RUNTIME_ENV_SETUP_FAILURE": "its environment could not be set up",
}
_DIED = "JOB_SUPERVISOR_ACTOR_DIED"


def follow(
    server: JobServer, job: str, *, patience_s: float = PATIENCE_S, write: Callable[[str], None] | None = None
) -> JobDetails:
    """Print the log of a job until the job ends. Return its last state.

    Raise `UnknownJob` if the cluster does not know it, and `ServerLost` if the job server is away for `patience_s`.
    """
    return asyncio.run(_Follower(server, job, patience_s, write or _write).follow())


def exit_status(details: JobDetails) -> int:
    """Return 0 for a job that succeeded, else its exit status, or 1 if it has none.

    A job that a signal ended has 128 and the number of the signal, as in a shell.
    """
    if details.status == JobStatus.SUCCEEDED:
        return 0
    code = details.driver_exit_code or 1
    return 128 - code if code < 0 else min(code, 255)


def was_lost(details: JobDetails) -> bool:
    """Return whether the process of a job vanished, mostly with its node. Then another attempt may succeed."""
    has_begun = bool(details.driver_node_id) or details.error_type == _DIED
    return details.status == JobStatus.FAILED and details.driver_exit_code is None and has_begun


def outcome(details: JobDetails) -> str:
    """Return how a job ended, and Ray's reason if the log of the job does not say it."""
    status = exit_status(details)
    ended = f"{details.status.value.lower()}{f', exit status {status}' if status else ''}"
    if details.status != JobStatus.FAILED or details.driver_exit_code is not None:
        return ended
    not_started = _NOT_STARTED.get(str(details.error_type), "it did not start")
    what = "its process was lost" if was_lost(details) else not_started
    return f"{ended}: {what} ({_reason(details.message or 'Ray gives no reason')})"


def say_outcome(job: str, details: JobDetails) -> None:
    """Print how a job ended."""
    say(f"{job} {outcome(details)}", "red" if exit_status(details) else "")


def _reason(message: str) -> str:
    """Return a message of Ray in one line. A traceback is represented by its last line, the error."""
    if "Traceback (most recent call last)" in message:
        message = message.strip().splitlines()[-1]
    return textwrap.shorten(message, _MAX_REASON, placeholder=" ...")


class _Follower:
    def __init__(self, server: JobServer, job: str, patience_s: float, write: Callable[[str], None]) -> None:
        self._server, self._job, self._write = server, job, write
        self._patience = Patience(server, job, patience_s)
        self._printed, self._is_mid_line = 0, False  # characters
        self._is_pending_reported = False

    async def follow(self) -> JobDetails:
        fruitless = 0
        async with self._server.connection() as connection:
            while True:
                before = self._printed
                try:
                    details = await connection.details(self._job)
                    self._patience.reset()
                    if details.status.is_terminal():
                        await self._print_rest(connection)
                        if self._is_mid_line:
                            self._write("\n")
                        return details
                    with suppress(Unreachable):  # the next request shows whether the server is away
                        await self._print_stream(connection)
                    _stop_if_interrupted()
                    fruitless = 0 if self._printed > before else fruitless + 1
                    if fruitless > 2:  # no stream comes through, as with proxies that know no WebSockets
                        self._print((await connection.log(self._job))[self._printed :])
                    if fruitless:
                        await asyncio.sleep(_PAUSES_S[min(fruitless, len(_PAUSES_S)) - 1])
                except Unreachable as error:
                    await asyncio.sleep(self._patience.next_delay_s(error))

    async def _print_stream(self, connection: Connection) -> None:
        """Print what is new in the log, until the stream ends or the job does."""
        to_skip = self._printed
        loop = asyncio.get_running_loop()
        began_s = last_s = loop.time()
        async with aclosing(connection.stream(self._job)) as stream:
            async for text in stream:
                if text:
                    new = text[to_skip:]
                    to_skip = max(0, to_skip - len(text))
                    self._print(new)
                    last_s = loop.time()
                    continue
                details = await connection.details(self._job)
                if details.status.is_terminal() or loop.time() - last_s > _REATTACH_S:
                    return
                if details.status == JobStatus.PENDING and loop.time() - began_s > _PENDING_S:
                    self._report_pending(details)

    async def _print_rest(self, connection: Connection) -> None:
        """Print what is left of the log of a job that has ended."""
        if self._printed > _LARGE_LOG:  # one answer would hold all of it
            return
        for attempt in range(_LAST_ATTEMPTS):
            try:
                self._print((await connection.log(self._job))[self._printed :])
            except (UnknownJob, Unreachable) as error:
                if attempt + 1 == _LAST_ATTEMPTS:  # the node that it was on may be gone
                    say(f"  the end of the log cannot be read ({error})", "yellow")
                else:
                    await asyncio.sleep(2**attempt)
            else:
                return

    def _print(self, text: str) -> None:
        if text:
            self._is_mid_line = not text.endswith("\n")
            self._write(text)
            self._printed += len(text)

    def _report_pending(self, details: JobDetails) -> None:
        if not self._is_pending_reported:
            self._is_pending_reported = True
            say(f"  {self._job} waits: {details.message}", "yellow")


def _stop_if_interrupted() -> None:
    """Raise `CancelledError` again if the connection broke while it was interrupted, and its error took the place."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def attach(server: JobServer, job: str) -> int:
    """Follow a job that was submitted before, from the start of its log. Return its exit status."""
    try:
        details = server.details(job)
        if not details.submission_id:
            raise UserError(job, "was not submitted, so that Ray has no log of it", _known(server))
        say(f"{job} is on {server.address}: {details.status.value.lower()}")
        details = follow(server, details.submission_id)
    except KeyboardInterrupt:
        report_detached(server, job)
        return 130
    except UnknownJob as error:
        raise _unknown(server, job) from error
    say_outcome(job, details)
    return exit_status(details)


def print_log(server: JobServer, job: str) -> None:
    """Print the log of a submitted job as it is now."""

    async def read() -> str:
        async with server.connection() as connection:
            return await connection.log(job)

    try:
        _write(asyncio.run(read()))
    except UnknownJob as error:
        raise _unknown(server, job) from error
    except Unreachable as error:
        raise UserError(server.address, f"does not answer ({error})", "give the command again") from error


def stop(server: JobServer, job: str, *, wait: bool) -> None:
    """Stop a submitted job, and wait for its end. Raise `UserError` if the cluster does not know it.

    Ray kills a job that has not ended by itself after `RAY_JOB_STOP_WAIT_TIME_S`, so that each job ends.
    """
    try:
        details = server.details(job)
        if details.status.is_terminal():
            say(f"{job} has ended before: {outcome(details)}")
            return
        server.stop(job)
        while wait and not details.status.is_terminal():
            time.sleep(_STOP_POLL_S)
            details = server.details(job)
    except UnknownJob as error:
        raise _unknown(server, job) from error
    say(f"{job} {details.status.value.lower()}" if wait else f"{job} is asked to stop")


def report_detached(server: JobServer, job: str) -> None:
    """Print that a job goes on although nobody follows it, and how to follow and to stop it."""
    named = f"{job}{server.option}"
    say(f"\n{job} continues; follow it with: rzen attach {named}; stop it with: rzen stop {named}", "yellow")


def _unknown(server: JobServer, job: str) -> UserError:
    return UserError(job, f"is not a job on {server.address}", _known(server))


def _known(server: JobServer) -> str:
    ids = server.job_ids()
    if not ids:
        return "no job was submitted there; name another --address"
    more = f" ... ({len(ids)} in all; ray job list)" if len(ids) > 5 else ""
    return f"name one of {', '.join(ids[:5])}{more}"
