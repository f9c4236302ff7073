"""The engine of the server: requests to vectors and hits, with one model at a time that is exchanged while it works.

    request -> room in the queue -> decode in a sandbox, encode (threads) -> queue -> model (one thread) -> vectors

Vectors equal those of `Embedder.encode`, but for rounding.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from pipelines.config import MediaConfig
from pipelines.errors import UserError
from pipelines.samples import DecodedInput
from rzen.embedding.corpus import Corpus, CorpusHit
from rzen.embedding.tasks import modalities_of
from rzen.index.filters import Condition, parse_conditions
from rzen.index.parts import VECTOR
from rzen.index.types import KEY, TargetPlace
from rzen.reranking.encoder import JointBatch
from rzen.serving.canary import Outcomes, Trial
from rzen.serving.dialects.formats import cut_vectors
from rzen.serving.place import Place
from rzen.serving.preparation import (
    PreparedInput,
    decode_input,
    estimate_tokens,
    named_errors,
    prepare_input,
    total_usage,
)
from rzen.serving.queue import BatchStats, TokenQueue
from rzen.serving.served import CANARY, Decoders, EncodedPair, Served, load_served
from rzen.serving.types import (
    Answered,
    EmbedRequest,
    Found,
    RequestError,
    Scored,
    ScoreRequest,
    SearchRequest,
    ServedInput,
    Usage,
    Vectors,
    Wish,
)

_log = logging.getLogger(__name__)
_LEAST_COSINE = 0.999
_SUSPICIOUS_BATCHES = 3
_FAILED = 500
T = TypeVar("T")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How much the engine does at once."""

    chunk_tokens: int = 16_384
    """Tokens of a batch, padding included."""
    max_waiting_tokens: int = 262_144
    """Tokens of accepted requests. More are refused."""
    decode_threads: int = 2
    media: MediaConfig = field(default_factory=MediaConfig)


