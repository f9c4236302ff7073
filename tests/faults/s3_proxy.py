"""A seeded, stormy proxy between a client and an S3 server. Answers to GET and HEAD may be spoilt, and to others by
choice; the rest passes.

    slow_down     503 SlowDown, and again for each of the next requests of a burst
    reset         RST instead of an answer; the server has not been asked
    lost          RST instead of an answer; the server has done it
    reset_body    RST after the header and half of the body
    short         half of the body, announced as if it were all
    truncate      half of the body that Content-Length announces, then an orderly end
    empty         nothing of the body that Content-Length announces, then an orderly end
    delay         the whole answer, `delay_s` late
    trickle       the whole answer, in pieces that take `delay_s` together

The answer to a HEAD or a write has no body to spoil: it gets a reset instead.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from typing import Literal, SupportsIndex, get_args
from urllib.parse import urlsplit

Fault = Literal["slow_down", "reset", "lost", "reset_body", "short", "truncate", "empty", "delay", "trickle"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
BODYLESS: tuple[Fault, ...] = ("slow_down", "reset", "lost", "delay")  # those that a HEAD or a write can have too

_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # linger for 0 s: close() sends RST
_NUM_PIECES = 8
_HOP_HEADERS = {"connection", "content-length", "date", "server", "transfer-encoding"}


class StormyProxy:
    """Forwards to `endpoint` from its own threads, as a context manager. Serves until the block ends.

    A share `fraction` of the requests that may be spoilt is; the kinds take turns, in a seeded order. What becomes of
    the n-th request depends on `seed` and n only; which request is the n-th is for the clients to decide. `faults`
    are dealt first, in order. All of this may be changed at any time.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        fraction: float = 0.0,
        seed: int = 0,
        kinds: Sequence[Fault] = FAULTS,
        burst: int = 3,
        delay_s: float = 0.3,
        port: int = 0,
    ) -> None:
        self.fraction = fraction
        self.faults: list[Fault | None] = []
        self.burst = burst
        self.delay_s = delay_s
        self.commands = ("GET", "HEAD")
        """Requests that may be spoilt."""
        self.num_requests = 0
        """Requests that might have been spoilt."""
        self.counts: Counter[Fault] = Counter()
        """Requests that were, by kind."""
        self.target = urlsplit(endpoint).netloc
        self._rng = random.Random(seed)
        self._deck = cycle(self._rng.sample(kinds, len(kinds)))
        self._left_of_burst = 0
        self._lock = threading.Lock()
        self._server = _Server(self, port)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> StormyProxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Every request of every kind gets a reset while the block runs."""
        commands, faults = self.commands, self.faults
        self.commands = ("GET", "HEAD", "PUT", "POST", "DELETE")
        self.faults = _Endless("reset")
        try:
            yield
        finally:
            self.commands, self.faults = commands, faults

    def deal(self, command: str) -> Fault | None:
        """The fault of the next request, counted."""
        if command not in self.commands:
            return None
        with self._lock:
            self.num_requests += 1
            fault = self._next_fault()
            if fault and command != "GET" and fault not in BODYLESS:
                fault = "reset"
            if fault:
                self.counts[fault] += 1
            return fault

    def _next_fault(self) -> Fault | None:
        strikes = self._rng.random() < self.fraction  # drawn every time: the n-th draw belongs to the n-th request
        if self.faults:
            return self.faults.pop(0)
        if self._left_of_burst:
            self._left_of_burst -= 1
            return "slow_down"
        if not strikes:
            return None
        fault = next(self._deck)
        if fault == "slow_down":
            self._left_of_burst = self.burst - 1
        return fault


class _Endless(list[Fault | None]):
    """The same fault for every request."""

    def __init__(self, fault: Fault) -> None:
        super().__init__([fault])

    def pop(self, index: SupportsIndex = -1) -> Fault | None:
        return self[index]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, proxy: StormyProxy, port: int) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, *_: object) -> None:
        """Clients hang up when they are tired of waiting: nothing to tell."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body would wait 40 ms for the receipt of its header

    def log_message(self, *_: object) -> None:
        """Nothing: the test counts."""

    def _serve(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = proxy.deal(self.command)
        if fault == "reset":
            self._reset()
        elif fault == "slow_down":
            self._answer(503, [], b"" if self.command == "HEAD" else _SLOW_DOWN)
        else:
            if fault == "delay":
                time.sleep(proxy.delay_s)
            answer = self._asked(proxy.target, body)
            if fault == "lost":
                self._reset()
            else:
                self._answer(*answer, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815

    def _asked(self, target: str, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """Status, headers and body of the server's answer. It sees the client's headers, and so the signed host."""
        connection = http.client.HTTPConnection(target, timeout=30)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            headers = [item for item in answer.getheaders() if item[0].lower() not in _HOP_HEADERS]
            if self.command == "HEAD":
                headers.append(("Content-Length", answer.getheader("Content-Length", "0")))
            return answer.status, headers, answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, fault: Fault | None = None) -> None:
        self.send_response_only(status)
        half = body[: len(body) // 2]
        if fault == "short":
            body = half
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault in ("truncate", "empty"):
            self.wfile.write(half if fault == "truncate" else b"")
            self.close_connection = True
        elif fault == "reset_body":
            self.wfile.write(half)
            self._reset()
        elif fault == "trickle":
            self._trickle(body)
        else:
            self.wfile.write(body)

    def _trickle(self, body: bytes) -> None:
        size = -(-len(body) // _NUM_PIECES) or 1
        for start in range(0, len(body), size):
            time.sleep(self.server.proxy.delay_s / _NUM_PIECES)
            self.wfile.write(body[start : start + size])

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.rfile.close()  # holds the socket open, too
        self.connection.close()
