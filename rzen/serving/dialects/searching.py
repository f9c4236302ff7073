"""`POST /v1/search`: what is asked of a corpus, and the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.samples import MODALITIES, Modality
from rzen.index.types import TargetPlace
from rzen.serving.dialects.content import mixed_input, named_input, text_input
from rzen.serving.dialects.fields import Body, check_fields, flag, positive, text, words
from rzen.serving.dialects.wishes import WISH_FIELDS, read_wish
from rzen.serving.types import Limits, RequestError, SearchRequest, ServedInput

_MOST_HITS = 1000
_KNOWN = ("query", "like", "group", "model", "top_k", "modalities", "sources", "filters", *WISH_FIELDS)


def parse_search(body: Any, limits: Limits) -> SearchRequest:
    """Return what a body asks for. The query is a text, an object as in `/v1/embeddings`, or a list of content parts.

    `like` names a target of the corpus instead. Raises `RequestError`.
    """
    given = check_fields(body, _KNOWN)
    like = _target(given)
    if like is not None and "query" in given:
        raise RequestError(400, "query and like are both given; use one of them", "like")
    asked: ServedInput | TargetPlace
    match given.get("query"):
        case None if like is not None:
            asked = like
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
    grouped = flag(given, "group", False)
    sources, filters = words(given, "sources"), words(given, "filters")
    return SearchRequest(asked, name, wish, top_k, kinds, sources, filters, grouped)


def _target(given: Body) -> TargetPlace | None:
    """Return the target that `like` names by the fields of a hit: `split`, `source`, `index`, perhaps `start_s`."""
    place = given.get("like")
    match place:
        case None:
            return None
        case {"split": str(split), "source": str(source), "index": int(index)} if not isinstance(index, bool):
            start_s = place.get("start_s")
            is_time = start_s is None or (isinstance(start_s, int | float) and not isinstance(start_s, bool))
            if is_time and 0 <= index < 1 << 63 and _is_utf8(split + source):
                return TargetPlace(split, source, index, start_s)
    raise RequestError(400, "like is not a hit: give its split, source and index, and start_s of a segment", "like")


def _is_utf8(text: str) -> bool:
    """Return whether a text can be stored: JSON may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def search_answer(hits: Sequence[Mapping[str, Any]], model: str, version: str) -> Any:
    """Return the body of the answer. `version` is that of the model and the corpus that answered."""
    data = [{"object": "hit"} | dict(hit) for hit in hits]
    return {"object": "list", "model": model, "version": version, "data": data}
