"""An S3 server for tests: moto's in a process of its own, or a real store named by RZEN_TEST_S3_ENDPOINT.

`FaultyProxy` stands between client and server and spoils the answers that a test asks it to.
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["slow_down", "reset", "truncate"]
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
_START_S = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server() -> Iterator[str]:
    """URL of an empty S3 server; it ends with the block."""
    if external := os.environ.get("RZEN_TEST_S3_ENDPOINT"):
        yield external
        return
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s:
        assert server.poll() is None, "moto's server ended: is moto[server] installed?"
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise TimeoutError(f"moto's server did not start in {_START_S} s")


class FaultyProxy:
    """Forwards to `endpoint`. Each entry of `faults` spoils one GET, in order; `num_requests` counts all."""

    def __init__(self, endpoint: str) -> None:
        self.faults: list[Fault] = []
        self.num_requests = 0
        proxy, target = self, urlsplit(endpoint).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _forward(self) -> None:
                proxy.num_requests += 1
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = proxy.faults.pop(0) if self.command == "GET" and proxy.faults else None
                if fault == "slow_down":
                    self._answer(503, b"<Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>", [])
                    return
                connection = http.client.HTTPConnection(target, timeout=30)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                data = answer.read()
                hidden = {"content-length", "transfer-encoding", "connection"}
                headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in hidden]
                if self.command == "HEAD":
                    headers.append(("Content-Length", answer.getheader("Content-Length") or "0"))
                self._answer(answer.status, data, headers, fault)
                connection.close()

            def _answer(
                self, status: int, data: bytes, headers: list[tuple[str, str]], fault: Fault | None = None
            ) -> None:
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                if self.command != "HEAD":
                    # A truncating store is consistent with itself: it announces as little as it sends.
                    data = data[: len(data) // 2] if fault == "truncate" else data
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if fault == "reset" else data)
                if fault == "reset":
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
