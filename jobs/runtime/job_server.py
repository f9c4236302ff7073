"""The job server of a Ray cluster: which one a command uses, and requests that are repeated when it does not answer."""

from __future__ import annotations

import json
import logging
import os
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobSubmissionClient

from jobs.runtime.progress import duration, say
from pipelines.errors import UserError
from pipelines.redaction import redact_text

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
PATIENCE_S = 600.0
"""How long a job server that has answered may be away."""
_FIRST_DELAY_S, _LAST_DELAY_S = 0.5, 20.0
_CONNECT_S, _ANSWER_S, _UPLOAD_S = 10.0, 60.0, 600.0
_LATER = (408, 425, 429)  # timed out, too early, too many requests
_HEARTBEAT_S = 20.0  # finds a connection that is gone although nobody closed it
_SILENCE_S = 5.0
_TOKEN_FIX = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token of the cluster"


@dataclass(frozen=True)
class Access:
    """How to reach a job server. An address that is given wins over the variables of the environment."""

    address: str | None = None
    headers: Mapping[str, str] | None = None
    """Headers of each request. None takes those of RAY_JOB_HEADERS, in JSON."""
    verify: bool | str = True
    """Whether to check the certificate of the server, or the file or folder of the certificates to trust."""


class Unreachable(Exception):
    """A request that may succeed later: no connection, no answer, or an error of the server."""


class UnknownJob(Exception):
    """The job server answers, and knows no such job."""


class Refused(UserError):
    """The job server refuses a request, and would do so again."""


class ServerLost(UserError):
    """The job server has been away for too long. The job may still run."""

    status = 75  # EX_TEMPFAIL of sysexits.h


class Patience:
    """Waits longer and longer for a job server that is away, and gives up in the end."""

    def __init__(self, server: JobServer, job: str, seconds: float) -> None:
        self._server, self._job, self._seconds = server, job, seconds
        self.reset()

    def reset(self) -> None:
        """Note that the server has answered."""
        self._since_s: float | None = None
        self._delay_s = _FIRST_DELAY_S

    def next_delay_s(self, error: Unreachable) -> float:
        """Return the seconds to wait before the next attempt. Raise `ServerLost` after too long a time."""
        now_s = time.monotonic()
        if self._since_s is None:
            self._since_s = now_s
            waits = f"waiting for it, {self._seconds / 60:g} minutes at most"
            say(f"  {self._server.address} does not answer ({error}); {waits}", "yellow")
        if now_s - self._since_s > self._seconds:
            away = duration(now_s - self._since_s)
            problem = f"has not answered for {away} ({error}); {self._job} may still run there"
            fix = f"follow it with: rzen attach {self._job}{self._server.option}"
            raise ServerLost(self._server.address, problem, fix)
        delay_s, self._delay_s = self._delay_s, min(2 * self._delay_s, _LAST_DELAY_S)
        return min(delay_s, max(self._seconds / 2, 0.1))


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client with time limits, and with errors that say whether to try again."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        limits = (_CONNECT_S, _UPLOAD_S if method == "PUT" else _ANSWER_S)
        try:
            return super()._do_request(method, endpoint, timeout=limits, **options)
        except requests.exceptions.RequestException as error:
            raise Unreachable(_reason(error)) from error
        except AuthenticationError as error:
            raise UserError(self._address, f"asks for a token ({_first_line(error)})", _TOKEN_FIX) from error

    def _raise_error(self, response: Any) -> None:
        text = str(response.text).strip()
        if response.status_code == 404 and "does not exist" in text:
            raise UnknownJob(text)
        reason = f"status {response.status_code}: {_last_line(text)}"
        if response.status_code >= 500 or response.status_code in _LATER:
            raise Unreachable(reason)
        raise Refused(redact_text(self._address), f"refuses the request: {reason}")


class JobServer:
    """The job server of one cluster."""

    def __init__(self, access: Access) -> None:
        """Connect. Raise `UserError` if no job server answers, or if it asks for a token."""
        logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)
        place, address = _resolve(access.address)
        _check_port(place, address)
        address = address if "://" in address or not _answers(address) else f"http://{address}"
        try:
            # Ray would prefer these variables to the address that it is given.
            with _without(*ADDRESS_VARIABLES):
                self.client = _Client(address, headers=_headers(access.headers), verify=access.verify)
        except (Unreachable, UnknownJob, RayError, OSError, RuntimeError, ValueError) as error:
            problem = f"no Ray cluster answers ({_first_line(error)})"
            raise UserError(place, problem, "start one, or name its --address") from error
        self.address = redact_text(self.client.get_address())
        """URL of the job server, without a password."""
        self.option = f" --address {self.address}" if access.address else ""
        """What to add to commands of rzen that should reach the same server."""

    def details(self, job: str) -> JobDetails:
        """Return the state of a job, once the server answers. Raise `UnknownJob` or `ServerLost`."""
        details: JobDetails = self._patiently(job, self.client.get_job_info)
        return details

    def _patiently(self, job: str, request: Callable[[str], Any]) -> Any:
        patience = Patience(self, job, PATIENCE_S)
        while True:
            try:
                return request(job)
            except Unreachable as error:
                time.sleep(patience.next_delay_s(error))

    def job_ids(self) -> list[str]:
        """Return the ids of the jobs that were submitted, the newest first. Empty if the server does not answer."""
        try:
            jobs = [job for job in self.client.list_jobs() if job.submission_id]
        except Unreachable:
            return []
        return [str(job.submission_id) for job in sorted(jobs, key=lambda job: -(job.start_time or 0))]

    def stop(self, job: str) -> None:
        """Ask a job to stop, once the server answers. Raise `UnknownJob` or `ServerLost`."""
        self._patiently(job, self.client.stop_job)

    def connection(self) -> Connection:
        """Return a connection for following a job, to be used in `async with`."""
        return Connection(self.client)


