"""The routes of the server as an ASGI application. A `Backend` answers: the engine, or model replicas elsewhere."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pipelines.samples import Clip, TimeRange
from rzen.serving.dialects.routes import PAIR_ROUTES, ROUTES, Dialect, PairDialect, dialect_of
from rzen.serving.dialects.searching import parse_search, search_answer
from rzen.serving.fetching import fetch_media
from rzen.serving.guards import PAGE, REQUEST_ID, ApiKeys, App, Guards
from rzen.serving.types import (
    Answered,
    EmbedRequest,
    Found,
    Limits,
    RequestError,
    Scored,
    ScoreRequest,
    SearchRequest,
    ServedInput,
)

_JSON_TYPES = ("application/json", "text/json")
_VERSION = "x-rzen-version"
"""Header of an answer: the version of the model, or of model and corpus, that gave it."""
_START_S, _END_S = "x-rzen-start-s", "x-rzen-end-s"
"""Headers of a clip: where in it the segment begins and ends."""
_KEPT = {"Cache-Control": "private, max-age=3600"}
_FETCHES = 4
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self' blob: data:; media-src blob:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_CLIENT_LEFT = 499


class Backend(Protocol):
    """What answers requests. Each method raises `RequestError`."""

    async def embed(self, request: EmbedRequest) -> Answered:
        """Return the vectors of a request."""

    async def search(self, request: SearchRequest) -> Found:
        """Return the hits of a query."""

    async def score(self, request: ScoreRequest) -> Scored:
        """Return the scores of pairs."""

    async def picture(self, split: str, source: str, index: int, segment: TimeRange | None) -> bytes:
        """Return a WebP of a target of the corpus, or of a segment of a video."""

    async def clip(self, split: str, source: str, index: int, segment: TimeRange | None) -> Clip:
        """Return a video of the corpus, or a segment of it, as a file that a browser plays."""

    async def check(self) -> None:
        """Raise `RequestError` 503 unless requests would be answered rightly now."""

    async def describe(self) -> Mapping[str, Any]:
        """Return what `/v1/models` lists of the model: version, dimensions, tasks, corpus."""

    async def metrics(self) -> str:
        """Return metrics in the text format of Prometheus."""


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """What clients may ask, and how much of it."""

    name: str
    """Name of the model for clients."""
    adapters: tuple[str, ...] = ()
    """Names of adapters on it. Clients ask for `name:adapter`."""
    limits: Limits = field(default_factory=Limits)
    allow_urls: tuple[str, ...] = ()
    max_body_bytes: int = 64 << 20
    body_timeout_s: float = 20.0


def build_app(
    backend: Backend,
    settings: GatewaySettings,
    keys: ApiKeys,
    on_answer: Callable[[str, int, float], None] = lambda path, status, seconds: None,
) -> App:
    """Return the application. `on_answer` gets route, status and seconds of each request."""
    routes = _Routes(backend, settings)
    paths = {path: routes.embeddings(dialect) for path, dialect in ROUTES.items()} | {"/v1/search": routes.search}
    paths |= {path: routes.pairs(dialect) for path, dialect in PAIR_ROUTES.items()}
    page = {path: _page_file(name, kind) for path, (name, kind) in PAGE.items()}
    app = Starlette(
        routes=[
            *(Route(path, handler, methods=["POST"]) for path, handler in paths.items()),
            *(Route(path, file, methods=["GET"]) for path, file in page.items()),
            Route("/v1/pictures/{split}/{source}/{index:int}", routes.picture, methods=["GET"]),
            Route("/v1/clips/{split}/{source}/{index:int}", routes.clip, methods=["GET"]),
            Route("/v1/models", routes.models, methods=["GET"]),
            Route("/v1/models/{name:path}", routes.model, methods=["GET"]),
            Route("/healthz", routes.health, methods=["GET"]),
            Route("/readyz", routes.ready, methods=["GET"]),
            Route("/metrics", routes.metrics, methods=["GET"]),
        ],
        exception_handlers={404: _no_route, 405: _no_method, RequestError: _failed},
    )
    known = {*paths, *page, "/v1/models", "/healthz", "/readyz", "/metrics"}

    def counted(path: str, status: int, seconds: float) -> None:
        # A client that leaves has no status. Unknown paths are one, because clients invent them.
        on_answer(path if path in known else "other", status or _CLIENT_LEFT, seconds)

    return Guards(app, keys, settings.max_body_bytes, settings.body_timeout_s, counted)


class _Routes:
    def __init__(self, backend: Backend, settings: GatewaySettings) -> None:
        self._backend, self._settings = backend, settings
        self._fetches = ThreadPoolExecutor(_FETCHES, thread_name_prefix="fetch")

    def embeddings(self, dialect: Dialect) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            asked = dialect.parse(await _body(request), self._settings.limits)
            self._check_name(asked.model)
            inputs = await self._fetched(asked.inputs)
            answered = await self._backend.embed(replace(asked, inputs=inputs))
            name, request_id = asked.model or self._settings.name, request.state.request_id
            content = dialect.answer(asked, answered.vectors, answered.usage, name, request_id)
            return _json(content, answered.version)

        return handle

    def pairs(self, dialect: PairDialect) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            body = await _body(request)
            asked = dialect.parse(body, self._settings.limits)
            self._check_name(asked.model)
            queries, documents = await self._fetched(asked.queries), await self._fetched(asked.documents)
            scored = await self._backend.score(replace(asked, queries=queries, documents=documents))
            name, request_id = asked.model or self._settings.name, request.state.request_id
            return _json(dialect.answer(body, request.url.path, scored, name, request_id), scored.version)

        return handle

    async def search(self, request: Request) -> Response:
        asked = parse_search(await _body(request), self._settings.limits)
        self._check_name(asked.model)
        if isinstance(asked.query, ServedInput):
            (query,) = await self._fetched((asked.query,))
            asked = replace(asked, query=query)
        found = await self._backend.search(asked)
        return _json(search_answer(found.hits, self._settings.name, found.version), found.version)

    async def picture(self, request: Request) -> Response:
        path = request.path_params
        data = await self._backend.picture(path["split"], path["source"], path["index"], _segment(request))
        return Response(data, media_type="image/webp", headers=_KEPT)

    async def clip(self, request: Request) -> Response:
        path = request.path_params
        clip = await self._backend.clip(path["split"], path["source"], path["index"], _segment(request))
        place = {_START_S: f"{clip.start_s:.3f}", _END_S: f"{clip.end_s:.3f}"}
        return Response(clip.data, media_type=clip.media_type, headers=_KEPT | place)

    async def models(self, request: Request) -> Response:
        described = await self._described()
        adapted = [self._described_adapter(name) for name in self._names if name != self._settings.name]
        return JSONResponse({"object": "list", "data": [described, *adapted]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._check_name(name)
        is_base = name == self._settings.name
        return JSONResponse(await self._described() if is_base else self._described_adapter(name))

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        await self._backend.check()
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(await self._backend.metrics(), media_type="text/plain; version=0.0.4")

    async def _described(self) -> dict[str, Any]:
        described = await self._backend.describe()
        return {"id": self._settings.name, "object": "model", "created": 0, "owned_by": "rzen", **described}

    def _described_adapter(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "rzen", "parent": self._settings.name}

    @property
    def _names(self) -> list[str]:
        settings = self._settings
        return [settings.name, *(f"{settings.name}:{adapter}" for adapter in settings.adapters)]

    def _check_name(self, name: str | None) -> None:
        if name is not None and name not in self._names:
            names = " or ".join(map(repr, self._names))
            problem = f"the model {name!r} is not served here; use {names}, or leave it out"
            raise RequestError(404, problem, "model", reason="model_not_found")

    async def _fetched(self, inputs: Any) -> Any:
        """Return inputs with the files of their URLs."""
        if not any(part.url for one in inputs for part in one.media):
            return inputs
        loop = asyncio.get_running_loop()
        settings = self._settings
        return await loop.run_in_executor(self._fetches, fetch_media, inputs, settings.allow_urls, settings.limits)


def _segment(request: Request) -> TimeRange | None:
    """Return the part of a video that an address asks for, None for all of it. Raises `RequestError` 400."""
    given = [request.query_params.get(name) for name in ("start_s", "end_s")]
    if given == [None, None]:
        return None
    try:
        start_s, end_s = (float(value or "nan") for value in given)
    except ValueError:
        start_s = end_s = math.nan
    if not 0 <= start_s < end_s < math.inf:
        raise RequestError(400, "start_s and end_s are not a range of seconds", "start_s")
    return TimeRange(start_s, end_s)


def _page_file(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    data = files("rzen.serving").joinpath("page", name).read_bytes()

    async def handle(request: Request) -> Response:
        return Response(data, media_type=kind, headers=_PAGE_HEADERS)

    return handle


async def _body(request: Request) -> Any:
    """Return the JSON of a request."""
    sent = request.headers.get("content-type", "")
    if sent and sent.partition(";")[0].strip().lower() not in _JSON_TYPES:
        raise RequestError(415, f"the content type is {sent[:80]}; send application/json", reason="content_type")
    try:
        data = await request.body()
    except ClientDisconnect as error:
        raise RequestError(400, "the body ends too early", reason="short_body") from error
    try:
        return await asyncio.to_thread(_parsed, data)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {str(error)[:200]}", reason="not_json") from error


def _parsed(data: bytes) -> Any:
    return json.loads(data, parse_constant=_no_constant)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _json(content: Any, version: str) -> Response:
    return JSONResponse(content, headers={_VERSION: version})


def _failed(request: Request, error: Any) -> Response:
    path, request_id = request.url.path, getattr(request.state, REQUEST_ID)
    return JSONResponse(dialect_of(path).failure(error, request_id), error.status, headers=_closing(error))


def _closing(error: RequestError) -> dict[str, str]:
    # What is left of such a body is not read.
    return error.headers | ({"Connection": "close"} if error.status in (408, 413) else {})


def _no_route(request: Request, error: Any) -> Response:
    paths = ", ".join((*ROUTES, *PAIR_ROUTES, "/v1/search", "/v1/models"))
    return _failed(request, RequestError(404, f"{request.url.path} is not served here; use {paths}"))


def _no_method(request: Request, error: Any) -> Response:
    return _failed(request, RequestError(405, f"{request.method} is not allowed for {request.url.path}"))
