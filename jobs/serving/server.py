"""The server as an application of Ray Serve: gateways that read requests, and replicas that hold the model.

    client -> proxy of Ray -> gateway (keys, limits, parsing, URLs) -> replica (sandbox, queue, model)
                                                                        replicas -> trials, if there is a canary

The application is changed by a config, never by `serve.run`, which replaces every replica. Only the place of the model
is in `user_config`: replicas load it in a thread, and answer meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from ray import serve
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Gauge, Histogram

from jobs.serving.pairs import find_place
from jobs.serving.scraping import scrape
from jobs.serving.specs import ServeSpec
from jobs.serving.trials import RemoteTrials, TrialDeployment
from pipelines.samples import Clip, TimeRange
from rzen.serving.guards import ApiKeys
from rzen.serving.types import EmbedRequest, Limits, RequestError, ScoreRequest, SearchRequest

_log = logging.getLogger(__name__)
_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
_LOST = "a replica ended while it answered; ask again"
_ATTEMPTS = 3
T = TypeVar("T")


def build(settings: dict[str, Any]) -> serve.Application:
    """Return the application for the settings of a `ServeSpec`, without the place of the model."""
    spec = ServeSpec.model_validate(settings)
    replica = _MODEL_REPLICA.options(
        **_scale(spec),
        max_ongoing_requests=spec.max_requests,
        max_queued_requests=spec.max_requests,
        ray_actor_options={"num_cpus": spec.cpus_per_replica, "num_gpus": spec.gpus_per_replica},
    )
    gateway = _GATEWAY.options(
        num_replicas=spec.gateways,
        max_ongoing_requests=4 * spec.max_requests,
        max_queued_requests=spec.max_requests,
    )
    trials = None if spec.canary is None else _TRIALS.bind(spec.canary.model_dump(mode="json"))
    return gateway.bind(settings, replica.bind(settings, trials))


def _scale(spec: ServeSpec) -> dict[str, Any]:
    """Return how many model replicas there are: a number, or a range in which Ray Serve follows the load."""
    if spec.max_replicas is None:
        return {"num_replicas": spec.replicas}
    limits = {"min_replicas": spec.replicas, "max_replicas": spec.max_replicas}
    return {"autoscaling_config": limits | {"target_ongoing_requests": spec.target_requests}}


class ModelReplica:
    """Holds the engine. It looks from time to time whether model or corpus were replaced, or others were promoted."""

    def __init__(self, settings: dict[str, Any], trials: DeploymentHandle | None) -> None:
        from rzen.serving.engine import Engine, EngineSettings
        from rzen.serving.follower import Follower

        spec = ServeSpec.model_validate(settings)
        self._metrics = _ReplicaMetrics()
        threads = max(1, round(spec.cpus_per_replica))
        engine_settings = EngineSettings(spec.chunk_tokens, spec.max_waiting_tokens, threads, spec.media)
        self._engine = Engine(engine_settings, self._metrics.record, self._metrics.count_answer)
        shared = None if trials is None else RemoteTrials(trials)
        self._follower = Follower(self._engine, self._where, spec.canary, self._metrics.count_reload, shared)
        self._reload_s = spec.reload_s
        self._place: dict[str, Any] | None = None
        self._picture_thread = ThreadPoolExecutor(1, thread_name_prefix="picture")
        self._targets: Any = None
        self._tasks: set[asyncio.Task[None]] = set()

    def _where(self) -> Any:
        assert self._place is not None
        return find_place(self._place)

    async def reconfigure(self, place: dict[str, Any]) -> None:
        """Load the model at a place: the first one now, later ones in the background."""
        is_first = self._place is None
        self._place = place
        if not is_first:  # a replica gets no requests until this function returns
            self._start(self._follower.refresh())
            return
        await self._follower.start()
        if self._reload_s is not None:
            self._start(self._follower.watch(self._reload_s))

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def embed(self, request: EmbedRequest) -> Any:
        """Return an `Answered`, or the `RequestError`: Ray would wrap what is raised."""
        return await _returned(self._engine.embed(request))

    async def search(self, request: SearchRequest) -> Any:
        """Return a `Found` or a `RequestError`."""
        return await _returned(self._engine.search(request))

    async def score(self, request: ScoreRequest) -> Any:
        """Return a `Scored` or a `RequestError`."""
        return await _returned(self._engine.score(request))

    async def picture(self, split: str, source: str, index: int, segment: TimeRange | None) -> Any:
        """Return a WebP of a target of the corpus, or a `RequestError`."""
        return await _returned(self._shown(_picture, split, source, index, segment))

    async def clip(self, split: str, source: str, index: int, segment: TimeRange | None) -> Any:
        """Return a `Clip` of a video of the corpus, or a `RequestError`."""
        return await _returned(self._shown(_clip, split, source, index, segment))

    async def _shown(self, show: Callable[..., Any], split: str, source: str, *place: Any) -> Any:
        """Return what `show` makes of a target. Raises `RequestError` 404 where there is none."""
        corpus = self._engine.served.corpus
        if corpus is not None and split in corpus.manifest.get("fingerprints", {}):  # it becomes part of a path
            loop = asyncio.get_running_loop()
            shown = await loop.run_in_executor(self._picture_thread, self._show, show, corpus, split, source, *place)
            if shown is not None:
                return shown
        raise RequestError(404, "there is no such picture or clip", reason="no_picture")

    def _show(self, show: Callable[..., Any], corpus: Any, *place: Any) -> Any:
        from jobs.serving.targets import Targets

        if self._targets is None or self._targets[0] != corpus.key:
            self._targets = (corpus.key, Targets(corpus.manifest))
        return show(self._targets[1], *place)

    async def check(self) -> Any:
        """Return None or a `RequestError`."""
        return await _returned(self._engine.check())

    async def describe(self) -> dict[str, Any]:
        """Return what `/v1/models` lists."""
        self._report()
        served = self._engine.served
        embedder, corpus = served.embedder, served.corpus
        return {
            "version": served.version,
            "dimensions": list(served.dimensions),
            "max_text_tokens": embedder.processor.prompt.max_text_tokens,
            "tasks": {name: dict(task) for name, task in embedder.tasks.items()},
            "reranker": served.place.reranker,
            "corpus": None if corpus is None else {"url": corpus.url, "targets": corpus.manifest["num_vectors"]},
        }

    def _report(self) -> None:
        """Set the gauges. Ray drops one that was not set for some seconds."""
        self._metrics.set_waiting(self._engine.promised_tokens)
        self._metrics.set_version(self._engine.served)

    async def check_health(self) -> None:
        """Raise if the model gives no right vectors any more, so that Ray replaces the replica."""
        self._report()
        if self._engine.may_be_broken:
            await self._engine.check()


def _picture(targets: Any, split: str, source: str, index: int, segment: TimeRange | None) -> bytes | None:
    from jobs.serving.targets import thumbnail

    target = targets.read(split, source, index, segment)
    return thumbnail(target.frames) if target is not None and target.frames else None


def _clip(targets: Any, split: str, source: str, index: int, segment: TimeRange | None) -> Clip | None:
    clip: Clip | None = targets.clip(split, source, index, segment)
    return clip


async def _returned(answer: Awaitable[T]) -> T | RequestError:
    try:
        return await answer
    except RequestError as error:
        return error


class _ReplicaMetrics:
    """Counters of a model replica, which Ray exports from each node."""

    def __init__(self) -> None:
        self._items = Counter("rzen_serve_items", "Inputs that went through the model.")
        self._tokens = Counter("rzen_serve_tokens", "Tokens of these inputs.")
        self._padded = Counter("rzen_serve_padded_tokens", "Tokens of the batches, padding included.")
        self._batch_s = Histogram("rzen_serve_batch_s", "Seconds of a batch in the model.", boundaries=_SECONDS)
        self._waiting = Gauge("rzen_serve_waiting_tokens", "Tokens of requests that are not answered yet.")
        self._reloads = Counter("rzen_serve_reloads", "Exchanges of the model.", tag_keys=("result",))
        self._answers = Counter("rzen_serve_answers", "Requests of a version.", tag_keys=("version", "result"))
        tags = ("version", "model", "corpus")
        self._version = Gauge("rzen_serve_version", "1 for the model and corpus that answer.", tag_keys=tags)

    def record(self, stats: Any) -> None:
        """Count a batch."""
        self._items.inc(stats.items)
        self._tokens.inc(stats.tokens)
        self._padded.inc(stats.padded_tokens)
        self._batch_s.observe(stats.seconds)

    def count_reload(self, result: str) -> None:
        """Count an exchange of the model: `ok`, `failed`, or `given_up` after its trial."""
        self._reloads.inc(1, {"result": result})

    def count_answer(self, version: str, ok: bool) -> None:
        """Count a request that a model answered, or on which it failed."""
        self._answers.inc(1, {"version": version, "result": "ok" if ok else "failed"})

    def set_version(self, served: Any) -> None:
        """Set the model and the corpus that answer."""
        corpus = "" if served.corpus is None else served.corpus.manifest.get("version", served.corpus.key[:16])
        self._version.set(1, {"version": served.version, "model": served.place.model, "corpus": corpus})

    def set_waiting(self, tokens: int) -> None:
        """Set the tokens that wait."""
        self._waiting.set(tokens)


class _Replicas:
    """The backend of a gateway: model replicas, chosen by Ray.

    A request of a replica that ends is given to another one. Vectors are the same, and nothing is stored.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def embed(self, request: EmbedRequest) -> Any:
        return await self._ask("embed", request)

    async def search(self, request: SearchRequest) -> Any:
        return await self._ask("search", request)

    async def score(self, request: ScoreRequest) -> Any:
        return await self._ask("score", request)

    async def picture(self, split: str, source: str, index: int, segment: TimeRange | None) -> bytes:
        picture: bytes = await self._ask("picture", split, source, index, segment)
        return picture

    async def clip(self, split: str, source: str, index: int, segment: TimeRange | None) -> Clip:
        clip: Clip = await self._ask("clip", split, source, index, segment)
        return clip

    async def check(self) -> None:
        await self._ask("check")

    async def describe(self) -> Mapping[str, Any]:
        described: Mapping[str, Any] = await self._ask("describe")
        return described

    async def metrics(self) -> str:
        return await asyncio.to_thread(scrape)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        from ray.exceptions import RayActorError

        for attempt in range(_ATTEMPTS):
            try:
                answer = await getattr(self._handle, method).remote(*arguments)
            except BackPressureError as error:
                raise RequestError(429, "too many requests wait", reason="queue_full", retry_after_s=1) from error
            except (RayActorError, RayServeException) as error:
                _log.warning("%s, attempt %d: %s", method, attempt + 1, error)
                await asyncio.sleep(0.1 * attempt)
                continue
            if isinstance(answer, RequestError):
                raise answer
            return answer
        raise RequestError(503, _LOST, reason="replica_lost", retry_after_s=2)