class Engine:
    """Answers requests with the model at a place. `load` and `reload` load or exchange it.

    Use it from one event loop. `on_batch` is called after each batch of the model. `on_answer` gets the version of
    each answer, and whether it was one. Errors of clients do not count.
    """

    def __init__(
        self,
        settings: EngineSettings,
        on_batch: Callable[[BatchStats], None] = lambda stats: None,
        on_answer: Callable[[str, bool], None] = lambda version, ok: None,
    ) -> None:
        self._settings = settings
        self._on_batch, self._on_answer = on_batch, on_answer
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._threads = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._served: Served | None = None
        self._tried: tuple[Served, Trial] | None = None
        self._queue: TokenQueue[Any, Any] | None = None

    @property
    def served(self) -> Served:
        """Return the model that answers new requests. Raises `RequestError` 503 before there is one."""
        if self._served is None:
            raise RequestError(503, "the model is being loaded; ask again later", retry_after_s=5)
        return self._served

    @property
    def promised_tokens(self) -> int:
        """Return the tokens of all requests that were accepted and not answered."""
        return self._queue.promised_tokens if self._queue else 0

    @property
    def may_be_broken(self) -> bool:
        """Return whether the last batches have failed, such as on a device with an error. `check` says so for sure."""
        return self._queue is not None and self._queue.failed_batches >= _SUSPICIOUS_BATCHES

    def load(self, place: Place) -> None:
        """Load a model, and let new requests use it. Requests that have begun keep theirs. Blocks.

        Raises `UserError`. The model that was there stays then.
        """
        self.use(load_served(place, self._settings.media, self._settings.chunk_tokens))

    async def prepare(self, place: Place) -> Served:
        """Load a model in a thread, while requests are answered. It gets none before `use` or `try_out`."""
        media, chunk_tokens = self._settings.media, self._settings.chunk_tokens
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._loader, load_served, place, media, chunk_tokens)

    def use(self, served: Served) -> None:
        """Let new requests use a model. A trial ends."""
        if self._queue is None:
            self._queue = TokenQueue(
                _run,
                self._model_thread,
                self._settings.chunk_tokens,
                self._settings.max_waiting_tokens,
                packed=served.embedder.model.packs,
                on_batch=self._on_batch,
            )
        if self._tried is not None and self._tried[0] is not served:
            self._tried[0].close()
        self._tried = None
        before, self._served = self._served, served
        _log.info("serving %s, version %s", served.place.model, served.version)
        if before is not None and before is not served:
            before.close()

    def try_out(self, served: Served, trial: Trial) -> None:
        """Let a trial decide which new requests use another model. `use` ends it, with that model or the one before."""
        self._tried = (served, trial)

    async def reload(self, place: Place) -> None:
        """Do what `load` does in a thread, while requests are answered."""
        self.use(await self.prepare(place))

    async def check(self) -> None:
        """Raise `RequestError` 503 unless the model gives the vector that it gave when it was loaded."""
        served = self.served
        try:
            answered = await self._embed(served, (ServedInput(text=CANARY),), Wish(), served.decoders, True)
        except RequestError as error:
            raise RequestError(503, error.message, reason=error.reason, retry_after_s=error.retry_after_s) from error
        cosine = float(answered.vectors[0] @ served.canary)
        if not cosine >= _LEAST_COSINE:  # NaN, too
            raise RequestError(
                503, f"the vector of a known text has changed: cosine {cosine:.4f}", reason="wrong_vector"
            )

    async def embed(self, request: EmbedRequest) -> Answered:
        """Return one vector for each input. Raises `RequestError`, with the index of a bad input."""
        with self._begun(request.model) as served:
            return await self._embed_request(served, request)

    async def search(self, request: SearchRequest) -> Found:
        """Return the best targets of the corpus. Raises `RequestError`, 404 where the server has no corpus."""
        with self._begun(request.model) as served:
            return await self.search_with(served, request)

    async def score(self, request: ScoreRequest) -> Scored:
        """Return the probability of each pair. Raises `RequestError`, 404 where the server has no re-ranker."""
        with self._begun(request.model) as served:
            return await self._score_request(served, request)

    @contextmanager
    def _begun(self, model: str | None) -> Iterator[Served]:
        """Give the model of a request, the same to its end, whatever is loaded meanwhile. Count how it ends.

        `model` is what the client names. Raises `RequestError` 404 for an adapter that is not there.
        """
        served, outcomes = self.served, None
        if self._tried is not None:
            tried, trial = self._tried
            is_tried = trial.takes_next()
            served, outcomes = (tried, trial.counts.new) if is_tried else (served, trial.counts.old)
        served = served.of(model)
        try:
            yield served
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if not isinstance(error, RequestError) or error.status == _FAILED:
                self._count(served, outcomes, False)
            raise
        self._count(served, outcomes, True)

    def _count(self, served: Served, outcomes: Outcomes | None, ok: bool) -> None:
        self._on_answer(served.version, ok)
        if outcomes is not None:
            outcomes.answered += ok
            outcomes.failed += not ok

    async def _embed_request(self, served: Served, request: EmbedRequest) -> Answered:
        if request.dimensions is not None and request.dimensions not in served.dimensions:
            widths = ", ".join(map(str, served.dimensions))
            problem = f"dimensions={request.dimensions} is not supported; the model was trained for {widths}"
            raise RequestError(400, problem, "dimensions")
        answered = await self._embed(served, request.inputs, request.wish, served.decoders, request.truncate)
        return replace(answered, vectors=cut_vectors(answered.vectors, request.dimensions))

    async def search_with(self, served: Served, request: SearchRequest) -> Found:
        """Do what `search` does with a model that was prepared."""
        corpus = served.corpus
        if corpus is None:
            raise RequestError(
                404, "there is no corpus of this model; start the server with --corpus", reason="no_corpus"
            )
        modalities = request.modalities or modalities_of(served.embedder.tasks.get(request.wish.task or "")) or ()
        chosen = {"modality": list(modalities), "source": list(request.sources)}
        filters = {column: values for column, values in chosen.items() if values}
        query: Vectors | TargetPlace
        if isinstance(request.query, TargetPlace):
            query = request.query
        else:
            answered = await self._embed(served, (request.query,), request.wish, served.query_decoders, True, corpus)
            query = answered.vectors[0]
        loop = asyncio.get_running_loop()
        try:
            hits = await loop.run_in_executor(self._threads, _find, corpus, query, request, filters)
        except UserError as error:
            raise RequestError(400, str(error), "filters", reason="bad_filter") from error
        return Found(hits, served.version)

    async def _score_request(self, served: Served, request: ScoreRequest) -> Scored:
        if served.reranker is None:
            raise RequestError(404, "the server has no re-ranker; start it with --reranker", reason="no_reranker")
        assert self._queue is not None
        encoder, decoders = served.reranker.encoder, served.pair_decoders
        inputs = (*request.queries, *request.documents)
        count = len(request.queries)

        def decode(number: int) -> DecodedInput:
            name, index = ("query", number) if number < count else ("document", number - count)
            return decode_input(encoder.processor, decoders, inputs[number], name, index)

        def encode(decoded: list[DecodedInput]) -> JointBatch:
            queries = [replace(one, instruction=request.instruction or "") for one in decoded[:count]]
            with named_errors("pair", None):
                return encoder.encode(queries, decoded[count:], np.array(request.pairs, np.int64))

        tokens = [estimate_tokens(served, one) for one in inputs]
        total = sum(tokens[query] + tokens[count + document] for query, document in request.pairs)
        with self._queue.promise(total):
            decoded = await self._in_threads(decode, range(len(inputs)))
            (batch,) = await self._in_threads(encode, [decoded])
            pairs = [EncodedPair(batch, number) for number in range(len(request.pairs))]
            results = await self._queue.put(served.score, pairs, [pair.num_tokens for pair in pairs])
        scores = np.array(_all_or_error(results), np.float32)
        media = [visual for one in decoded for visual in one.visuals]
        usage = Usage(int(batch.sequences.lengths.sum()), visuals=len(media))
        return Scored(scores, usage, served.version)

    def close(self) -> None:
        """End threads and child processes."""
        for pool in (self._model_thread, self._threads, self._loader):
            pool.shutdown(wait=False, cancel_futures=True)
        for served in filter(None, (self._served, self._tried and self._tried[0])):
            served.close()

    async def _embed(
        self,
        served: Served,
        inputs: Sequence[ServedInput],
        wish: Wish,
        decoders: Decoders,
        truncate: bool,
        searched: Corpus | None = None,
    ) -> Answered:
        assert self._queue is not None

        def prepare(index: int) -> PreparedInput:
            return prepare_input(served, decoders, inputs[index], index, wish, truncate, searched)

        with self._queue.promise(sum(estimate_tokens(served, one) for one in inputs)):
            prepared = await self._in_threads(prepare, range(len(inputs)))
            encoded = [one.encoded for one in prepared]
            results = await self._queue.put(served.embed, encoded, [int(one.lengths[0]) for one in encoded])
        vectors: list[Vectors] = _all_or_error(results)
        return Answered(np.stack(vectors), total_usage([one.usage for one in prepared]), served.version)

    async def _in_threads(self, work: Callable[[T], Result], given: Iterable[T]) -> list[Result]:
        """Return `work` of each, done by the threads that decode. The first error ends those that wait."""
        loop = asyncio.get_running_loop()
        tasks = [loop.run_in_executor(self._threads, work, one) for one in given]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            raise


