"""Parts and plan files as Parquet. Equal rows give equal bytes."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.candidates.types import CANDIDATE_COLUMNS, SAMPLE_COLUMNS, CandidateRows, PlanRows
from pipelines.errors import UserError
from pipelines.storage.store import Store

_FIX = "make the table again, or restore the file"
_TYPES = {
    "candidate": pa.int64(),
    "id": pa.int64(),
    "recall": pa.float32(),
    "teacher": pa.float32(),
    "owner": pa.float32(),
    "candidate_modality": pa.int8(),
    "query": pa.int64(),
    "positive_recall": pa.float32(),
    "positive_teacher": pa.float32(),
    "modality": pa.int8(),
    "keep": pa.bool_(),
    "cluster": pa.int64(),
}
_PLAN_SCHEMA = pa.schema([("sample", pa.int64()), ("keep", pa.bool_()), ("cluster", pa.int64())])
_WEIGHT = pa.field("weight", pa.float32())


def part_bytes(rows: CandidateRows) -> bytes:
    """Return a part. Unknown scores are nulls."""
    offsets = pa.array(rows.bounds, pa.int32())
    columns: dict[str, pa.Array] = {"key": pa.array(rows.key, pa.string())}
    columns |= {name: _column(getattr(rows, name), name) for name in SAMPLE_COLUMNS}
    columns |= {
        name: pa.ListArray.from_arrays(offsets, _column(getattr(rows, name), name)) for name in CANDIDATE_COLUMNS
    }
    return _written(pa.table(columns))


def parse_part(data: bytes, place: str) -> CandidateRows:
    """Return the rows of a part. Raises `UserError` at `place` for another file."""
    table = _parsed(data, place)
    try:
        lists = {name: table[name].combine_chunks() for name in CANDIDATE_COLUMNS}
        bounds = lists["candidate"].offsets.to_numpy().astype(np.int64)
        arrays = {name: _values(column.flatten()) for name, column in lists.items()}
        arrays |= {name: _values(table[name].combine_chunks()) for name in SAMPLE_COLUMNS}
        return CandidateRows.of(table["key"].to_pylist(), np.diff(bounds), **arrays)
    except (KeyError, ValueError, AttributeError) as error:
        raise UserError(place, f"is not a part of candidates: {error}", _FIX) from error


def plan_bytes(rows: PlanRows) -> bytes:
    """Return the file that a plan reads. It has a column of weights if some weight is not 1."""
    table = pa.table([rows.sample, rows.keep, rows.cluster], schema=_PLAN_SCHEMA)
    return _written(table.append_column(_WEIGHT, [rows.weight]) if (rows.weight != 1).any() else table)


def parse_plan(data: bytes, place: str) -> PlanRows:
    """Return the rows of a plan file. Raises `UserError` at `place` for another file."""
    table = _parsed(data, place)
    try:
        sample, keep, cluster = (_values(table[name].combine_chunks()) for name in _PLAN_SCHEMA.names)
        has_weights = _WEIGHT.name in table.column_names
        weight = _values(table[_WEIGHT.name].combine_chunks()) if has_weights else np.ones(len(table), np.float32)
        rows = PlanRows(sample, keep, cluster, weight)
    except KeyError as error:
        raise UserError(place, f"is not a plan file: {error}", _FIX) from error
    if (np.diff(rows.sample) <= 0).any():
        raise UserError(place, "its samples are not ascending", _FIX)
    if not ((rows.weight > 0) & (rows.weight <= 1)).all():
        raise UserError(place, "its weights are not all above 0 and at most 1", _FIX)
    return rows


def read_checked(store: Store, path: str, sha256: str) -> bytes:
    """Return a file that a manifest names. Raises `UserError` if it is missing or has another hash."""
    place = f"{store.url}/{path}"
    try:
        data = store.read(path)
    except FileNotFoundError as error:
        raise UserError(place, "is named in the manifest but missing", _FIX) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(place, "is not the file that the manifest names", _FIX)
    return data


def _column(values: npt.NDArray[Any], name: str) -> pa.Array:
    return pa.array(values, _TYPES[name], from_pandas=True)  # NaN becomes null


def _values(column: pa.Array) -> npt.NDArray[Any]:
    if pa.types.is_floating(column.type):
        return np.asarray(column.fill_null(np.nan).to_numpy(zero_copy_only=False))
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _written(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _parsed(data: bytes, place: str) -> pa.Table:
    """Read without Arrow's threads: starting them takes longer, and one that reads ahead runs Python code."""
    try:
        with pq.ParquetFile(io.BytesIO(data), pre_buffer=False) as file:
            return file.read(use_threads=False)
    except pa.ArrowException as error:
        raise UserError(place, f"cannot be read: {error}", _FIX) from error