@serve.ingress()
class Gateway:
    """Reads requests and writes answers. It has no model, and does not load torch."""

    def __init__(self, settings: dict[str, Any], replicas: DeploymentHandle) -> None:
        self._spec = ServeSpec.model_validate(settings)
        self._replicas = replicas
        tags = ("route", "status")
        self._requests = Counter("rzen_serve_requests", "Requests.", tag_keys=tags)
        self._request_s = Histogram(
            "rzen_serve_request_s", "Seconds of a request.", boundaries=_SECONDS, tag_keys=("route",)
        )

    def __serve_build_asgi_app__(self) -> Callable[..., Awaitable[None]]:
        from rzen.serving.gateway import GatewaySettings, build_app

        spec = self._spec
        assert spec.name is not None
        limits = Limits(
            max_inputs=spec.max_inputs, max_image_bytes=spec.max_image_bytes, max_video_bytes=spec.max_video_bytes
        )
        settings = GatewaySettings(
            spec.name,
            tuple(spec.adapters),
            limits,
            tuple(spec.allow_urls),
            spec.max_body_bytes,
            spec.body_timeout_s,
        )
        return build_app(_Replicas(self._replicas), settings, ApiKeys(spec.api_keys), self._record)

    def _record(self, route: str, status: int, seconds: float) -> None:
        self._requests.inc(1, {"route": route, "status": str(status)})
        self._request_s.observe(seconds, {"route": route})


# A surge of 100%: by default, the only replica ends before the next one starts.
_deployment: Any = partial(
    serve.deployment, max_surge_percent=100, health_check_period_s=5, graceful_shutdown_timeout_s=60
)
_MODEL_REPLICA = _deployment(name="ModelReplica")(ModelReplica)
_TRIALS = _deployment(name="Trials", ray_actor_options={"num_cpus": 0})(TrialDeployment)
_GATEWAY = _deployment(
    name="Gateway",
    ray_actor_options={"num_cpus": 0.2},
    backpressure_config={"status_code": 429, "retry_after_s": 1.0},
)(Gateway)
