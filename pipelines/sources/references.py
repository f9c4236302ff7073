"""Reads the bytes behind a reference: a file, a member of an archive, a cell of a table, the pictures of a video."""

from __future__ import annotations

import hashlib
import os.path
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.media.files import read_file
from pipelines.samples import ArchiveRef, CellRef, FileRef, RawSample, Reference
from pipelines.sources.archives import read_member
from pipelines.storage.location import read_object
from pipelines.storage.urls import is_local

Cells = Mapping[CellRef, bytes | None]
"""Bytes of cells. None stands for more bytes than are allowed."""
_NO_CELLS: Cells = MappingProxyType({})


class ReferenceReader:
    """Reads references of raw samples in one process. Close it to remove its scratch file.

    A part is the smallest read of a table. So `prepare` copies the cells of many samples to a scratch file, part by
    part. A cell that was not prepared costs a read of its part. `cells` are those that another reader has `taken`.
    """

    def __init__(self, config: MediaConfig, endpoint: str | None = None, cells: Cells = _NO_CELLS) -> None:
        self._config = config
        self._cells = cells
        self._endpoint = endpoint
        self._scratch = tempfile.TemporaryFile(prefix="rzen-cells-")  # noqa: SIM115, closed with the reader
        self._places: dict[CellRef, tuple[int, int]] = {}

    def prepare(self, samples: Iterable[RawSample]) -> None:
        """Copy the cells of the samples to the scratch file, one part of a table after the other."""
        parts: dict[tuple[str, int], list[CellRef]] = {}
        for raw in samples:
            for ref in raw.files.values():
                if isinstance(ref, CellRef) and ref not in self._places:
                    parts.setdefault((ref.path, ref.part), []).append(ref)
        for (path, part), refs in parts.items():
            self._copy(path, part, refs)

    def _copy(self, path: str, part: int, refs: list[CellRef]) -> None:
        from pipelines.sources.columnar import read_cells  # pyarrow is loaded only where tables are read

        for ref, data in read_cells(path, part, refs, self._endpoint):
            if len(data) <= self._config.max_bytes:
                self._places[ref] = (self._scratch.seek(0, 2), len(data))
                self._scratch.write(data)

    def take(self, samples: Iterable[RawSample]) -> Cells:
        """Return the bytes of the cells of samples that were prepared."""
        refs = {ref: None for raw in samples for ref in raw.files.values() if isinstance(ref, CellRef)}
        return {ref: self._cell(ref) if ref in self._places else None for ref in refs}

    def read(self, ref: Reference) -> bytes | list[bytes]:
        """Return the bytes of a file, or of each picture of a video.

        Raises `BadMedia`: missing_file, unreadable_file, too_many_bytes, corrupt_archive. Raises `UserError` for a
        table that was replaced.
        """
        if isinstance(ref, CellRef):
            return self._cell(ref)
        if isinstance(ref, FileRef | ArchiveRef):
            return self._file(ref)
        if len(ref.pictures) > self._config.max_video_frames:
            raise BadMedia("too_many_frames", f"{len(ref.pictures)} pictures")
        return [self._file(picture) for picture in ref.pictures]

    def _file(self, ref: FileRef | ArchiveRef) -> bytes:
        if isinstance(ref, FileRef):
            if is_local(ref.path):
                return read_file(ref.path, self._config)
            return read_object(ref.path, self._config.max_bytes, self._endpoint)
        try:
            return read_member(ref, self._endpoint, self._config.max_bytes)
        except FileNotFoundError as error:
            raise BadMedia("missing_file") from error

    def _cell(self, ref: CellRef) -> bytes:
        if data := self._cells.get(ref):
            return data
        if ref not in self._places and ref not in self._cells:
            self._copy(ref.path, ref.part, [ref])
        if ref not in self._places:
            raise BadMedia("too_many_bytes", f"more than {self._config.max_bytes} bytes")
        start, length = self._places[ref]
        self._scratch.seek(start)
        data = self._scratch.read(length)
        if hashlib.sha256(data).hexdigest() != ref.sha256:
            raise UserError(ref.path, "was replaced while it was read", "run the job again")
        return data

    def close(self) -> None:
        """Remove the scratch file."""
        self._scratch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def identity(ref: Reference | None, root: Path) -> tuple[object, ...]:
    """Identify the content of a reference as far as that is cheap: a cell by its bytes, others by where they are.

    Local paths are relative to `root`, so that raw data may move.
    """
    if ref is None:
        return ("", None)
    if isinstance(ref, CellRef):
        return (ref.sha256, *_page(ref))
    place = relative_place(ref.path, root)
    if isinstance(ref, ArchiveRef):
        return (place, ref.member, *_page(ref))
    return (place, ref.page) if isinstance(ref, FileRef) else (place, len(ref.pictures))


def _page(ref: CellRef | ArchiveRef) -> tuple[int, ...]:
    return () if ref.page is None else (ref.page,)


def relative_place(path: str, root: Path) -> str:
    """Return a local path relative to `root`, and a URL as it is."""
    return os.path.relpath(path, root) if is_local(path) else path