class Connection:
    """Requests of a job server that can be interrupted, and the stream of a log.

    Ray's client cannot be interrupted, and does not notice a stream that has died.
    """

    def __init__(self, client: Any) -> None:
        self._url = f"{client.get_address()}/api/jobs"
        self._options: dict[str, Any] = {"cookies": client._cookies, "headers": client._headers, "trust_env": True}
        self._ssl: ssl.SSLContext | bool = True if client._ssl_context is None else client._ssl_context

    async def __aenter__(self) -> Self:
        self._session = await aiohttp.ClientSession(**self._options).__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def details(self, job: str) -> JobDetails:
        """Return the state of a job. Raise `UnknownJob` or `Unreachable`."""
        return JobDetails(**await self._get(f"/{job}"))

    async def log(self, job: str) -> str:
        """Return the whole log of a job. Raise `UnknownJob` or `Unreachable`."""
        return str((await self._get(f"/{job}/logs"))["logs"])

    async def stream(self, job: str) -> AsyncGenerator[str, None]:
        """Yield the log of a job from its start, and an empty text whenever nothing came for some seconds.

        The end of the stream says nothing about the job: Ray's servers also end it when one of them restarts.
        """
        try:
            async with self._session.ws_connect(
                f"{self._url}/{job}/logs/tail",
                ssl=self._ssl,
                heartbeat=_HEARTBEAT_S,
                timeout=aiohttp.ClientWSTimeout(ws_close=1.0),  # Ray's server may not answer
                max_msg_size=0,
            ) as stream:
                while True:
                    try:
                        message = await stream.receive(timeout=_SILENCE_S)
                    except TimeoutError:
                        yield ""
                        continue
                    if message.type != aiohttp.WSMsgType.TEXT:
                        return
                    yield message.data
        except (aiohttp.ClientError, OSError) as error:
            raise Unreachable(_reason(error)) from error

    async def _get(self, path: str) -> Any:
        limits = aiohttp.ClientTimeout(total=_ANSWER_S, sock_connect=_CONNECT_S)
        try:
            async with self._session.get(f"{self._url}{path}", ssl=self._ssl, timeout=limits) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unreachable(_reason(error)) from error
        if answer.status in (401, 403):
            raise UserError(self._url, f"asks for a token ({_last_line(text)})", _TOKEN_FIX)
        if answer.status == 404 and "does not exist" in text:
            raise UnknownJob(text)
        if answer.status != 200:
            raise Unreachable(f"status {answer.status}: {_last_line(text)}")
        try:
            return json.loads(text)
        except ValueError as error:
            raise Unreachable("the answer is not JSON") from error


def _resolve(address: str | None) -> tuple[str, str]:
    """Return where the address of the cluster was given, for errors, and the address."""
    if address:
        return f"--address {address}", address
    for name in ADDRESS_VARIABLES:
        if value := os.environ.get(name):
            return f"{name}={value}", value
    return DEFAULT_ADDRESS, DEFAULT_ADDRESS


def _check_port(place: str, address: str) -> None:
    """Raise `UserError` for a port that cannot exist. Ray would look for it in vain, for most of a minute."""
    try:
        urlsplit(address if "://" in address else f"//{address}").port  # noqa: B018  raises
    except ValueError as error:
        raise UserError(place, f"has no port of 0 to 65535 ({error})", "write it like http://head:8265") from error


def _answers(address: str) -> bool:
    """Return whether `host:port` is that of a dashboard. For Ray, an address without `http://` is one of its own."""
    try:
        return requests.get(f"http://{address}/api/version", timeout=_CONNECT_S).status_code in (200, 401, 403)
    except requests.exceptions.RequestException:
        return False


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Run a block without some variables of the environment."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ |= kept


def _headers(given: Mapping[str, str] | None) -> dict[str, str] | None:
    if given is not None:
        return dict(given)
    text = os.environ.get("RAY_JOB_HEADERS")
    if text is None:
        return None
    try:
        headers = json.loads(text)
    except ValueError:
        headers = None
    if not isinstance(headers, dict):
        raise UserError("RAY_JOB_HEADERS", "is not a JSON object", 'write it like {"X-Team": "search"}')
    return {str(name): str(value) for name, value in headers.items()}


def _reason(error: BaseException) -> str:
    """Return why a request failed, in a few words: the innermost error of the system, if there is one."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        inner = inner.__cause__ or inner.__context__
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no text"])[-1]
