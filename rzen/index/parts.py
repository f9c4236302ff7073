"""The Parquet files of a version of the vectors, read as they are needed."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pipelines.errors import UserError
from pipelines.storage.ahead import read_ahead
from pipelines.storage.store import LocalStore, Store
from rzen.evaluation.vectors import StoredArray, as_stored

if TYPE_CHECKING:  # models are loaded without pyarrow
    import pyarrow as pa

VECTOR = "vector"
_THREADS = 8


class Parts:
    """The parts of a version, in order. `place` is the URL of the vectors, for messages."""

    def __init__(self, store: Store, paths: Sequence[str]) -> None:
        self.store, self.paths, self.place = store, list(paths), store.url

    def read(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Return columns of a part. Raises `UserError` for one that is gone or damaged."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.paths[number]
        try:
            store = self.store
            source = str(store.root / path) if isinstance(store, LocalStore) else io.BytesIO(store.read(path))
            return pq.read_table(source, columns=None if columns is None else list(columns), partitioning=None)
        except (FileNotFoundError, pa.ArrowException, KeyError, OSError) as error:
            raise UserError(f"{self.place}/{path}", f"cannot be read: {error}", "run the job embed again") from error

    def read_all(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the columns of all parts in order, a few parts at a time in memory."""
        return read_ahead(lambda number: self.read(number, columns), range(len(self.paths)), _THREADS)

    def schema(self) -> pa.Schema:
        """Return the columns of the rows. Raises `UserError` if there are none."""
        import pyarrow.parquet as pq

        if not self.paths:
            raise UserError(self.place, "holds no vectors", "embed a dataset with targets that can be decoded")
        path = self.paths[0]
        if isinstance(self.store, LocalStore):
            try:
                return pq.read_schema(str(self.store.root / path))
            except (OSError, ValueError) as error:
                fix = "run the job embed again"
                raise UserError(f"{self.place}/{path}", f"cannot be read: {error}", fix) from error
        return self.read(0).schema


def vectors_of(table: pa.Table) -> StoredArray:
    """Return the vectors `[n, D]` of rows."""
    column = table[VECTOR].combine_chunks()
    return as_stored(column.flatten().to_numpy().reshape(len(column), -1))
