"""Shared data types of the server: what a request asks for, whatever its dialect, and why one is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipelines.samples import MediaKind, Modality
from rzen.index.types import TargetPlace

Vectors = npt.NDArray[np.float32]
Role = Literal["query", "target"]
VectorFormat = Literal["float", "base64", "binary", "ubinary"]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "unsupported_media_type",
    422: "unprocessable_media",
    429: "rate_limit_error",
    503: "service_unavailable",
}
_UNKNOWN_TYPE = "server_error"


class RequestError(Exception):
    """A request that is refused.

    `status` is that of HTTP. `param` names the field, `index` the input, `reason` is a short countable name, such as
    `truncated_video`. A client may ask again after `retry_after_s`. All parts are in `args`, so that the error pickles.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        index: int | None = None,
        reason: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(status, message, param, index, reason, retry_after_s)
        self.status = status
        self.message = message
        self.param = param
        self.index = index
        self.reason = reason
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message

    @property
    def type(self) -> str:
        """Return the name of the kind of error, as OpenAI's interface has it."""
        return _TYPES.get(self.status, _UNKNOWN_TYPE)

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers of the answer."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {} if self.retry_after_s is None else {"Retry-After": str(max(1, round(self.retry_after_s)))}

    def to_json(self) -> dict[str, Any]:
        """Return the `error` of an answer in OpenAI's form, with `index` and `reason` where an input is at fault."""
        found: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.reason or self.status,
        }
        if self.index is not None:
            found["index"] = self.index
        if self.reason is not None:
            found["reason"] = self.reason
        return found


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may hold. Bytes of a file are those after base64."""

    max_inputs: int = 2048
    max_media: int = 16
    """Files of one input."""
    max_image_bytes: int = 20 << 20
    max_video_bytes: int = 100 << 20
    """Bytes of a video or document."""
    max_text_bytes: int = 1 << 20
    """Bytes of the texts of one input. The model cuts texts by tokens, later."""

    def max_bytes(self, kind: MediaKind | None) -> int:
        """Return the most bytes of a file."""
        return self.max_video_bytes if kind in ("video", "document") else self.max_image_bytes


@dataclass(frozen=True, slots=True)
class MediaPart:
    """A file of an input: its bytes, or the URL that it is fetched from. `kind` is what the client says it is."""

    kind: MediaKind | None = None
    data: bytes = b""
    url: str = ""
    page: int | None = None
    """Page of a document, from zero."""


@dataclass(frozen=True, slots=True)
class ServedInput:
    """One input of a request, which gets one vector. `token_ids` are those of a text, in the model's own tokenizer.

    `instruction` is the input's own. None leaves the choice to the request.
    """

    text: str = ""
    media: tuple[MediaPart, ...] = ()
    token_ids: tuple[int, ...] = ()
    instruction: str | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """How inputs are to be embedded: an `instruction`, a `task` of the model's table, or a `role`.

    A `role` without a task takes the instruction of a task that fits the input. Without all three there is none.
    """

    instruction: str | None = None
    task: str | None = None
    role: Role | None = None


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """A request for vectors. `model` is the name that the client gives, if it gives one."""

    inputs: tuple[ServedInput, ...]
    model: str | None = None
    wish: Wish = Wish()
    dimensions: int | None = None
    truncate: bool = True
    """Whether longer texts than the model takes are cut. If not, they are an error."""
    formats: tuple[VectorFormat, ...] = ("float",)


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """A request for the best targets of a corpus: those that fit a query, or those like a target of it.

    `grouped` counts a video once, with its best segment first and others as further moments.
    """

    query: ServedInput | TargetPlace
    """What to search for. A target is not among the hits."""
    model: str | None = None
    wish: Wish = Wish()
    top_k: int = 10
    modalities: tuple[Modality, ...] = ()
    sources: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    """Further conditions on columns of the corpus, such as `source=photos`, as `rzen search` takes them."""
    grouped: bool = False


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A request for scores of pairs: numbers of a query and of a document each."""

    queries: tuple[ServedInput, ...]
    documents: tuple[ServedInput, ...]
    pairs: tuple[tuple[int, int], ...]
    model: str | None = None
    instruction: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost: tokens of all inputs, those of visuals among them, pixels of pictures and of videos."""

    tokens: int = 0
    visual_tokens: int = 0
    visuals: int = 0
    image_pixels: int = 0
    video_pixels: int = 0


@dataclass(frozen=True, slots=True)
class Answered:
    """Vectors `[N, D]` of a request, what they cost, and the version of the model that made them."""

    vectors: Vectors
    usage: Usage
    version: str


@dataclass(frozen=True, slots=True)
class Found:
    """Hits of a query, with the fields of `CorpusHit`, and the version of the model and the corpus that found them.

    With `grouped`, a hit has its further `moments`: rank, score, start_s and end_s of other segments.
    """

    hits: list[dict[str, Any]]
    version: str


@dataclass(frozen=True, slots=True)
class Scored:
    """Probabilities `[N]` that the documents of N pairs fit their queries, and what they cost."""

    scores: Vectors
    usage: Usage
    version: str
