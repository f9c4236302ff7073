"""Vectors by the id of what they show, over parts of any number of stores.

A part is a file of rows, `.npy` or Parquet with a column `vector`, and a file next to it with the ids of the rows, 32
bytes each (`pipelines.items`).
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import UserError
from pipelines.items.types import ID
from pipelines.storage.store import Store
from rzen.evaluation.vectors import StoredArray, Vectors, as_stored, check_width
from rzen.index.parts import VECTOR, vectors_of

IDS, ROWS = ".ids", ".npy"
_THREADS = 16
_KEPT_BYTES = 256 << 20
Ids = npt.NDArray[np.bytes_]


class VectorIndex:
    """Where the vector of each id is, over parts of any number of stores. Pickles."""

    def __init__(self) -> None:
        self._parts: list[tuple[Store, str]] = []
        self._ids: Ids = np.empty(0, dtype=ID)
        self._places = np.empty((0, 2), dtype=np.int64)  # part and row of each id
        self._width = 0  # before it is asked for
        self._kept: dict[int, StoredArray] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, store: Store, rows: Iterable[str]) -> None:
        """Take in the parts whose rows are at these paths. Of several vectors of an id the first counts."""
        new = [(store, path) for path in rows]
        with ThreadPoolExecutor(_THREADS) as pool:
            found = [
                np.frombuffer(data, dtype=ID) for data in pool.map(store.read, (ids_path(path) for _, path in new))
            ]
        places = [
            np.stack([np.full(len(ids), len(self._parts) + part), np.arange(len(ids))], axis=1)
            for part, ids in enumerate(found)
        ]
        self._parts += new
        self._ids, first = np.unique(np.concatenate([self._ids, *found]), return_index=True)
        self._places = np.concatenate([self._places, *places])[first]

    @property
    def width(self) -> int:
        """Return the width of the vectors, 0 where there are none."""
        if not self._width and self._parts:
            self._width = int(self._rows(0).shape[1])
        return self._width

    def missing(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return which of these ids have no vector, in their shape."""
        if not len(self):
            return np.ones(ids.shape, np.bool_)
        # The known ids are sorted. `np.isin` would sort all of them again for the few ids of a batch.
        nearest = np.minimum(np.searchsorted(self._ids, ids), len(self) - 1)
        lacking: npt.NDArray[np.bool_] = self._ids[nearest] != ids
        return lacking

    def load(self, ids: Ids, path: Path) -> Vectors:
        """Return the vectors of those of these ids that have one, in their order, memory-mapped in the new file `path`.

        Each part is read once; 16 at a time are in memory.
        """
        found = ids[~self.missing(ids)]
        places = self._places[np.searchsorted(self._ids, found)]
        parts = np.unique(places[:, 0])
        if not len(parts):
            return Vectors(found, np.empty((0, 0), dtype=np.float32))
        width = self._rows(int(parts[0])).shape[1]
        path.unlink(missing_ok=True)  # what was there may still be mapped
        target = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(found), width))
        order = np.argsort(places[:, 0], kind="stable")
        bounds = np.searchsorted(places[order, 0], [*parts, parts[-1] + 1])

        def copy(number: int) -> None:
            mine = order[bounds[number] : bounds[number + 1]]
            rows = self._rows(int(parts[number]))
            check_width(rows, width, self._parts[int(parts[number])][1])
            target[mine] = rows[places[mine, 1]]

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(copy, range(len(parts))))
        return Vectors(found, target)

    def rows(self, ids: Ids) -> StoredArray:
        """Return the vector of each of these ids, `[n, D]`. Rows of ids that have none are NaN.

        For a few ids at a time: parts that were read last stay in memory, up to `_KEPT_BYTES`.
        """
        rows = np.full((len(ids), self.width), np.nan, np.float32)
        known = np.flatnonzero(~self.missing(ids))
        places = self._places[np.searchsorted(self._ids, ids[known])]
        parts = np.unique(places[:, 0]).tolist()
        with ThreadPoolExecutor(_THREADS) as pool:
            for part, content in zip(parts, pool.map(self._kept_rows, parts), strict=True):
                is_here = places[:, 0] == part
                check_width(content, self.width, self._parts[part][1])
                rows[known[is_here]] = content[places[is_here, 1]]
        return rows

    def _kept_rows(self, part: int) -> StoredArray:
        with self._lock:
            content = self._kept.pop(part, None)
        if content is None:
            content = self._rows(part)
        with self._lock:
            self._kept[part] = content  # the newest is last
            while len(self._kept) > 1 and sum(some.nbytes for some in self._kept.values()) > _KEPT_BYTES:
                del self._kept[next(iter(self._kept))]
        return content

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": Lock()}

    def _rows(self, part: int) -> StoredArray:
        store, path = self._parts[part]
        import pyarrow as pa  # models are loaded without it
        import pyarrow.parquet as pq

        data = io.BytesIO(store.read(path))
        try:
            if path.endswith(ROWS):
                return as_stored(np.load(data, allow_pickle=False))
            return vectors_of(pq.read_table(data, columns=[VECTOR]))
        except (pa.ArrowException, KeyError, ValueError, EOFError, OSError) as error:
            raise UserError(f"{store.url}/{path}", f"cannot be read: {error}", "delete the file") from error


def ids_path(rows_path: str) -> str:
    """Return the place of the ids of a part."""
    return str(PurePosixPath(rows_path).with_suffix(IDS))
