"""`POST /v1/multimodalembeddings`: Voyage's interface."""

from __future__ import annotations

from typing import Any

from rzen.serving.dialects.content import mixed_input
from rzen.serving.dialects.fields import check_fields, choice, flag, items, positive, text
from rzen.serving.dialects.formats import embedding_list
from rzen.serving.dialects.wishes import read_wish
from rzen.serving.types import EmbedRequest, Limits, RequestError, Usage, VectorFormat, Vectors

_KNOWN = (
    *("inputs", "model", "input_type", "truncation", "output_dimension", "output_encoding", "encoding_format"),
    *("output_dtype", "instruction", "task", "role"),
)
_DTYPES: dict[str, VectorFormat] = {"float": "float", "binary": "binary", "ubinary": "ubinary"}


def parse(body: Any, limits: Limits) -> EmbedRequest:
    """Return what a body asks for. Raises `RequestError`."""
    given = check_fields(body, _KNOWN)
    inputs = []
    for index, one in enumerate(items(given, "inputs", limits)):
        if not isinstance(one, dict) or "content" not in one:
            raise RequestError(400, f"inputs[{index}] is not an object with content", f"inputs[{index}]", index)
        inputs.append(mixed_input(one["content"], f"inputs[{index}].content", index, limits))
    dtype = choice(given, "output_dtype", _DTYPES, "float")
    names = ("output_encoding", "encoding_format")  # of the documentation, and of the client
    is_base64 = any(choice(given, name, {"base64": True, "float": False}, False) for name in names)
    if is_base64 and dtype != "float":
        raise RequestError(400, f"base64 with output_dtype={dtype} is not supported", "output_dtype")
    return EmbedRequest(
        inputs=tuple(inputs),
        model=text(given, "model"),
        wish=read_wish(given),
        dimensions=positive(given, "output_dimension"),
        truncate=flag(given, "truncation", True),
        formats=("base64" if is_base64 else dtype,),
    )


def answer(request: EmbedRequest, vectors_ND: Vectors, usage: Usage, model: str, request_id: str) -> Any:
    """Return the body of the answer."""
    counted = {
        "text_tokens": usage.tokens - usage.visual_tokens,
        "image_pixels": usage.image_pixels,
        "video_pixels": usage.video_pixels,
        "total_tokens": usage.tokens,
    }
    return embedding_list(vectors_ND, request.formats[0], model, counted)


def failure(error: RequestError, request_id: str) -> Any:
    """Return the body of an error. Voyage's client shows `detail`."""
    return {"detail": error.message, "error": error.to_json()}
