"""Vectors of benchmark items, kept by id, so that nothing is embedded twice by one model in one config.

{cache}/{config}/config.json             what decides a vector: weights, prompt, preprocessing, precision, versions
              {part}.npy           vectors of some items, float32 [n, D]
              {part}.ids           their ids, 32 bytes each, written last: readers trust only this

An id is a digest of an item's content (`pipelines.benchmarks.types`), and a part is named by the ids in it: two jobs
that make the same one write the same object.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.benchmarks.types import ID, as_ids
from pipelines.storage.store import Store
from rzen.evaluation.benchmark import Vectors

_IDS, _ROWS = ".ids", ".npy"
_THREADS = 16


class VectorCache:
    """The vectors of one model, made in one config. Pickles; what others write meanwhile is found by a new one."""

    def __init__(self, store: Store, config: Mapping[str, Any]) -> None:
        text = json.dumps(config, indent=1, sort_keys=True)
        self.store = store.child(hashlib.sha256(text.encode()).hexdigest()[:16])
        if not self.store.exists("config.json"):
            self.store.write("config.json", text.encode())
        self._parts: list[str] = []
        self._ids = np.empty(0, dtype=ID)
        self._places = np.empty((0, 2), dtype=np.int64)
        self.refresh()

    def refresh(self) -> None:
        """Looks for parts that have been written since."""
        known = set(self._parts)
        new = [path for path in self.store.list() if path.endswith(_IDS) and path not in known]
        with ThreadPoolExecutor(_THREADS) as pool:
            found = [np.frombuffer(data, dtype=ID) for data in pool.map(self.store.read, new)]
        places = [
            np.stack([np.full(len(ids), len(self._parts) + part), np.arange(len(ids))], axis=1)
            for part, ids in enumerate(found)
        ]
        self._parts += new
        self._ids, first = np.unique(np.concatenate([self._ids, *found]), return_index=True)
        self._places = np.concatenate([self._places, *places])[first]

    def missing(self, ids: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bool_]:
        """Which of these ids have no vector."""
        return ~np.isin(ids, self._ids)

    def load(self, ids: npt.NDArray[np.bytes_], path: Path) -> Vectors:
        """The vectors of those of these ids that have one, in their order, memory-mapped in the new file `path`: one
        part at a time is in memory for each of 16 threads.
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
            target[mine] = self._rows(int(parts[number]))[places[mine, 1]]

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(copy, range(len(parts))))
        return Vectors(found, target)

    def _rows(self, part: int) -> npt.NDArray[np.float32]:
        data = self.store.read(self._parts[part].removesuffix(_IDS) + _ROWS)
        rows: npt.NDArray[np.float32] = np.load(io.BytesIO(data), allow_pickle=False)
        return rows


def write_part(store: Store, ids: Sequence[str], rows: npt.NDArray[np.float32]) -> None:
    """Vectors `[n, D]` and their ids, at least one, into the folder of a config."""
    names = as_ids(ids).tobytes()
    part = hashlib.sha256(names).hexdigest()[:32]
    sink = io.BytesIO()
    np.save(sink, rows.astype(np.float32, copy=False))
    store.write(part + _ROWS, sink.getvalue())
    store.write(part + _IDS, names)
