"""What a Python user passes and what a search asks for, as decoded inputs.

| passed | taken for |
|---|---|
| `str` with a scheme and no white space | a URL: `https://`, `s3://`, `gs://`, `abfs://`, `hf://`, `file://` |
| `str` with the extension of a medium that names a file | that file |
| `str` that looks like such a file, which does not exist | an error |
| `str` with a slash and no white space that names a folder | an error |
| any other `str` | a text |
| `pathlib.Path` | a file |
| PIL image, uint8 RGB array `[H, W, 3]` | an image |
| uint8 RGB array `[T, H, W, 3]` | a video |
| `dict` with `text`, `image`, `video`, `document`, `page`, `instruction` | a mix; its `text` is always a text |
| `DecodedInput` | itself |
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.media.decode import Decoder
from pipelines.media.files import KINDS, kind_of, kind_of_content, read_file, split_page
from pipelines.media.images import check_size, opened_pixels
from pipelines.redaction import redact_text
from pipelines.samples import MEDIA_KINDS, DecodedInput, MediaKind, UInt8Array, Visual
from pipelines.storage.urls import STORE_SCHEMES, WEB_SCHEMES, local_path, scheme_of
from rzen.embedding.downloads import REMOTE_SCHEMES, Downloads

File = str | os.PathLike[str]
"""A path or a URL, with `#page=2` for a page of a document."""
Picture = File | Image.Image | npt.NDArray[np.uint8]
Embeddable = Picture | DecodedInput | Mapping[str, Any]
"""One input of `Embedder.encode`."""

_DATA_URL = re.compile(r"data:[a-z]+/\S+", re.IGNORECASE)
_SCHEMES = (*REMOTE_SCHEMES, "file")
_EXTENSION = re.compile(r"[^\s/.]\.\w{1,5}(#page=\d{1,9})?\Z")
_LONGEST_PATH = 4096
_SINGLE = (str, bytes, os.PathLike, Image.Image, DecodedInput, Mapping)
_KEYS = ("text", *MEDIA_KINDS, "page", "instruction")
_AS_TEXT = 'for a text, add words or pass {"text": ...}'
_LONGEST_SHOWN = 80


class InputReader:
    """Reads and decodes inputs by the limits and frames of `media`, videos and documents in a child process.

    `endpoint` is that of `s3://` URLs. Every method raises `BadMedia` for a file that cannot be read or decoded, with
    the reasons of `pipelines.media`, and `UserError` for what is no input.
    """

    def __init__(self, media: MediaConfig, endpoint: str | None = None) -> None:
        self._media = media
        self._downloads = Downloads(media.max_bytes, endpoint)
        self._decoder = Decoder(media)

    def read(self, given: Embeddable, instruction: str = "") -> DecodedInput:
        """Return an input with its pixels. `instruction` is put before one that has none of its own."""
        match given:
            case DecodedInput():
                return given
            case str() if not is_file(given):
                return DecodedInput(text=given, instruction=instruction)
            case Mapping():
                return self._mix(given, instruction)
        return DecodedInput(visuals=(self._visual(given),), instruction=instruction)

    def ahead(self, inputs: Iterable[Embeddable]) -> Iterator[Embeddable]:
        """Yield the inputs in order, while the remote files of the next ones are fetched."""
        return self._downloads.ahead(inputs)

    def decode(self, kind: MediaKind, data: bytes) -> Visual:
        """Return the pixels of a file."""
        return self._decoder.member(kind, data)

    def close(self) -> None:
        """End the child process, if one was started."""
        self._decoder.close()

    def _mix(self, given: Mapping[str, Any], instruction: str) -> DecodedInput:
        if unknown := [key for key in given if key not in _KEYS]:
            raise UserError("", f"has the key {unknown[0]!r}", f"use {', '.join(_KEYS)}")
        page = given.get("page")
        if page is not None and (
            not isinstance(page, int) or page < 0 or not isinstance(given.get("document"), str | os.PathLike)
        ):
            raise UserError("", f"has page={page!r}", "name one document, and its page as a number from 0")
        visuals: list[Visual] = []
        for key, value in given.items():
            if key in MEDIA_KINDS:
                several = value if isinstance(value, list | tuple) else [value]
                visuals += [self._visual(one, key, page) for one in several if one is not None]
        text = given.get("text") or ""
        own = given.get("instruction")
        for key, value in (("text", text), ("instruction", own or "")):
            if not isinstance(value, str):
                raise UserError("", f"has {key}={type(value).__name__}", "pass a str")
        if not text and not visuals:
            raise UserError("", "has neither text nor media", f"use {', '.join(_KEYS)}")
        return DecodedInput(text, tuple(visuals), instruction if own is None else own)

    def _visual(self, given: Any, kind: MediaKind | None = None, page: int | None = None) -> Visual:
        match given:
            case Image.Image():
                visual = Visual("image", opened_pixels(given, self._media)[None])
            case np.ndarray():
                visual = _of_array(given, self._media)
            case str() | os.PathLike():
                return self._of_file(os.fspath(given), kind, page)
            case _:
                fix = "pass a text, a path, a URL, a PIL image, a uint8 RGB array or a dict of them"
                raise UserError("", f"{type(given).__name__} is not an input", fix)
        if kind == "document" and visual.kind == "image":  # the picture of a page
            return replace(visual, kind="document")
        if kind not in (None, visual.kind):
            raise UserError("", f"has pixels of one {visual.kind} for {kind!r}", "pass uint8 [T, H, W, 3] for a video")
        return visual

    def _of_file(self, given: str, kind: MediaKind | None, page: int | None) -> Visual:
        name, in_name = split_page(given)
        page = in_name if page is None else page
        shown = redact_text(name)
        with named(shown):
            found, data = self._bytes(name, kind)
            if (kind, found) == ("document", "image"):  # the picture of a page
                return replace(self._decoder.member(found, data), kind="document")
            if kind not in (None, found):
                raise UserError("", f"is a {found}, not a {kind}", f"pass it as {found!r}")
            if page is not None and found != "document":
                raise UserError("", f"is a {found} and has no page {page}", "leave the page out")
            if page is None and found == "document" and (count := self._decoder.num_pages(data)) > 1:
                fix = f"an input is one page: write #page=0 to #page={count - 1} after the name"
                raise UserError("", f"has {count} pages", fix)
            return self._decoder.member(found, data, page)

    def _bytes(self, name: str, kind: MediaKind | None) -> tuple[MediaKind, bytes]:
        """Return kind and bytes of a path or URL. A file of an unknown extension is of `kind`, if that is given."""
        scheme = "data" if _DATA_URL.match(name) else scheme_of(name)
        if scheme in WEB_SCHEMES:
            return self._from_web(name, kind)
        if scheme in STORE_SCHEMES:
            return _kind(Path(name), kind), self._downloads.fetch(name).data
        if scheme not in ("", "file"):
            raise UserError("", f"has the scheme {scheme!r}", f"use {', '.join(_SCHEMES)}; {_AS_TEXT}")
        path = local_path(name)
        return _kind(path, kind), read_file(str(path), self._media)

    def _from_web(self, url: str, kind: MediaKind | None) -> tuple[MediaKind, bytes]:
        file = self._downloads.fetch(url)
        known = _kind_of_url(url) or _kind_of_url(file.url) or kind_of_content(file.content_type) or kind
        if known is None:
            raise BadMedia("unsupported_format", f"the server sends {file.content_type or 'no content type'}")
        return known, file.data


def is_file(given: str) -> bool:
    """Return whether a str is a file or URL, by the rules of this module. Raises `UserError` for a missing file.

    A text with white space and without a slash is a missing file only to people: "the end of cat.jpg" stays a text.
    """
    if len(given) > _LONGEST_PATH or "\n" in given:
        return False
    if _is_url(given):
        return True
    if not _EXTENSION.search(given):  # most texts need no look at the disk
        if "/" in given and not re.search(r"\s", given) and _names(given, Path.is_dir):
            raise UserError(shown_as(given), "is a folder", f"embed its files with `rzen embed`; {_AS_TEXT}")
        return False
    name, _ = split_page(given)
    is_media = Path(name).suffix.lower() in KINDS
    if _names(name, Path.is_file):
        if not is_media:
            fix = f"files may have {' '.join(KINDS)}; {_AS_TEXT}"
            raise UserError(shown_as(given), f"is a file with the extension {Path(name).suffix!r}", fix)
        return True
    if not is_media or (re.search(r"\s", name) and ("/" not in name or "://" in name)):
        return False
    raise UserError(shown_as(given), "does not exist", f"correct the path; {_AS_TEXT}")


def _is_url(given: str) -> bool:
    is_one = bool(_DATA_URL.match(given) or scheme_of(given)) and not given.endswith("://")
    return is_one and not any(map(str.isspace, given))


def _names(text: str, is_one: Callable[[Path], bool]) -> bool:
    try:
        return is_one(Path(text).expanduser())
    except (OSError, RuntimeError, ValueError):  # a text that no file can have as its name
        return False


def several_of(inputs: Embeddable | Iterable[Embeddable]) -> tuple[Iterable[Embeddable], bool]:
    """Return one or several inputs as several, and whether it was one."""
    if isinstance(inputs, np.ndarray):
        is_one = inputs.ndim != 1 and inputs.dtype.kind not in "OU"  # texts come in arrays, too
    else:
        is_one = isinstance(inputs, _SINGLE) or not isinstance(inputs, Iterable)
    return ([inputs], True) if is_one else (inputs, False)  # type: ignore[list-item, return-value]


def shown_as(given: Embeddable) -> str:
    """Return a short name of an input for people, without secrets."""
    match given:
        case str() | os.PathLike():
            text = redact_text(os.fspath(given))
        case DecodedInput():
            text = given.text or " + ".join(visual.kind for visual in given.visuals)
        case Mapping():
            names = [shown_as(value) if isinstance(value, str | Path) else key for key, value in given.items()]
            text = " + ".join(name for key, name in zip(given, names, strict=True) if key in ("text", *MEDIA_KINDS))
        case _:
            text = "video" if isinstance(given, np.ndarray) and given.ndim == 4 else "image"
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 1]}…"


@contextmanager
def named(place: str) -> Iterator[None]:
    """Put a place before the detail of a `BadMedia`, and before the place of a `UserError`."""
    try:
        yield
    except BadMedia as error:
        raise BadMedia(error.reason, f"{place}: {error.detail}".removesuffix(": ")) from error
    except UserError as error:
        whole = place if error.place in ("", place) else f"{place} {error.place}"
        raise UserError(whole, error.problem, error.fix) from error


def _kind(path: Path, default: MediaKind | None) -> MediaKind:
    return default if default and path.suffix.lower() not in KINDS else kind_of(path)


def _kind_of_url(url: str) -> MediaKind | None:
    return KINDS.get(Path(urlsplit(url).path).suffix.lower())


def _of_array(pixels: UInt8Array, media: MediaConfig) -> Visual:
    """Return the visual of uint8 RGB `[H, W, 3]` or `[T, H, W, 3]`. Raises `UserError` for another array."""
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != 3 or 0 in pixels.shape:
        problem = f"is an array {list(pixels.shape)} of {pixels.dtype}"
        raise UserError("", problem, "pass uint8 RGB: [H, W, 3] for an image, [T, H, W, 3] for a video")
    height_px, width_px = pixels.shape[-3:-1]
    check_size(width_px, height_px, media)
    return Visual("video", pixels) if pixels.ndim == 4 else Visual("image", pixels[None])
