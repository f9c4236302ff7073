"""What answers requests at a time: a model, the corpus that it embedded, and the decoders of both."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from typing_extensions import TypedDict

from pipelines.config import MediaConfig
from pipelines.errors import UserError
from pipelines.media.decode import Decoder
from pipelines.stored_json import read_json, stored_file
from rzen.embedding.corpus import Corpus, read_corpus
from rzen.embedding.embedder import Embedder, load
from rzen.embedding.shared import share
from rzen.inputs.processor import EncodedBatch
from rzen.model.checkpoints import checkpoint_sha256
from rzen.reranking.encoder import JointBatch
from rzen.reranking.reranker import Reranker, load_reranker
from rzen.serving.place import Place
from rzen.serving.types import RequestError, Vectors

CANARY = "a red circle left of a blue square"
"""Text whose vector is computed when a model is loaded, and compared when somebody asks whether the server is ready."""


class Decoders:
    """Sandboxes for threads that decode at the same time, each with a child process. All media are decoded there."""

    def __init__(self, media: MediaConfig) -> None:
        self.media = media
        self._free: list[Decoder] = []
        self._lock = threading.Lock()
        self._is_closed = False

    @contextmanager
    def borrow(self) -> Iterator[Decoder]:
        """Give a decoder that nobody else uses meanwhile."""
        with self._lock:
            decoder = self._free.pop() if self._free else Decoder(self.media, isolated=True)
        try:
            yield decoder
        finally:
            with self._lock:
                is_closed = self._is_closed
                if not is_closed:
                    self._free.append(decoder)
            if is_closed:
                decoder.close()

    def close(self) -> None:
        """End the child processes. Those in use end when they are given back."""
        with self._lock:
            self._is_closed = True
            free, self._free = self._free, []
        for decoder in free:
            decoder.close()


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Pair number `number` of the pairs of a request, which were encoded together so that each medium is there once."""

    batch: JointBatch
    number: int

    @property
    def num_tokens(self) -> int:
        """Return the tokens of its sequence."""
        return int(self.batch.sequences.lengths[self.number])


@dataclass(frozen=True, eq=False)
class Served:
    """A model and the corpus whose vectors it made. Requests keep the pair that they began with.

    `version` names the pair. `dimensions` are the widths that clients may ask for, the full one last.
    """

    place: Place
    embedder: Embedder
    corpus: Corpus | None
    version: str
    dimensions: tuple[int, ...]
    canary: Vectors
    decoders: Decoders
    query_decoders: Decoders
    """Decode as the targets of the corpus were decoded."""
    reranker: Reranker | None
    pair_decoders: Decoders
    """Decode for the re-ranker."""
    adapters: Mapping[str, Served] = field(default_factory=dict)
    """Name -> the model with an adapter on it. They have no corpus."""

    def of(self, model: str | None) -> Served:
        """Return what answers for a model that a client names: `base:adapter`, or the base itself.

        Raises `RequestError` 404 for an adapter that is not there.
        """
        _, _, name = (model or "").partition(":")
        if not name:
            return self
        if name not in self.adapters:
            raise RequestError(404, f"the adapter {name!r} is not served", "model", reason="model_not_found")
        return self.adapters[name]

    def embed(self, inputs: Sequence[EncodedBatch]) -> list[Vectors | Exception]:
        """Return a vector for each input, and an error for one that is not finite."""
        vectors_ND = self.embedder.embed_encoded(inputs)
        return [row if np.isfinite(row).all() else ArithmeticError("the vector is not finite") for row in vectors_ND]

    def score(self, pairs: Sequence[EncodedPair]) -> list[float | Exception]:
        """Return the probability of each pair, and an error for one that is not finite."""
        assert self.reranker is not None
        batch = JointBatch.concat([pair.batch.take([pair.number]) for pair in pairs])
        scores = self.reranker.probabilities(batch).tolist()
        return [one if np.isfinite(one) else ArithmeticError("the score is not finite") for one in scores]

    def close(self) -> None:
        """End the child processes."""
        self.decoders.close()
        self.query_decoders.close()
        self.pair_decoders.close()


def load_served(place: Place, media: MediaConfig, chunk_tokens: int) -> Served:
    """Load model and corpus. Raises `UserError` for vectors that another model made, among other mistakes."""
    embedder = load(
        place.model,
        place.adapter,
        dtype=place.dtype,
        chunk_tokens=chunk_tokens,
        media=media,
        endpoint=place.endpoint,
    )
    adapted = share(embedder, dict(place.adapters), place.endpoint) if place.adapters else {}
    embedder = adapted.pop(None, embedder)
    corpus = None
    if place.corpus is not None:
        corpus = read_corpus(place.corpus, endpoint=place.endpoint, version=place.corpus_version)
        corpus.check_made_by(embedder.made_by, place.model)
    reranker = None
    if place.reranker is not None:
        reranker = load_reranker(
            place.reranker, dtype=place.dtype, chunk_tokens=chunk_tokens, media=media, endpoint=place.endpoint
        )
    weights = checkpoint_sha256(Path(reranker.encoder.processor.model_dir)) if reranker else None
    decoders = Decoders(embedder.media)
    query_media = (
        corpus.manifest["data"].media.for_model(embedder.processor.visual_pixels) if corpus else embedder.media
    )
    base = Served(
        place,
        embedder,
        corpus,
        _version(embedder, corpus.key if corpus else None, weights),
        _widths(embedder, place.dimensions),
        embedder.encode({"text": CANARY}),
        decoders,
        decoders if query_media == embedder.media else Decoders(query_media),
        reranker,
        decoders if reranker is None or reranker.media == embedder.media else Decoders(reranker.media),
    )
    return replace(base, adapters={str(name): _with_adapter(base, one) for name, one in adapted.items()})


def _with_adapter(base: Served, embedder: Embedder) -> Served:
    """Return the model with an adapter. Decoders are those of the base, which closes them."""
    return replace(
        base,
        embedder=embedder,
        corpus=None,
        version=_version(embedder, None, None),
        canary=embedder.encode({"text": CANARY}),
        query_decoders=base.decoders,
    )


def _version(embedder: Embedder, corpus: str | None, reranker: str | None) -> str:
    made_by = embedder.made_by | {"identity": embedder.made_by["identity"].model_dump(mode="json")}
    return hashlib.sha256(json.dumps([made_by, corpus, reranker], sort_keys=True).encode()).hexdigest()[:16]


@stored_file
class _Widths(TypedDict, total=False):
    matryoshka_dimensions: list[int] | None


def _widths(embedder: Embedder, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the widths that the model was trained with, as far as they are known, and the full one."""
    if wanted is None:
        config = read_json(embedder.base / "config.json", _Widths, "export the model again")
        wanted = tuple(config.get("matryoshka_dimensions") or ())
    if wrong := [width for width in wanted if not 1 <= width <= embedder.dimensions]:
        raise UserError("dimensions", f"has {wrong[0]}", f"use 1 to {embedder.dimensions}, the width of the model")
    return tuple(sorted({*wanted, embedder.dimensions}))
