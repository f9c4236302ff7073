"""A proxy between a client and an S3 server that spoils the answers a test asks it to."""

from __future__ import annotations

import http.client
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["slow_down", "reset", "truncate"]


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
