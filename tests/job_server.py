"""A stand-in for Ray's job server, with faults that a real one shows only now and then."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StandIn(ThreadingHTTPServer):
    """Answers as Ray's job server does. Without `streams`, it is as if behind a proxy without WebSockets."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.jobs: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, list[str]] = {}
        """What the log of a job is at each request. The last one stays."""
        self.ends_with: dict[str, Any] = {"status": "SUCCEEDED", "driver_exit_code": 0}
        """State of a job once its log is complete."""
        self.streams: list[list[str | None]] = []
        """Texts of the next streams of logs. After a last None, the connection is dead without an end. After `pong`, it
        is alive."""
        self.faults: list[int] = []
        """Status of the next answers, before they are right again. 0: no answer."""
        self.hidden = 0
        """How many of the next questions for a job are answered as if it were not there."""
        self.lost_answers = 0
        """How many of the next submissions arrive without an answer."""
        self.num_submitted = 0
        self.is_followed = threading.Event()
        self.headers_seen: list[dict[str, str]] = []

    def add(self, job: str, log: list[str], **details: Any) -> None:
        """Add a job that runs."""
        known = {"type": "SUBMISSION", "submission_id": job, "entrypoint": "x", "status": "RUNNING", "start_time": 1}
        self.jobs[job] = known | {"driver_node_id": "n", "driver_agent_http_address": "http://a"} | details
        self.logs[job] = log


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        self.server.headers_seen.append(dict(self.headers))
        path = self.path.strip("/").split("/")
        if path == ["api", "version"]:
            return self._answer({"version": "4", "ray_version": "2.60.0"})
        if self.server.faults:
            return self._fail(self.server.faults.pop(0))
        if path == ["api", "jobs"]:
            return self._answer(list(self.server.jobs.values()))
        if path[:2] == ["api", "packages"]:
            return self._answer({})
        job = path[2]
        if job not in self.server.jobs or self.server.hidden:
            self.server.hidden = max(0, self.server.hidden - 1)
            return self._answer(f"Job {job} does not exist", 404)
        if path[-1] == "tail":
            self.server.is_followed.set()
            return self._stream(self.server.streams.pop(0)) if self.server.streams else self._fail(500)
        log = self.server.logs[job]
        if path[-1] != "logs":
            return self._answer(self.server.jobs[job])
        if len(log) == 1 and self.server.jobs[job]["status"] == "RUNNING":
            self.server.jobs[job] |= self.server.ends_with
        return self._answer({"logs": log.pop(0) if len(log) > 1 else log[0]})

    def do_POST(self) -> None:
        if self.path.endswith("/stop"):
            job = self.path.strip("/").split("/")[2]
            self.server.jobs[job] |= {"status": "STOPPED"}
            return self._answer({"stopped": True})
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        job = request["submission_id"]
        if job in self.server.jobs:
            return self._answer(f"ValueError: Job with submission_id {job} already exists.", 400)
        self.server.num_submitted += 1
        sent = {name: request[name] for name in ("entrypoint", "metadata", "runtime_env")}
        self.server.add(job, ["one\n"], **sent)
        if self.server.lost_answers:
            self.server.lost_answers -= 1
            return self._fail(0)
        return self._answer({"job_id": job, "submission_id": job})

    def _stream(self, texts: list[str | None]) -> None:
        """Serve a WebSocket (RFC 6455): texts of at most 125 bytes, and answers to pings."""
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        self.send_response(101)
        for name, value in (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept)):
            self.send_header(name, value)
        self.end_headers()
        for text in texts:
            if text and text != "pong":
                self._frame(0x1, text.encode())
        self.close_connection = True
        if texts[-1] is None:
            time.sleep(10)
        while (frame := self.connection.recv(125)) and frame[0] & 0xF == 0x9:
            self._frame(0xA, b"")

    def _frame(self, kind: int, data: bytes) -> None:
        self.wfile.write(bytes([0x80 | kind, len(data)]) + data)

    def _answer(self, content: Any, status: int = 200) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _fail(self, status: int) -> None:
        if status:
            return self._answer("out of order", status)
        self.close_connection = True
        self.connection.close()
        return None

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """Serve until the block ends."""
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
