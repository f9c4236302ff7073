"""`POST /v1/embeddings`: OpenAI's interface, with the inputs of vLLM, Jina, OpenRouter, infinity and Voyage's texts.

| client | input |
|---|---|
| OpenAI | `input`: a text, texts, token ids, lists of token ids |
| vLLM | `messages`: one conversation or several; `input`: a list of conversations |
| Jina | `input`: objects with `text`, `image` and so on |
| OpenRouter | `input`: objects with `content`, a list of parts |
| infinity | `input`: data URIs or URLs, and `modality` |

A text is never taken for a URL or a data URI, unless `modality` says so.
"""

from __future__ import annotations

from typing import Any

from pipelines.samples import MediaKind
from rzen.serving.dialects.content import joined, media_part, mixed_input, named_input, text_input
from rzen.serving.dialects.fields import Body, check_fields, choice, flag, items, positive, text
from rzen.serving.dialects.formats import embedding_list
from rzen.serving.dialects.wishes import WISH_FIELDS, read_wish
from rzen.serving.types import EmbedRequest, Limits, RequestError, ServedInput, Usage, VectorFormat, Vectors

_FORMATS: dict[str, VectorFormat] = {
    "float": "float",
    "base64": "base64",
    "binary": "binary",
    "ubinary": "ubinary",
}
_MODALITIES: dict[str, MediaKind | None] = {"text": None, "image": "image", "video": "video", "document": "document"}
_KNOWN = (
    *("input", "messages", "model", "modality", "dimensions", "output_dimension", "encoding_format", "embedding_type"),
    *("output_dtype", "truncate", "truncation", "normalize", "normalized", *WISH_FIELDS),
)
_IGNORED = ("user", "priority", "request_id", "continue_final_message", "add_generation_prompt")
_REFUSED = (
    *("mm_processor_kwargs", "chat_template", "chat_template_kwargs", "add_special_tokens", "truncate_prompt_tokens"),
    *("late_chunking", "return_multivector"),
)


def parse(body: Any, limits: Limits) -> EmbedRequest:
    """Return what a body asks for. Raises `RequestError`."""
    unless_false = (
        {name: value for name, value in body.items() if value is not False} if isinstance(body, dict) else body
    )
    check_fields(unless_false, _KNOWN, _IGNORED, _REFUSED)
    given = check_fields(body, (*_KNOWN, *_REFUSED), _IGNORED)
    for name in ("normalize", "normalized"):
        if not flag(given, name, True):
            raise RequestError(400, f"{name}=false is not supported: vectors have length 1", name)
    return EmbedRequest(
        inputs=_inputs(given, limits),
        model=text(given, "model"),
        wish=read_wish(given),
        dimensions=positive(given, "dimensions") or positive(given, "output_dimension"),
        truncate=flag(given, "truncate", flag(given, "truncation", True)),
        formats=(_format(given),),
    )


def answer(request: EmbedRequest, vectors_ND: Vectors, usage: Usage, model: str, request_id: str) -> Any:
    """Return the body of the answer."""
    counted = {"prompt_tokens": usage.tokens, "total_tokens": usage.tokens}
    return embedding_list(vectors_ND, request.formats[0], model, counted)


def failure(error: RequestError, request_id: str) -> Any:
    """Return the body of an error."""
    return {"error": error.to_json()}


def _format(body: Body) -> VectorFormat:
    asked = [name for name in ("encoding_format", "embedding_type", "output_dtype") if name in body]
    if {"encoding_format", "output_dtype"} <= {*asked} and body["output_dtype"] == "float":
        asked.remove("output_dtype")  # Voyage's client names the bytes and the numbers in them
    if len(asked) > 1:
        raise RequestError(400, f"{' and '.join(asked)} are both given; give one of them", asked[0])
    return choice(body, asked[0], _FORMATS, "float") if asked else "float"


def _inputs(body: Body, limits: Limits) -> tuple[ServedInput, ...]:
    if ("input" in body) == ("messages" in body):
        raise RequestError(400, "give either input or messages", "input")
    if "messages" in body:
        several = items(body, "messages", limits)
        if not isinstance(several[0], list):
            return (_conversation(several, "messages", 0, limits),)
        return tuple(_conversation(one, f"messages[{i}]", i, limits) for i, one in enumerate(several))
    given = body["input"]
    if body.get("modality") == "audio":
        raise RequestError(415, "audio is not supported; send text, images, videos or documents", "modality")
    kind = choice(body, "modality", _MODALITIES, None)
    if isinstance(given, str | dict):
        return (_input(given, "input", 0, kind, limits),)
    several = items(body, "input", limits)
    if all(_is_id(one) for one in several):
        return (ServedInput(token_ids=_token_ids(several, "input", 0, limits)),)
    return tuple(_input(one, f"input[{i}]", i, kind, limits) for i, one in enumerate(several))


def _input(given: Any, place: str, index: int, kind: MediaKind | None, limits: Limits) -> ServedInput:
    match given:
        case str() if kind is not None:
            return joined([media_part(given, kind, place, index, limits)], place, index, limits)
        case str():
            return text_input(given, place, index, limits)
        case {"content": content}:
            return mixed_input(content, f"{place}.content", index, limits)
        case dict():
            return named_input(given, place, index, limits)
        case [dict(), *_]:
            return _conversation(given, place, index, limits)
        case [*ids] if ids and all(_is_id(one) for one in ids):
            return ServedInput(token_ids=_token_ids(ids, place, index, limits))
    raise RequestError(400, f"{place} is not a text, token ids, an object or a conversation", place, index)


def _is_id(given: Any) -> bool:
    return isinstance(given, int) and not isinstance(given, bool)


def _token_ids(given: list[int], place: str, index: int, limits: Limits) -> tuple[int, ...]:
    if len(given) > limits.max_text_bytes // 4:
        problem = f"{place} has {len(given)} token ids; send at most {limits.max_text_bytes // 4}"
        raise RequestError(413, problem, place, index)
    return tuple(given)


def _conversation(given: Any, place: str, index: int, limits: Limits) -> ServedInput:
    """Return a conversation as one input: the system message is the instruction, the user's the content."""
    if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
        raise RequestError(400, f"{place} is not a list of messages", place, index)
    instruction, contents = None, []
    for number, message in enumerate(given):
        role, content = message.get("role"), message.get("content")
        where = f"{place}[{number}].content"
        if role == "user":
            contents.append(mixed_input(content, where, index, limits))
        elif role == "system":
            instruction = mixed_input(content, where, index, limits).text
        elif role != "assistant" or _has_text(content):
            problem = f"{where} is of the role {role!r}; use one system and one user message"
            raise RequestError(400, problem, where, index)
    if len(contents) != 1:
        raise RequestError(400, f"{place} has {len(contents)} user messages; an input has one", place, index)
    return ServedInput(contents[0].text, contents[0].media, instruction=instruction)


def _has_text(content: Any) -> bool:
    """Return whether an assistant's message says something. Templates of chat models end with an empty one."""
    parts = content if isinstance(content, list) else [{"text": content}]
    return any(not isinstance(part, dict) or part.get("text") for part in parts)
