"""What stands before every route: request ids, API keys, limits of the body. ASGI middleware, in this order."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from rzen.serving.dialects.routes import dialect_of
from rzen.serving.types import RequestError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

REQUEST_ID = "request_id"
"""Key of the request's id in the ASGI scope's `state`."""
KEYS_VARIABLE = "RZEN_API_KEYS"
PAGE = {
    "/": ("index.html", "text/html"),
    "/page/search.js": ("search.js", "text/javascript"),
    "/page/search.css": ("search.css", "text/css"),
}
"""Path of the search page and its parts -> file and content type. They hold no data and need no key."""
_OPEN = ("/healthz", "/readyz", *PAGE)
_LEAST_KEY_CHARACTERS = 16
_ID = re.compile(r"[\w.:+-]{1,128}")
_MIN_BYTES_PER_S = 16 << 10
_log = logging.getLogger(__name__)


class ApiKeys:
    """The keys that open the server: those of a file, one a line, or of RZEN_API_KEYS, with commas.

    A file that changes is read again. Keys are kept as hashes. Without both, everybody may ask.
    """

    def __init__(self, path: str | None) -> None:
        self._path = Path(path).expanduser() if path else None
        self._read_at: tuple[int, int] | None = None
        self._hashes: list[bytes] = []
        if self._path is None:
            self._hashes = _hashed(os.environ.get(KEYS_VARIABLE, "").split(","), KEYS_VARIABLE)
        else:
            self._refresh()

    @property
    def are_needed(self) -> bool:
        """Return whether a request needs a key."""
        return self._path is not None or bool(self._hashes)

    def accept(self, key: str) -> bool:
        """Return whether a key is one of them, in the same time for every key."""
        self._refresh()
        given = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        return sum(hmac.compare_digest(given, known) for known in self._hashes) > 0  # looks at all of them

    def _refresh(self) -> None:
        if self._path is None:
            return
        try:
            stat = self._path.stat()
            if self._read_at != (stat.st_mtime_ns, stat.st_size):
                self._hashes = _hashed(self._path.read_text().splitlines(), str(self._path))
                self._read_at = (stat.st_mtime_ns, stat.st_size)
        except OSError as error:
            if self._read_at is None:
                raise UserError(str(self._path), error.strerror or str(error), "write a key on each line") from error
            _log.warning("%s: %s; the keys that were read before stay", self._path, error)


def _hashed(lines: list[str], place: str) -> list[bytes]:
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if any(len(key) < _LEAST_KEY_CHARACTERS for key in keys):
        problem = f"has a key of fewer than {_LEAST_KEY_CHARACTERS} characters"
        raise UserError(place, problem, "make one with `openssl rand -hex 24`")
    return [hashlib.sha256(key.encode()).digest() for key in keys]


class Guards:
    """Gives each request an id, checks its key, and limits bytes and time of its body. Wraps an ASGI application.

    Errors that a route does not handle become a 500 without details. `on_answer` gets path, status and seconds.
    """

    def __init__(
        self,
        app: App,
        keys: ApiKeys,
        max_body_bytes: int,
        body_timeout_s: float,
        on_answer: Callable[[str, int, float], None] = lambda path, status, seconds: None,
    ) -> None:
        self._app, self._keys = app, keys
        self._max_body_bytes, self._body_timeout_s = max_body_bytes, body_timeout_s
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given_id = headers.get("x-request-id", "")
        request_id = given_id if _ID.fullmatch(given_id) else uuid.uuid4().hex
        scope.setdefault("state", {})[REQUEST_ID] = request_id
        start_s = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            await self._app(scope, self._limited(receive, headers), send_with_id)
        except RequestError as error:
            if status:
                raise
            await send_error(error, scope["path"], request_id, send_with_id)
        except Exception:
            _log.exception("request %s to %s failed", request_id, scope["path"])
            if status:
                raise
            failure = RequestError(500, f"the server failed; its log has request {request_id}")
            await send_error(failure, scope["path"], request_id, send_with_id)
        finally:
            self._on_answer(scope["path"], status, time.monotonic() - start_s)

    def _check_key(self, path: str, headers: dict[str, str]) -> None:
        if path in _OPEN or not self._keys.are_needed:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key") or headers.get("api-key") or ""
        if not key:
            raise RequestError(401, "a key is needed: send `Authorization: Bearer KEY`", reason="no_key")
        if not self._keys.accept(key):
            raise RequestError(401, "the key is not valid", reason="wrong_key")

    def _limited(self, receive: Receive, headers: dict[str, str]) -> Receive:
        """Return `receive` that counts what arrives. A declared length is only believed if it is too large."""
        most = self._max_body_bytes
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            raise RequestError(413, f"the body has {declared} bytes; send at most {most}", reason="too_many_bytes")
        start_s = time.monotonic()
        num_bytes = 0
        is_whole = False

        async def limited() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:  # the next message comes when the client leaves
                return await receive()
            left_s = start_s + self._body_timeout_s + num_bytes / _MIN_BYTES_PER_S - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, left_s))
            except TimeoutError as error:
                raise RequestError(408, "the body did not arrive in time", reason="slow_body") from error
            num_bytes += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if num_bytes > most:
                raise RequestError(413, f"the body has more than {most} bytes", reason="too_many_bytes")
            return message

        return limited


async def send_error(error: RequestError, path: str, request_id: str, send: Send) -> None:
    """Send an error in the dialect of its route."""
    content = dialect_of(path).failure(error, request_id)
    headers = {"content-type": "application/json", **error.headers}
    if error.status in (408, 413):  # what is left of the body is not read
        headers["connection"] = "close"
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})
