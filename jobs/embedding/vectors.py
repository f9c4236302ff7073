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
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.items.types import as_ids
from pipelines.storage.store import Store
from rzen.evaluation.vectors import as_stored
from rzen.index.by_id import IDS, ROWS, VectorIndex


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
        new = [path for path in self.store.list() if path.endswith(IDS) and path not in self._own]
        self._own.update(new)
        self.add(self.store, [path.removesuffix(IDS) + ROWS for path in new])


def config_digest(config: Mapping[str, Any]) -> str:
    """Return the name of a configuration: equal for equal content, in any order."""
    return hashlib.sha256(_config_text(config).encode()).hexdigest()[:16]


def write_part(store: Store, ids: Sequence[str], rows: npt.NDArray[np.float32]) -> None:
    """Write vectors `[n, D]` and their ids, at least one, into the folder of a configuration."""
    names = as_ids(ids).tobytes()
    part = hashlib.sha256(names).hexdigest()[:32]
    sink = io.BytesIO()
    np.save(sink, as_stored(rows))
    store.write(part + ROWS, sink.getvalue())
    store.write(part + IDS, names)


def _config_text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=1, sort_keys=True)
