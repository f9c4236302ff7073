"""A LanceDB table with the rows of a corpus and their vectors, next to these: on a disk or in a bucket.

A version of the vectors is a version of the table. A new one adds and deletes the rows of the parts that differ, so
that its cost is that of the change. Only the job that holds the lease of the vectors writes here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.errors import UserError
from pipelines.imports import import_extra
from pipelines.storage.store import LocalStore, Store
from rzen.evaluation.vectors import FloatArray
from rzen.index.filters import Condition, check_conditions, sql
from rzen.index.kinds import IndexKind
from rzen.index.parts import VECTOR, Parts
from rzen.index.types import INDEX, IndexEntry, Row, distinct

if TYPE_CHECKING:  # models are loaded without pyarrow
    import pyarrow as pa

TABLE, PART = "corpus", "part"
TRAINED_ROWS = 10_000
"""Rows from which the table has an index. Smaller tables are scanned."""
_TAG = "rzen-"
_GROWTH = 2  # times the rows that an index was trained on: it is trained again
_ROWS_AT_ONCE = 50_000
_PARTS_AT_ONCE = 500
_PROBES, _REFINE = 32, 10
_FIRST, _MORE = 2, 4  # times k rows are fetched, then times those, until k of them are distinct


def sync_table(parts: Parts, folder: Store, old: IndexEntry | None) -> IndexEntry:
    """Give the table in `folder` the rows of these parts, and return its entry.

    `old` is the entry of the last version. Its version of the table stays as it is. A killed job leaves versions that
    no entry names, and the next one starts with the last of them. Raises `UserError` without LanceDB.
    """
    database = _connect(folder)
    path = folder.url.rpartition("/")[2]
    table = _open(database)
    if table is None:
        table = database.create_table(TABLE, schema=_schema(parts))
    there = set(table.search().select([PART]).to_arrow()[PART].unique().to_pylist())
    gone = sorted(there - set(parts.paths))
    for first in range(0, len(gone), _PARTS_AT_ONCE):
        table.delete(sql([Condition(PART, "=", tuple(gone[first : first + _PARTS_AT_ONCE]))]))
    new = [number for number, part in enumerate(parts.paths) if part not in there]
    for batch in _batches(parts, new):
        table.add(batch)
    trained = _train(table, old.get("trained_rows", 0) if old else 0, changed=bool(gone or new))
    if (name := f"{_TAG}{table.version}") not in table.tags.list():
        table.tags.create(name, table.version)  # versions with a tag are not removed
    return {"kind": "lance", "path": f"{INDEX}/{path}", "version": table.version, "trained_rows": trained}


def keep_versions(folder: Store, versions: Sequence[int]) -> None:
    """Let all versions of the table but these be removed, when LanceDB does that: after a week."""
    table = _open(_connect(folder))
    if table is None:
        return
    for name in table.tags.list().keys() - {f"{_TAG}{version}" for version in versions}:
        if name.startswith(_TAG):
            table.tags.delete(name)


@dataclass(frozen=True)
class LanceIndex:
    """A version of the table. It reads what a query needs: lists of the index, and the rows of the best candidates."""

    table: Any
    place: str

    @classmethod
    def open(cls, folder: Store, version: int, place: str) -> LanceIndex:
        """Open a version. Raises `UserError` if it is gone, or without LanceDB."""
        table = _open(_connect(folder))
        fix = "run `rzen embed` again"
        if table is None:
            raise UserError(folder.url, "does not exist", fix)
        try:
            table.checkout(version)
        except (ValueError, RuntimeError) as error:
            raise UserError(folder.url, f"has no version {version}: {error}", fix) from error
        return cls(table, place)

    @property
    def kind(self) -> IndexKind:
        """Return `lance`."""
        return "lance"

    def search(self, queries_QD: FloatArray, k: int, conditions: Sequence[Condition] = ()) -> list[list[Row]]:
        """Return the k best rows of each query, as `CorpusIndex` says. Cosines are those of the fp32 vectors."""
        where = sql(check_conditions(conditions, self.table.schema, self.place))
        return [self._nearest(query_D, k, where) for query_D in np.asarray(queries_QD, dtype=np.float32)]

    def _nearest(self, query_D: FloatArray, k: int, where: str | None) -> list[Row]:
        limit = _FIRST * k
        while True:
            search = self.table.search(query_D, vector_column_name=VECTOR).distance_type("cosine").limit(limit)
            search = search.minimum_nprobes(_PROBES).maximum_nprobes(0).refine_factor(_REFINE)  # 0: until all are found
            if where:
                search = search.where(where, prefilter=True)
            found = search.to_arrow()
            rows = distinct(_scored(found, query_D), k)
            if len(rows) == k or len(found) < limit:
                return rows
            limit *= _MORE


def _scored(found: pa.Table, query_D: FloatArray) -> list[Row]:
    if not len(found):
        return []
    vectors_ND = found[VECTOR].combine_chunks().flatten().to_numpy().reshape(len(found), -1)
    rows: list[Row] = found.drop_columns([VECTOR, PART, "_distance"]).to_pylist()
    return [row | {"score": float(score)} for row, score in zip(rows, vectors_ND @ query_D, strict=True)]


def _train(table: Any, trained_rows: int, *, changed: bool) -> int:
    """Bring the index up to date. Return how many rows it was trained on, 0 for none."""
    from lancedb.index import IvfRq

    count = int(table.count_rows())
    if count < TRAINED_ROWS:
        return 0
    if not table.list_indices() or count > _GROWTH * trained_rows:
        table.create_index(VECTOR, config=IvfRq(distance_type="cosine", num_partitions=_num_lists(count)))
        return count
    if changed:
        table.optimize()
    return trained_rows


def _num_lists(count: int) -> int:
    """Return the number of lists: about the square root of the rows."""
    return max(1, math.isqrt(count))


def _batches(parts: Parts, numbers: Sequence[int]) -> Iterator[pa.Table]:
    """Yield the rows of these parts, many at a time, whole parts only: a part is in the table or is not."""
    import pyarrow as pa

    waiting: list[pa.Table] = []
    schema = _schema(parts) if numbers else None
    for number in numbers:
        table = parts.read(number)
        waiting.append(table.append_column(PART, pa.array([parts.paths[number]] * len(table))).cast(schema))
        if sum(map(len, waiting)) >= _ROWS_AT_ONCE:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _schema(parts: Parts) -> pa.Schema:
    """Return the columns of the table: those of the parts with vectors of a fixed size, and the part of each row."""
    import pyarrow as pa

    first = parts.read(0)
    width = len(first[VECTOR][0])
    fields = [pa.field(VECTOR, pa.list_(pa.float32(), width)) if one.name == VECTOR else one for one in first.schema]
    return pa.schema([*(field.remove_metadata() for field in fields), pa.field(PART, pa.string())])


def _open(database: Any) -> Any:
    return database.open_table(TABLE) if TABLE in database.list_tables().tables else None


def _connect(folder: Store) -> Any:
    lancedb = import_lancedb()
    if isinstance(folder, LocalStore):
        return lancedb.connect(folder.url)
    options = None
    if endpoint := getattr(folder, "endpoint", None) or os.environ.get("AWS_ENDPOINT_URL"):
        options = {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}
    return lancedb.connect(folder.url, storage_options=options)


def import_lancedb() -> Any:
    """Return LanceDB. Raises `UserError` if it is not installed."""
    return import_extra("lancedb", "index", "index: lance")
