"""The engine of the server: requests to vectors and hits, with one model at a time that is exchanged while it works.

    request -> room in the queue -> decode in a sandbox, encode (threads) -> queue -> model (one thread) -> vectors

Vectors equal those of `Embedder.encode`, but for rounding.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.media.signatures import sniff
from pipelines.samples import DecodedInput, Visual
from rzen.embedding.corpus import Corpus, CorpusHit
from rzen.embedding.tasks import modalities_of
from rzen.index.filters import parse_conditions
from rzen.inputs.processor import EncodedBatch, Processor
from rzen.reranking.encoder import JointBatch
from rzen.serving.dialects.formats import cut_vectors
from rzen.serving.dialects.wishes import instruction_for
from rzen.serving.queue import BatchStats, TokenQueue
from rzen.serving.served import CANARY, Decoders, EncodedPair, Place, Served, load_served
from rzen.serving.types import (
    Answered,
    EmbedRequest,
    Found,
    MediaPart,
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
_BYTES_PER_TOKEN = 3  # of text, to estimate a request before it is encoded
_LEAST_COSINE = 0.999
_SUSPICIOUS_BATCHES = 3
_UNSUPPORTED = "unsupported_format"
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


@dataclass(frozen=True, slots=True)
class _Prepared:
    encoded: EncodedBatch
    usage: Usage


class Engine:
    """Answers requests with the model at a place. `load` and `reload` load or exchange it.

    Use it from one event loop. `on_batch` is called after each batch of the model.
    """

    def __init__(self, settings: EngineSettings, on_batch: Callable[[BatchStats], None] = lambda stats: None) -> None:
        self._settings = settings
        self._on_batch = on_batch
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._threads = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._served: Served | None = None
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
        served = load_served(place, self._settings.media, self._settings.chunk_tokens)
        if self._queue is None:
            self._queue = TokenQueue(
                _run,
                self._model_thread,
                self._settings.chunk_tokens,
                self._settings.max_waiting_tokens,
                packed=served.embedder.model.packs,
                on_batch=self._on_batch,
            )
        before, self._served = self._served, served
        _log.info("serving %s, version %s", place.model, served.version)
        if before is not None:
            before.close()

    async def reload(self, place: Place) -> None:
        """Do what `load` does in a thread, while requests are answered."""
        await asyncio.get_running_loop().run_in_executor(self._loader, self.load, place)

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
        served = self.served  # the same to the end, whatever is loaded meanwhile
        if request.dimensions is not None and request.dimensions not in served.dimensions:
            widths = ", ".join(map(str, served.dimensions))
            problem = f"dimensions={request.dimensions} is not supported; the model was trained for {widths}"
            raise RequestError(400, problem, "dimensions")
        answered = await self._embed(served, request.inputs, request.wish, served.decoders, request.truncate)
        return replace(answered, vectors=cut_vectors(answered.vectors, request.dimensions))

    async def search(self, request: SearchRequest) -> Found:
        """Return the best targets of the corpus. Raises `RequestError`, 404 where the server has no corpus."""
        served = self.served
        corpus = served.corpus
        if corpus is None:
            raise RequestError(404, "the server has no corpus; start it with --corpus", reason="no_corpus")
        answered = await self._embed(served, (request.query,), request.wish, served.query_decoders, True, corpus)
        modalities = request.modalities or modalities_of(served.embedder.tasks.get(request.wish.task or "")) or ()

        chosen = {"modality": list(modalities), "source": list(request.sources)}
        filters = {column: values for column, values in chosen.items() if values}

        def nearest() -> list[CorpusHit]:
            conditions = (*corpus.conditions, *parse_conditions(request.filters))
            return replace(corpus, conditions=conditions).nearest(answered.vectors, request.top_k, filters)[0]

        try:
            hits = await asyncio.get_running_loop().run_in_executor(self._threads, nearest)
        except UserError as error:
            raise RequestError(400, str(error), "filters", reason="bad_filter") from error
        return Found([asdict(hit) for hit in hits], served.version)

    async def score(self, request: ScoreRequest) -> Scored:
        """Return the probability of each pair. Raises `RequestError`, 404 where the server has no re-ranker."""
        served = self.served
        if served.reranker is None:
            raise RequestError(404, "the server has no re-ranker; start it with --reranker", reason="no_reranker")
        assert self._queue is not None
        encoder, decoders = served.reranker.encoder, served.pair_decoders
        inputs = (*request.queries, *request.documents)
        count = len(request.queries)

        def decode(number: int) -> DecodedInput:
            name, index = ("query", number) if number < count else ("document", number - count)
            return _decode_input(encoder.processor, decoders, inputs[number], name, index)

        def encode(decoded: list[DecodedInput]) -> JointBatch:
            queries = [replace(one, instruction=request.instruction or "") for one in decoded[:count]]
            with _named_errors("pair", None):
                return encoder.encode(queries, decoded[count:], np.array(request.pairs, np.int64))

        tokens = [_estimate(served, one) for one in inputs]
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
        if self._served is not None:
            self._served.close()

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

        def prepare(index: int) -> _Prepared:
            return _prepare(served, decoders, inputs[index], index, wish, truncate, searched)

        with self._queue.promise(sum(_estimate(served, one) for one in inputs)):
            prepared = await self._in_threads(prepare, range(len(inputs)))
            encoded = [one.encoded for one in prepared]
            results = await self._queue.put(served.embed, encoded, [int(one.lengths[0]) for one in encoded])
        vectors: list[Vectors] = _all_or_error(results)
        return Answered(np.stack(vectors), _total([one.usage for one in prepared]), served.version)

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


def _all_or_error(results: Sequence[Any]) -> list[Any]:
    """Return the results of a request. Raises `RequestError` 500 if one failed in the model."""
    for index, result in enumerate(results):
        if isinstance(result, BaseException):
            _log.error("input %d failed in the model", index, exc_info=result)
            raise RequestError(500, f"input {index} failed in the model", f"input[{index}]", index, "model_error")
    return [*results]


def _run(answer: Callable[[Sequence[Any]], Sequence[Any]], payloads: Sequence[Any]) -> Sequence[Any]:
    return answer(payloads)


def _estimate(served: Served, given: ServedInput) -> int:
    """Return about how many tokens an input has, before it is decoded."""
    prompt = served.embedder.processor.prompt
    text = min(prompt.max_text_tokens, len(given.text) // _BYTES_PER_TOKEN + len(given.token_ids))
    return 1 + text + len(given.media) * prompt.max_visual_tokens


def _prepare(
    served: Served,
    decoders: Decoders,
    given: ServedInput,
    index: int,
    wish: Wish,
    truncate: bool,
    searched: Corpus | None,
) -> _Prepared:
    """Decode and encode an input. Raises `RequestError` with its index."""
    processor = served.embedder.processor
    decoded = _decode_input(processor, decoders, given, "input", index)
    decoded = replace(decoded, instruction=_instruction(served, given, decoded, wish, searched))
    if not truncate and (count := processor.num_text_tokens(decoded)) > processor.prompt.max_text_tokens:
        problem = f"input {index} has {count} tokens of text; the model takes {processor.prompt.max_text_tokens}"
        raise RequestError(400, problem, f"input[{index}]", index, "too_many_tokens")
    with _named_errors("input", index):
        encoded = processor.encode([decoded])
    merged = processor.layout.merge_patches**2
    visual_tokens = int(encoded.grids.prod(axis=1).sum()) // merged
    pixels = [(visual.kind == "video", visual.frames.size // visual.frames.shape[-1]) for visual in decoded.visuals]
    usage = Usage(
        int(encoded.lengths[0]),
        visual_tokens,
        len(decoded.visuals),
        image_pixels=sum(count for is_video, count in pixels if not is_video),
        video_pixels=sum(count for is_video, count in pixels if is_video),
    )
    return _Prepared(encoded, usage)


def _decode_input(processor: Processor, decoders: Decoders, given: ServedInput, name: str, index: int) -> DecodedInput:
    """Return an input with pixels, without its instruction. Raises `RequestError` with its index."""
    with _named_errors(name, index):
        text = processor.text_of(given.token_ids) if given.token_ids else given.text
        return DecodedInput(text, tuple(_decoded(decoders, part) for part in given.media))


@contextmanager
def _named_errors(name: str, index: int | None) -> Iterator[None]:
    """Raise what an input does wrong as a `RequestError` that names it."""
    place, param = (name, None) if index is None else (f"{name} {index}", f"{name}[{index}]")
    try:
        yield
    except BadMedia as error:
        status = 413 if error.reason == "too_many_bytes" else 415 if error.reason == _UNSUPPORTED else 422
        raise RequestError(status, f"{place}: {error}", param, index, error.reason) from error
    except UserError as error:
        raise RequestError(422, f"{place}: {error}", param, index, "bad_input") from error
    except ValueError as error:
        raise RequestError(400, f"{place}: {error}", param, index) from error


def _instruction(served: Served, given: ServedInput, decoded: DecodedInput, wish: Wish, searched: Corpus | None) -> str:
    """Return the instruction of an input. A query of a corpus gets what `Embedder.search` would give it."""
    asked = instruction_for(given, decoded, wish, served.embedder.tasks)
    if searched is None or given.instruction is not None or wish.instruction is not None:
        return asked
    if wish.task is not None:
        return searched.instruction_of(served.embedder.tasks[wish.task])
    return searched.fitting_instruction(decoded)


def _decoded(decoders: Decoders, part: MediaPart) -> Visual:
    """Return the pixels of a file. Its first bytes decide what it is, and must agree with what the client says."""
    found = sniff(part.data)
    if found is None:
        raise BadMedia(_UNSUPPORTED, "the first bytes are those of no image, video or PDF")
    kind, extension = found
    with decoders.borrow() as decoder:
        if part.kind == "document" and kind == "image":  # the picture of a page
            return replace(decoder.member("image", part.data), kind="document")
        if part.kind is not None and part.kind != kind:
            is_animation = part.kind == "video" and extension in (".gif", ".webp")
            hint = "; animated images are not read as videos" if is_animation else ""
            raise BadMedia("other_kind", f"is a {kind} and not a {part.kind}{hint}")
        if kind == "document" and part.page is None and (count := decoder.num_pages(part.data)) > 1:
            raise BadMedia("several_pages", f"has {count} pages; an input is one page: give page=0 to page={count - 1}")
        if kind != "document" and part.page is not None:
            raise BadMedia("no_such_page", f"is a {kind} and has no pages")
        return decoder.member(kind, part.data, part.page)


def _total(parts: Sequence[Usage]) -> Usage:
    names = [one.name for one in fields(Usage)]
    return Usage(**{name: sum(getattr(part, name) for part in parts) for name in names})
