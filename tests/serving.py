"""A server in this process: the engine and its routes on a port of loopback, without Ray."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import uvicorn

from jobs.runtime.local_s3 import free_port
from jobs.serving.targets import Targets, thumbnail
from pipelines.samples import Clip, TimeRange
from rzen.serving.engine import Engine
from rzen.serving.gateway import GatewaySettings, build_app
from rzen.serving.guards import ApiKeys
from rzen.serving.types import Answered, EmbedRequest, Found, RequestError, Scored, ScoreRequest, SearchRequest

NAME = "tiny"
T = TypeVar("T")


class Local:
    """The engine as the backend of a gateway."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._thread = ThreadPoolExecutor(1)
        self._targets: Targets | None = None

    async def embed(self, request: EmbedRequest) -> Answered:
        return await self.engine.embed(request)

    async def search(self, request: SearchRequest) -> Found:
        return await self.engine.search(request)

    async def score(self, request: ScoreRequest) -> Scored:
        return await self.engine.score(request)

    async def picture(self, split: str, source: str, index: int, segment: TimeRange | None) -> bytes:
        target = await self._in_thread(lambda targets: targets.read(split, source, index, segment))
        if target is None or not target.frames:
            raise RequestError(404, "there is no such picture")
        return thumbnail(target.frames)

    async def clip(self, split: str, source: str, index: int, segment: TimeRange | None) -> Clip:
        clip = await self._in_thread(lambda targets: targets.clip(split, source, index, segment))
        if clip is None:
            raise RequestError(404, "there is no such clip")
        return clip

    async def _in_thread(self, show: Callable[[Targets], T]) -> T:
        assert self.engine.served.corpus is not None
        self._targets = self._targets or Targets(self.engine.served.corpus.manifest)
        return await asyncio.get_running_loop().run_in_executor(self._thread, show, self._targets)

    async def check(self) -> None:
        await self.engine.check()

    async def describe(self) -> dict[str, Any]:
        return {"version": self.engine.served.version, "dimensions": list(self.engine.served.dimensions)}

    async def metrics(self) -> str:
        return ""


@contextmanager
def http_server(engine: Engine, keys: ApiKeys | None = None, **settings: Any) -> Iterator[str]:
    """URL of a server that answers with an engine."""
    app = build_app(Local(engine), GatewaySettings(NAME, **settings), keys or ApiKeys(None))
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline_s = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


def send_raw(url: str, data: bytes, timeout_s: float = 10.0) -> bytes:
    """Send bytes to a server and return what it answers until it closes or pauses."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout_s) as connection:
        connection.sendall(data)
        try:
            return connection.recv(65536)
        except TimeoutError:
            return b""
