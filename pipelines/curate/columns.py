"""Columns of many tables, one after the other, in temporary files that are memory-mapped.

The system reads what is looked at, and takes the memory back when others need it. The files have no name, so that
nothing is left of them when the process ends. They are in the system's folder for temporary files (`TMPDIR`), which
should not be in memory.
"""

from __future__ import annotations

import mmap
import tempfile
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


class Column:
    """Values of a fixed size."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="rzen-column-")  # noqa: SIM115  it lives with the mapping

    def append(self, values: npt.NDArray[Any]) -> None:
        """Add the values of the next table."""
        self._file.write(np.ascontiguousarray(values).data)

    def array(self, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return all values, read-only."""
        mapped = _mapped(self._file)
        return np.zeros(0, dtype) if mapped is None else np.frombuffer(mapped, dtype)


class ListColumn:
    """Lists of values of a fixed size."""

    def __init__(self) -> None:
        self._values, self._ends, self._end = Column(), Column(), 0
        self._ends.append(np.zeros(1, np.int64))

    def append(self, lengths: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> None:
        """Add the lists of the next table, with their values one after the other."""
        self._values.append(values)
        self._ends.append(self._end + np.cumsum(lengths, dtype=np.int64))
        self._end += int(lengths.sum())

    def arrays(self, dtype: npt.DTypeLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """Return where each list begins, and the last one ends, and the values of all lists."""
        return self._ends.array(np.int64), self._values.array(dtype)


class TextColumns:
    """Columns of texts."""

    def __init__(self, *names: str) -> None:
        self._schema = pa.schema([(name, pa.string()) for name in names])
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="rzen-texts-")  # noqa: SIM115  it lives with the mapping
        self._writer = pa.ipc.new_file(self._file, self._schema)

    def append(self, table: pa.Table) -> None:
        """Add the texts of the next table, which may have other columns, too."""
        self._writer.write_table(table.select(self._schema.names))

    def arrays(self) -> list[pa.ChunkedArray]:
        """Return all texts of each column."""
        self._writer.close()
        return list(pa.ipc.open_file(pa.py_buffer(_mapped(self._file))).read_all().columns)


def _mapped(file: IO[bytes]) -> mmap.mmap | None:
    file.flush()
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.tell() else None
