"""Files of the web and of object stores. Those of the next inputs are fetched while the ones before are embedded."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pipelines.media.files import split_page
from pipelines.samples import MEDIA_KINDS
from pipelines.storage.location import read_object
from pipelines.storage.urls import STORE_SCHEMES, WEB_SCHEMES, scheme_of
from pipelines.storage.web import WebFile, read_url

REMOTE_SCHEMES = (*WEB_SCHEMES, *STORE_SCHEMES)
_AT_ONCE = 8
"""Inputs whose files are fetched at once. Each file has at most `max_bytes`."""
T = TypeVar("T")


class Downloads:
    """Fetches remote files of at most `max_bytes`. `endpoint` is that of `s3://` URLs."""

    def __init__(self, max_bytes: int, endpoint: str | None = None) -> None:
        self._max_bytes = max_bytes
        self._endpoint = endpoint
        self._coming: dict[str, Future[WebFile]] = {}

    def ahead(self, inputs: Iterable[T]) -> Iterator[T]:
        """Yield the inputs in order, while threads fetch the files of the next ones.

        A URL of several of these inputs is fetched once. What fails is raised by `fetch`.
        """
        waiting: deque[T] = deque()
        pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="download")
        try:
            for given in inputs:
                for url in remote_files(given):
                    if url not in self._coming:
                        self._coming[url] = pool.submit(self._download, url)
                waiting.append(given)
                if len(waiting) == _AT_ONCE:
                    yield waiting.popleft()
                    self._forget_all_but(waiting)
            while waiting:
                yield waiting.popleft()
                self._forget_all_but(waiting)
        finally:
            self._coming.clear()
            pool.shutdown(wait=False, cancel_futures=True)

    def fetch(self, url: str) -> WebFile:
        """Return a file. Raises `BadMedia`: missing_file, unreadable_file, too_many_bytes."""
        coming = self._coming.get(url)
        return self._download(url) if coming is None else coming.result()

    def _forget_all_but(self, waiting: Iterable[object]) -> None:
        needed = {url for given in waiting for url in remote_files(given)}
        self._coming = {url: coming for url, coming in self._coming.items() if url in needed}

    def _download(self, url: str) -> WebFile:
        if scheme_of(url) in WEB_SCHEMES:
            return read_url(url, self._max_bytes)
        return WebFile(read_object(url, self._max_bytes, self._endpoint), "", url)


def remote_files(given: object) -> set[str]:
    """Return the URLs, without pages, that an input of `Embedder.encode` names."""
    if isinstance(given, Mapping):
        media = [given[kind] for kind in MEDIA_KINDS if kind in given]
        several = [one for some in media for one in (some if isinstance(some, list | tuple) else [some])]
    else:
        several = [given]
    names = [split_page(os.fspath(one))[0] for one in several if isinstance(one, str | os.PathLike)]
    return {name for name in names if not any(map(str.isspace, name)) and scheme_of(name) in REMOTE_SCHEMES}
