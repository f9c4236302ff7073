"""The files of a request that are named by URL, before the model sees them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from pipelines.errors import BadMedia
from pipelines.media.files import split_page
from pipelines.storage.guarded_web import Resolve, read_allowed_url, resolve_addresses
from rzen.serving.types import Limits, MediaPart, RequestError, ServedInput

_AT_ONCE = 4
_STATUS = {"refused_url": 400, "too_many_bytes": 413}
_OTHER_STATUS = 422


def fetch_media(
    inputs: Sequence[ServedInput], hosts: Collection[str], limits: Limits, resolve: Resolve = resolve_addresses
) -> tuple[ServedInput, ...]:
    """Return the inputs with the bytes of their URLs, which must be of allowed hosts. Blocks.

    A URL of several inputs is fetched once. Raises `RequestError`, with the index of the input.
    """
    wanted = {part.url for one in inputs for part in one.media if part.url}
    if not wanted:
        return tuple(inputs)
    if not hosts:
        index = next(index for index, one in enumerate(inputs) if any(part.url for part in one.media))
        problem = "URLs are not fetched here; send the file as a data URI, or start the server with --allow-urls"
        raise RequestError(400, f"input {index}: {problem}", f"input[{index}]", index, "refused_url")
    with ThreadPoolExecutor(min(_AT_ONCE, len(wanted)), thread_name_prefix="fetch") as pool:
        most = {part.url: limits.max_bytes(part.kind) for one in inputs for part in one.media}
        coming = {
            url: pool.submit(read_allowed_url, split_page(url)[0], hosts, most[url], resolve=resolve) for url in wanted
        }
        fetched = []
        for index, one in enumerate(inputs):
            try:
                media = tuple(_with_bytes(part, coming[part.url].result()) if part.url else part for part in one.media)
            except BadMedia as error:
                pool.shutdown(wait=False, cancel_futures=True)
                status = _STATUS.get(error.reason, _OTHER_STATUS)
                raise RequestError(status, f"input {index}: {error}", f"input[{index}]", index, error.reason) from error
            fetched.append(replace(one, media=media))
    return tuple(fetched)


def _with_bytes(part: MediaPart, data: bytes) -> MediaPart:
    page = split_page(part.url)[1]
    return replace(part, data=data, url="", page=part.page if page is None else page)
