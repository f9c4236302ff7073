"""Vectors kept by the id of their item, so that nothing is embedded twice by one model in one configuration.

{cache}/{config}/config.json      what decides a vector: weights, prompt, preprocessing, precision, versions
                 {part}.npy       vectors of some items, float32 [n, D]
                 {part}.ids       their ids, 32 bytes each, written last: readers trust only this

An id is a digest of an item's content (`pipelines.items`). The ids name the part, so that two jobs which make the same
part write the same object. The rows of a part may also be a Parquet file with a column `vector` (`rzen embed`).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import UserError
from pipelines.items.types import ID, as_ids
from pipelines.storage.store import Store
from rzen.evaluation.vectors import StoredArray, Vectors, as_stored, check_width

_IDS, _ROWS = ".ids", ".npy"
_THREADS = 16
Ids = npt.NDArray[np.bytes_]


class VectorIndex:
    """Where the vector of each id is, over parts of any number of stores. Pickles."""

    def __init__(self) -> None:
        self._parts: list[tuple[Store, str]] = []
        self._ids: Ids = np.empty(0, dtype=ID)
        self._places = np.empty((0, 2), dtype=np.int64)  # part and row of each id
        self._width = 0  # before it is asked for

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
        """Return which of these ids have no vector."""
        return ~np.isin(ids, self._ids)

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

    def _rows(self, part: int) -> StoredArray:
        store, path = self._parts[part]
        data = io.BytesIO(store.read(path))
        try:
            if path.endswith(_ROWS):
                return as_stored(np.load(data, allow_pickle=False))
            column = pq.read_table(data, columns=["vector"])["vector"].combine_chunks()
            return as_stored(column.flatten().to_numpy().reshape(len(column), -1))
        except (pa.ArrowException, KeyError, ValueError, EOFError, OSError) as error:
            raise UserError(f"{store.url}/{path}", f"cannot be read: {error}", "delete the file") from error


class VectorCache(VectorIndex):
    """The vectors of one model in one configuration. What others write meanwhile is found by `refresh`."""

    def __init__(self, store: Store, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.store = store.child(config_digest(config))
        if not self.store.exists("config.json"):
            self.store.write("config.json", _config_text(config).encode())
        self._own: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Look for parts that were written since."""
        new = [path for path in self.store.list() if path.endswith(_IDS) and path not in self._own]
        self._own.update(new)
        self.add(self.store, [path.removesuffix(_IDS) + _ROWS for path in new])


def config_digest(config: Mapping[str, Any]) -> str:
    """Return the name of a configuration: equal for equal content, in any order."""
    return hashlib.sha256(_config_text(config).encode()).hexdigest()[:16]


def ids_path(rows_path: str) -> str:
    """Return the place of the ids of a part."""
    return str(PurePosixPath(rows_path).with_suffix(_IDS))


def write_part(store: Store, ids: Sequence[str], rows: npt.NDArray[np.float32]) -> None:
    """Write vectors `[n, D]` and their ids, at least one, into the folder of a configuration."""
    names = as_ids(ids).tobytes()
    part = hashlib.sha256(names).hexdigest()[:32]
    sink = io.BytesIO()
    np.save(sink, as_stored(rows))
    store.write(part + _ROWS, sink.getvalue())
    store.write(part + _IDS, names)


def _config_text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=1, sort_keys=True)
