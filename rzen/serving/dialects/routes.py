"""The interfaces of the server: which route speaks which dialect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rzen.serving.dialects import cohere, openai, reranking, tei, voyage
from rzen.serving.types import EmbedRequest, Limits, RequestError, Scored, ScoreRequest, Usage, Vectors


@dataclass(frozen=True, slots=True)
class Dialect:
    """Reads the requests of an interface, and writes its answers and errors. All are pure functions."""

    parse: Callable[[Any, Limits], EmbedRequest]
    answer: Callable[[EmbedRequest, Vectors, Usage, str, str], Any]
    """Takes the request, its vectors, the usage, the name of the model and the id of the request."""
    failure: Callable[[RequestError, str], Any]


OPENAI = Dialect(openai.parse, openai.answer, openai.failure)
ROUTES: dict[str, Dialect] = {
    "/v1/embeddings": OPENAI,
    "/embeddings": OPENAI,
    "/v2/embed": Dialect(cohere.parse, cohere.answer, cohere.failure),
    "/v1/multimodalembeddings": Dialect(voyage.parse, voyage.answer, voyage.failure),
    "/embed": Dialect(tei.parse, tei.answer, tei.failure),
}


@dataclass(frozen=True, slots=True)
class PairDialect:
    """Reads requests for scores of pairs, and writes their answers. Both are pure functions."""

    parse: Callable[[Any, Limits], ScoreRequest]
    answer: Callable[[Any, str, Scored, str, str], Any]
    """Takes the body, the path, the scores, the name of the model and the id of the request."""


_RERANK = PairDialect(reranking.parse_rerank, reranking.rerank_answer)
_SCORE = PairDialect(reranking.parse_score, reranking.score_answer)
PAIR_ROUTES: dict[str, PairDialect] = {
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), _RERANK),
    **dict.fromkeys(("/score", "/v1/score"), _SCORE),
}


def dialect_of(path: str) -> Dialect:
    """Return the dialect that errors of a path are written in: OpenAI's, unless it has one of its own."""
    return ROUTES["/v2/embed"] if path.startswith("/v2/") else ROUTES.get(path, OPENAI)
