"""`POST /v2/embed`: Cohere's interface."""

from __future__ import annotations

from typing import Any

from rzen.serving.dialects.content import joined, media_part, mixed_input, text_input
from rzen.serving.dialects.fields import check_fields, choice, items, positive, text, words
from rzen.serving.dialects.formats import as_json
from rzen.serving.dialects.wishes import read_wish
from rzen.serving.types import EmbedRequest, Limits, RequestError, ServedInput, Usage, VectorFormat, Vectors

_INPUTS = ("texts", "images", "inputs")
_KNOWN = (
    *_INPUTS,
    "model",
    "input_type",
    "embedding_types",
    "output_dimension",
    "truncate",
    "instruction",
    "task",
    "role",
)
_FORMATS: dict[str, VectorFormat] = {"float": "float", "base64": "base64", "binary": "binary", "ubinary": "ubinary"}


def parse(body: Any, limits: Limits) -> EmbedRequest:
    """Return what a body asks for. Raises `RequestError`."""
    given = check_fields(body, _KNOWN, ignored=("max_tokens", "priority"))
    named = [name for name in _INPUTS if name in given]
    if len(named) != 1:
        raise RequestError(400, f"give exactly one of {', '.join(_INPUTS)}", "texts")
    name = named[0]
    several = enumerate(items(given, name, limits))
    formats = tuple(
        choice({"embedding_types": one}, "embedding_types", _FORMATS, "float")
        for one in words(given, "embedding_types")
    )
    return EmbedRequest(
        inputs=tuple(_input(name, one, index, limits) for index, one in several),
        model=text(given, "model"),
        wish=read_wish(given),
        dimensions=positive(given, "output_dimension"),
        truncate=choice(given, "truncate", {"NONE": False, "END": True}, True),
        formats=tuple(dict.fromkeys(formats)) or ("float",),
    )


def answer(request: EmbedRequest, vectors_ND: Vectors, usage: Usage, model: str, request_id: str) -> Any:
    """Return the body of the answer."""
    return {
        "id": request_id,
        "embeddings": {form: as_json(vectors_ND, form) for form in request.formats},
        "texts": [one.text for one in request.inputs if not one.media],
        "meta": {
            "api_version": {"version": "2"},
            "billed_units": {"input_tokens": usage.tokens - usage.visual_tokens, "images": usage.visuals},
        },
        "response_type": "embeddings_by_type",
    }


def failure(error: RequestError, request_id: str) -> Any:
    """Return the body of an error."""
    return {"id": request_id, **error.to_json()}


def _input(name: str, given: Any, index: int, limits: Limits) -> ServedInput:
    place = f"{name}[{index}]"
    if name == "texts":
        return text_input(given, place, index, limits)
    if name == "images":
        return joined([media_part(given, "image", place, index, limits)], place, index, limits)
    if not isinstance(given, dict) or "content" not in given:
        raise RequestError(400, f"{place} is not an object with content", place, index)
    return mixed_input(given["content"], f"{place}.content", index, limits)
