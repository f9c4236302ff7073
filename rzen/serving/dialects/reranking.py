"""`/rerank` and `/score`: the interfaces of Cohere, Jina, vLLM and text-embeddings-inference for re-rankers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rzen.serving.dialects.content import mixed_input, named_input, text_input
from rzen.serving.dialects.fields import Body, check_fields, flag, items, positive, text
from rzen.serving.types import Limits, RequestError, Scored, ScoreRequest, ServedInput

_RERANK = (
    "query",
    "documents",
    "texts",
    "model",
    "top_n",
    "return_documents",
    "return_text",
    "instruction",
    "raw_scores",
)
_SCORE = ("queries", "documents", "text_1", "text_2", "model", "instruction")
_IGNORED = ("user", "priority", "truncate", "max_tokens_per_doc")


def parse_rerank(body: Any, limits: Limits) -> ScoreRequest:
    """Return what a body asks for: the query with each document. Raises `RequestError`."""
    given = check_fields(body, _RERANK, _IGNORED)
    if flag(given, "raw_scores", False):
        raise RequestError(400, "raw_scores=true is not supported: scores are probabilities", "raw_scores")
    positive(given, "top_n")
    for name in ("return_documents", "return_text"):
        flag(given, name, False)
    query = _input(given.get("query"), "query", 0, limits)
    documents = _inputs(given, _one_of(given, "documents", "texts"), limits)
    pairs = tuple((0, index) for index in range(len(documents)))
    return ScoreRequest((query,), documents, pairs, text(given, "model"), text(given, "instruction"))


def rerank_answer(body: Any, path: str, scored: Scored, model: str, request_id: str) -> Any:
    """Return the body of the answer, best first. A body with `texts` gets the list that TEI sends."""
    top_n = positive(body, "top_n") or len(scored.scores)
    order = np.argsort(-scored.scores, kind="stable")[:top_n].tolist()
    if "texts" in body:
        shown = [{"text": body["texts"][index]} if body.get("return_text") else {} for index in order]
        return [{"index": i, "score": float(scored.scores[i])} | text for i, text in zip(order, shown, strict=True)]
    results = [{"index": index, "relevance_score": float(scored.scores[index])} for index in order]
    if body.get("return_documents"):
        for result in results:
            document = body["documents"][int(result["index"])]
            result["document"] = {"text": document} if isinstance(document, str) else document
    usage = {"prompt_tokens": scored.usage.tokens, "total_tokens": scored.usage.tokens}
    meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}} if path.startswith("/v2/") else None
    return {"id": request_id, "model": model, "results": results} | ({"meta": meta} if meta else {"usage": usage})


def parse_score(body: Any, limits: Limits) -> ScoreRequest:
    """Return what a body asks for: one query with each document, or pairs. Raises `RequestError`."""
    given = check_fields(body, _SCORE, _IGNORED)
    first, second = _one_of(given, "queries", "text_1"), _one_of(given, "documents", "text_2")
    queries, documents = _inputs(given, first, limits), _inputs(given, second, limits)
    if len(queries) not in (1, len(documents)):
        problem = f"{first} has {len(queries)} inputs and {second} {len(documents)}; send one query, or as many"
        raise RequestError(400, problem, first)
    pairs = tuple((index % len(queries), index) for index in range(len(documents)))
    return ScoreRequest(queries, documents, pairs, text(given, "model"), text(given, "instruction"))


def score_answer(body: Any, path: str, scored: Scored, model: str, request_id: str) -> Any:
    """Return the body of the answer, in the order of the documents."""
    return {
        "id": request_id,
        "object": "list",
        "model": model,
        "data": [{"index": i, "object": "score", "score": float(one)} for i, one in enumerate(scored.scores)],
        "usage": {"prompt_tokens": scored.usage.tokens, "total_tokens": scored.usage.tokens},
    }


def _one_of(body: Body, *names: str) -> str:
    given = [name for name in names if name in body]
    if len(given) != 1:
        raise RequestError(400, f"give exactly one of {', '.join(names)}", names[0])
    return given[0]


def _inputs(body: Body, name: str, limits: Limits) -> tuple[ServedInput, ...]:
    single = isinstance(body[name], str | dict)
    several: Sequence[Any] = [body[name]] if single else items(body, name, limits)
    return tuple(_input(one, f"{name}[{index}]", index, limits) for index, one in enumerate(several))


def _input(given: Any, place: str, index: int, limits: Limits) -> ServedInput:
    match given:
        case {"content": content}:
            return mixed_input(content, f"{place}.content", index, limits)
        case dict():
            return named_input(given, place, index, limits)
        case list():
            return mixed_input(given, place, index, limits)
    return text_input(given, place, index, limits)
