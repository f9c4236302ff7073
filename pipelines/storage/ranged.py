"""An object of a store as a file that can be read from any position, for libraries that expect one."""

from __future__ import annotations

import io
from typing import BinaryIO, cast

from pipelines.errors import UserError
from pipelines.storage.location import open_object
from pipelines.storage.store import LocalStore, Store, disk_errors

_BUFFER_BYTES = 1 << 20


def open_binary(url: str, endpoint: str | None = None, *, buffered: bool = True) -> BinaryIO:
    """Open a local file, or an object in a store, for reading. Raises `FileNotFoundError`.

    An object that is replaced while it is read gives an error. Without `buffered`, each read is a request.
    """
    store, path = open_object(url, endpoint)
    if isinstance(store, LocalStore):
        with disk_errors(url):
            return (store.root / path).open("rb")
    raw = RangedFile(store, path)
    return cast(BinaryIO, io.BufferedReader(raw, _BUFFER_BYTES) if buffered else raw)


class RangedFile(io.RawIOBase):
    """Reads an object by ranged requests, as long as it keeps the tag that it has now."""

    def __init__(self, store: Store, path: str) -> None:
        super().__init__()
        self._store, self._path = store, path
        self._tag, self._size = store.tag(path), store.size(path)
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position, and return it."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer as far as the object goes, and return the number of bytes."""
        length = max(0, min(len(buffer), self._size - self._position))
        data = self._store.read_range_if(self._path, self._position, length, self._tag) if length else b""
        if data is None:
            raise UserError(f"{self._store.url}/{self._path}", "was replaced while it was read", "run the job again")
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
