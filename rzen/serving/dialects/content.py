"""One input of a request: texts, data URIs, bare base64 and URLs as a `ServedInput`. Nothing is fetched or decoded."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.samples import MediaKind
from rzen.serving.types import Limits, MediaPart, RequestError, ServedInput

_DATA_URI = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?P<parameters>(?:;[\w.+-]+=[^;,]*)*)(?P<base64>;base64)?,")
_HEADER_CHARACTERS = 512
_WEB = ("http://", "https://")
_URL_CHARACTERS = 4096
_PARTS: dict[str, MediaKind] = {"image": "image", "video": "video", "document": "document", "page": "document"}
_AUDIO = ("audio", "audio_url", "input_audio", "audio_base64")


def text_input(given: Any, place: str, index: int, limits: Limits) -> ServedInput:
    """Return a text as an input."""
    return ServedInput(text=_text(given, place, index, limits))


def media_part(given: Any, kind: MediaKind | None, place: str, index: int, limits: Limits) -> MediaPart:
    """Return the file of a data URI, of a URL, or of bare base64. A URL may end with `#page=2`.

    Raises `RequestError`: 400 for what is none of them, 413 for a large one. The length is checked before decoding.
    """
    if not isinstance(given, str) or not given:
        raise RequestError(400, f"{place} is not a URL, a data URI or base64", place, index)
    if given[:8].lower().startswith(_WEB):
        if len(given) > _URL_CHARACTERS:
            raise RequestError(400, f"{place} has a URL of more than {_URL_CHARACTERS} characters", place, index)
        return MediaPart(kind, url=given)
    start = 0
    if given[:5].lower() == "data:":
        header = _DATA_URI.match(given[:_HEADER_CHARACTERS])
        if header is None or not header["base64"]:
            raise RequestError(
                400, f"{place} is a data URI without base64; write data:image/png;base64,...", place, index
            )
        start = header.end()
    elif "://" in given[:32]:
        scheme = given[:32].partition("://")[0]
        raise RequestError(400, f"{place} has the scheme {scheme}://; use https:// or a data URI", place, index)
    num_bytes = (len(given) - start) * 3 // 4
    if num_bytes > limits.max_bytes(kind) + 2:  # the length does not show the padding
        problem = f"{place} has {num_bytes} bytes; send at most {limits.max_bytes(kind)}"
        raise RequestError(413, problem, place, index, "too_many_bytes")
    try:
        data = base64.b64decode(given[start:], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(400, f"{place} is not valid base64", place, index) from error
    if not data:
        raise RequestError(422, f"{place} is empty", place, index, "empty_file")
    return MediaPart(kind, data)


def mixed_input(parts: Any, place: str, index: int, limits: Limits, instruction: str | None = None) -> ServedInput:
    """Return a list of content parts as one input: `{"type": "text"}`, `image_url`, `video_url` and so on.

    A part of type T has its content in a field T: a text, or an object with `url`. Texts are joined by line breaks.
    """
    if isinstance(parts, str):
        parts = [{"type": "text", "text": parts}]
    if not isinstance(parts, list) or not parts:
        raise RequestError(400, f"{place} is not a list of content parts", place, index)
    found: list[str | MediaPart] = [
        _part(part, f"{place}[{number}]", index, limits) for number, part in enumerate(parts)
    ]
    return joined(found, place, index, limits, instruction)


def joined(
    parts: Iterable[str | MediaPart], place: str, index: int, limits: Limits, instruction: str | None = None
) -> ServedInput:
    """Return texts and files as one input. Raises `RequestError` if there is neither, or more than the limits."""
    several = list(parts)
    media = tuple(part for part in several if isinstance(part, MediaPart))
    text = _text("\n".join(part for part in several if isinstance(part, str)), place, index, limits, empty=bool(media))
    if len(media) > limits.max_media:
        raise RequestError(413, f"{place} has {len(media)} files; send at most {limits.max_media}", place, index)
    return ServedInput(text, media, instruction=instruction)


def named_input(given: Mapping[str, Any], place: str, index: int, limits: Limits) -> ServedInput:
    """Return an object with some of `text`, `image`, `video`, `document`, `page`, `instruction` as one input.

    These are the keys of `Embedder.encode`. A medium is a data URI, a URL, bare base64, or a list of them.
    """
    known = ("text", "image", "video", "document", "page", "instruction")
    if unknown := [key for key in given if key not in known]:
        raise RequestError(400, f"{place} has the key {unknown[0]!r}; use {', '.join(known)}", place, index)
    instruction, page = given.get("instruction"), given.get("page")
    if instruction is not None and not isinstance(instruction, str):
        raise RequestError(400, f"{place}.instruction is not a text", place, index)
    if page is not None and (not isinstance(page, int) or isinstance(page, bool) or page < 0):
        raise RequestError(400, f"{place}.page is not a number from 0", place, index)
    parts: list[str | MediaPart] = []
    for key, value in given.items():
        if key == "text" and value is not None:
            parts.append(_text(value, f"{place}.text", index, limits))
        elif key in ("image", "video", "document") and value is not None:
            for one in value if isinstance(value, list) else [value]:
                part = media_part(one, _PARTS[key], f"{place}.{key}", index, limits)
                parts.append(MediaPart(part.kind, part.data, part.url, page if key == "document" else None))
    return joined(parts, place, index, limits, instruction)


def _part(part: Any, place: str, index: int, limits: Limits) -> str | MediaPart:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise RequestError(400, f"{place} is not a content part with a type", place, index)
    if kind in _AUDIO:
        raise RequestError(415, f"{place} is audio; send text, images, videos or documents", place, index)
    medium, _, form = kind.removeprefix("input_").partition("_")
    if medium == "text" and form == "":
        return _text(part.get("text"), place, index, limits)
    if medium not in _PARTS or form not in ("", "url", "base64"):
        use = "text, image_url, video_url, document_url or image_base64"
        raise RequestError(400, f"{place} has the type {kind!r}; use {use}", place, index)
    content = part.get(kind, part.get(medium))
    url = content.get("url") if isinstance(content, dict) else content
    return media_part(url, _PARTS[medium], f"{place}.{kind}", index, limits)


def _text(given: Any, place: str, index: int, limits: Limits, *, empty: bool = False) -> str:
    if not isinstance(given, str):
        raise RequestError(400, f"{place} is not a text", place, index)
    if not given.strip() and not empty:
        raise RequestError(400, f"{place} is empty", place, index)
    try:
        num_bytes = len(given) if len(given) > limits.max_text_bytes else len(given.encode())
    except UnicodeEncodeError as error:  # half of a pair of surrogates, which JSON can hold
        raise RequestError(400, f"{place} is not valid Unicode", place, index) from error
    if num_bytes > limits.max_text_bytes:
        problem = f"{place} has a text of more than {limits.max_text_bytes} bytes; send a part of it"
        raise RequestError(413, problem, place, index)
    return given