def _find(
    corpus: Corpus, query: Vectors | TargetPlace, request: SearchRequest, filters: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the hits of a vector, or of a target of the corpus, which is then not among them.

    Raises `UserError` for conditions that do not fit, and `RequestError` 404 for a target that is not there.
    """
    further = parse_conditions(request.filters)
    if isinstance(query, TargetPlace):
        row = corpus.find_row(query)
        if row is None:
            raise RequestError(404, "the corpus does not have the target that like names", "like", reason="no_target")
        query, further = np.array(row[VECTOR], np.float32), (*further, Condition(KEY, "!=", (row[KEY],)))
    searched = replace(corpus, conditions=(*corpus.conditions, *further))
    if not request.grouped:
        (hits,) = searched.nearest(query[None], request.top_k, filters)
        return [asdict(hit) for hit in hits]
    groups = searched.nearest_targets(query, request.top_k, filters)
    return [
        asdict(best) | {"rank": rank, "moments": [_moment(hit) for hit in others]}
        for rank, (best, *others) in enumerate(groups, start=1)
    ]


def _moment(hit: CorpusHit) -> dict[str, Any]:
    return {"rank": hit.rank, "score": hit.score, "start_s": hit.start_s, "end_s": hit.end_s}


def _all_or_error(results: Sequence[Any]) -> list[Any]:
    """Return the results of a request. Raises `RequestError` 500 if one failed in the model."""
    for index, result in enumerate(results):
        if isinstance(result, BaseException):
            _log.error("input %d failed in the model", index, exc_info=result)
            raise RequestError(500, f"input {index} failed in the model", f"input[{index}]", index, "model_error")
    return [*results]


def _run(answer: Callable[[Sequence[Any]], Sequence[Any]], payloads: Sequence[Any]) -> Sequence[Any]:
    return answer(payloads)
