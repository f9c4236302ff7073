"""`POST /v1/search`: what is asked of a corpus, and the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.samples import MODALITIES, Modality
from rzen.serving.dialects.content import mixed_input, named_input, text_input
from rzen.serving.dialects.fields import check_fields, positive, text, words
from rzen.serving.dialects.wishes import WISH_FIELDS, read_wish
from rzen.serving.types import Limits, RequestError, SearchRequest

_MOST_HITS = 1000
_KNOWN = ("query", "model", "top_k", "modalities", "sources", "filters", *WISH_FIELDS)


def parse_search(body: Any, limits: Limits) -> SearchRequest:
    """Return what a body asks for. The query is a text, an object as in `/v1/embeddings`, or a list of content parts.

    Raises `RequestError`.
    """
    given = check_fields(body, _KNOWN)
    match given.get("query"):
        case dict() as query:
            asked = named_input(query, "query", 0, limits)
        case list() as parts:
            asked = mixed_input(parts, "query", 0, limits)
        case query:
            asked = text_input(query, "query", 0, limits)
    top_k = positive(given, "top_k") or 10
    if top_k > _MOST_HITS:
        raise RequestError(400, f"top_k={top_k} is too large; use at most {_MOST_HITS}", "top_k")
    modalities = words(given, "modalities")
    if unknown := [one for one in modalities if one not in MODALITIES]:
        raise RequestError(400, f"modalities has {unknown[0]!r}; use {', '.join(MODALITIES)}", "modalities")
    kinds: tuple[Modality, ...] = modalities  # type: ignore[assignment]
    name, wish = text(given, "model"), read_wish(given)
    return SearchRequest(asked, name, wish, top_k, kinds, words(given, "sources"), words(given, "filters"))


def search_answer(hits: Sequence[Mapping[str, Any]], model: str, version: str) -> Any:
    """Return the body of the answer. `version` is that of the model and the corpus that answered."""
    data = [{"object": "hit"} | dict(hit) for hit in hits]
    return {"object": "list", "model": model, "version": version, "data": data}
