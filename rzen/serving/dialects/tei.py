"""`POST /embed`: the interface of text-embeddings-inference, for texts."""

from __future__ import annotations

from typing import Any

from rzen.serving.dialects.content import text_input
from rzen.serving.dialects.fields import check_fields, choice, flag, items, positive
from rzen.serving.dialects.formats import as_json
from rzen.serving.dialects.wishes import read_wish
from rzen.serving.types import EmbedRequest, Limits, RequestError, Usage, Vectors

_KNOWN = ("inputs", "prompt_name", "normalize", "truncate", "truncation_direction", "dimensions")
_ERRORS = {413: "Validation", 422: "Tokenizer", 429: "Overloaded", 503: "Unhealthy"}


def parse(body: Any, limits: Limits) -> EmbedRequest:
    """Return what a body asks for. Raises `RequestError`."""
    given = check_fields(body, _KNOWN)
    if not flag(given, "normalize", True):
        raise RequestError(400, "normalize=false is not supported: vectors have length 1", "normalize")
    choice(given, "truncation_direction", {"right": True, "Right": True}, True)
    several = [given["inputs"]] if isinstance(given.get("inputs"), str) else items(given, "inputs", limits)
    return EmbedRequest(
        inputs=tuple(text_input(one, f"inputs[{index}]", index, limits) for index, one in enumerate(several)),
        wish=read_wish(given),
        dimensions=positive(given, "dimensions"),
        truncate=flag(given, "truncate", False),  # texts that are too long are an error there
    )


def answer(request: EmbedRequest, vectors_ND: Vectors, usage: Usage, model: str, request_id: str) -> Any:
    """Return the body of the answer: vectors, and nothing else."""
    return as_json(vectors_ND, "float")


def failure(error: RequestError, request_id: str) -> Any:
    """Return the body of an error."""
    return {**error.to_json(), "error": error.message, "error_type": _ERRORS.get(error.status, "Validation")}
