"""FAISS indices in memory: a byte (SQ8) or a bit (RaBitQ) a dimension, and fp32 vectors on the disk to score again.

{folder}/index.faiss    inverted lists, read into memory
         vectors.npy    fp32 vectors [N, D], memory-mapped: the best candidates are scored with them
         rows.arrow     the rows without their vectors, memory-mapped

A version of the vectors has a folder of its own, which is built as a whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import UserError
from pipelines.imports import import_extra
from pipelines.storage.store import Store
from rzen.evaluation.vectors import FloatArray, StoredArray, check_width
from rzen.index.filters import Condition, check_conditions, expression
from rzen.index.kinds import IndexKind
from rzen.index.parts import VECTOR, Parts, vectors_of
from rzen.index.types import IndexEntry, Row, distinct

if TYPE_CHECKING:  # models are loaded without pyarrow
    import pyarrow as pa

_FILES = _FAISS, _VECTORS, _ROWS = "index.faiss", "vectors.npy", "rows.arrow"
_FACTORY: dict[IndexKind, str] = {"faiss_sq8": "SQ8", "faiss_rabitq": "RaBitQ"}
# Share of the lists that a query reads: a recall of 0.98 on vectors with much noise (tests/benchmarks/index.md).
_PROBED = 2 / 5
_LEAST_PROBES = 16
_PER_LIST = 64  # vectors on which a list is trained, at most
_RESCORED = 200  # candidates of a query, at least; ten times k where that is more
_MORE = 4  # times the candidates and the lists, until k targets are found
_SCANNED_ROWS = 20_000  # so few rows that fulfill conditions are compared one by one


def build_resident(kind: IndexKind, parts: Parts, folder: Store) -> IndexEntry:
    """Build the files of an index in `folder`, unless they are there, and return its entry.

    Memory is that of the index and of the vectors that it is trained on. Raises `UserError` without FAISS.
    """
    entry: IndexEntry = {"kind": kind, "path": f"index/{folder.url.rpartition('/')[2]}"}
    faiss = import_faiss()
    if set(_FILES) <= set(folder.list()):
        return entry
    with tempfile.TemporaryDirectory(prefix="rzen-index-") as scratch:
        root = Path(scratch)
        vectors = _copy(parts, root)
        faiss.write_index(_trained(faiss, kind, vectors), str(root / _FAISS))
        for name in (_VECTORS, _ROWS, _FAISS):
            folder.upload(root / name, name)
    return entry


def _copy(parts: Parts, root: Path) -> StoredArray:
    """Write vectors and rows of all parts to files. Return the vectors, memory-mapped."""
    import pyarrow as pa

    first = parts.read(0)
    count = sum(len(table) for table in parts.read_all(["index"]))
    width = vectors_of(first).shape[1]
    vectors = np.lib.format.open_memmap(root / _VECTORS, mode="w+", dtype=np.float32, shape=(count, width))
    schema = first.drop_columns([VECTOR]).schema.remove_metadata()
    start = 0
    with pa.OSFile(str(root / _ROWS), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for table in parts.read_all():
            some = vectors_of(table)
            check_width(some, width, parts.place)
            vectors[start : start + len(some)] = some
            writer.write_table(table.drop_columns([VECTOR]).cast(schema))
            start += len(some)
    vectors.flush()
    return vectors


def _trained(faiss: ModuleType, kind: IndexKind, vectors: StoredArray) -> Any:
    count, width = vectors.shape
    num_lists = max(1, min(round(2 * count**0.5), count // 39))
    index = faiss.index_factory(width, f"IVF{num_lists},{_FACTORY[kind]}", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.cp.max_points_per_centroid = _PER_LIST
    wanted = min(count, _PER_LIST * num_lists)
    index.train(np.ascontiguousarray(vectors[np.linspace(0, count - 1, wanted, dtype=np.int64)]))
    for first in range(0, count, 1 << 16):
        index.add(np.ascontiguousarray(vectors[first : first + (1 << 16)]))
    return index


@dataclass
class ResidentIndex:
    """An index in memory, with rows and vectors on a local disk."""

    kind: IndexKind
    index: Any
    vectors: StoredArray
    rows: pa.Table
    place: str
    _chosen: tuple[tuple[Condition, ...], npt.NDArray[np.int64]] | None = field(default=None, repr=False)

    @classmethod
    def open(cls, kind: IndexKind, folder: Path, place: str) -> ResidentIndex:
        """Open the files of `build_resident` in a local folder. Raises `UserError` if they are damaged."""
        import pyarrow as pa

        faiss = import_faiss()
        try:
            index = faiss.read_index(str(folder / _FAISS))
            vectors = np.load(folder / _VECTORS, mmap_mode="r", allow_pickle=False)
            rows = pa.ipc.open_file(pa.memory_map(str(folder / _ROWS))).read_all()
        except (RuntimeError, OSError, ValueError, pa.ArrowException) as error:
            raise UserError(str(folder), f"cannot be read: {error}", "delete it, and run `rzen embed` again") from error
        return cls(kind, index, vectors, rows, place)

    def search(self, queries_QD: FloatArray, k: int, conditions: Sequence[Condition] = ()) -> list[list[Row]]:
        """Return the k best rows of each query, as `CorpusIndex` says. Candidates are scored with the fp32 vectors."""
        check_width(self.vectors, queries_QD.shape[1], self.place)
        wanted = check_conditions(conditions, self.rows.schema, self.place)
        queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
        if not wanted:
            return self._search(queries_QD, k, None)
        if self._chosen is None or self._chosen[0] != wanted:
            self._chosen = wanted, self._rows_of(wanted)
        rows_N = self._chosen[1]
        if len(rows_N) <= _SCANNED_ROWS:
            return [self._scored(query_D, rows_N, k) for query_D in queries_QD]
        return self._search(queries_QD, k, rows_N)

    def _search(self, queries_QD: FloatArray, k: int, rows_N: npt.NDArray[np.int64] | None) -> list[list[Row]]:
        num_rows = len(self.rows) if rows_N is None else len(rows_N)
        found: list[list[Row]] = [[] for _ in queries_QD]
        open_Q, count, probes = np.arange(len(queries_QD)), max(_RESCORED, 10 * k), self._probes()
        while len(open_Q):
            parameters = self._parameters(probes, rows_N)
            _, best_QR = self.index.search(queries_QD[open_Q], min(count, num_rows), params=parameters)
            for query, best_R in zip(open_Q, best_QR, strict=True):
                found[query] = self._scored(queries_QD[query], best_R[best_R >= 0], k)
            if count >= num_rows and probes >= self.index.nlist:
                break
            # Duplicates of a target may take all places, and few rows of these lists may fulfill the conditions.
            open_Q = np.array([query for query in open_Q if len(found[query]) < k], dtype=np.int64)
            count, probes = count * _MORE, probes * _MORE
        return found

    def _scored(self, query_D: FloatArray, rows_R: npt.NDArray[np.int64], k: int) -> list[Row]:
        """Return the k best of some rows by their cosine in fp32, each target once."""
        rows_R = np.sort(rows_R)
        scores_R = self.vectors[rows_R] @ query_D
        order_R = np.argsort(-scores_R, kind="stable")
        count = 2 * k
        while True:
            top = order_R[:count]
            described = self.rows.take(rows_R[top]).to_pylist()
            found = distinct(
                [row | {"score": float(score)} for row, score in zip(described, scores_R[top], strict=True)], k
            )
            if len(found) == k or count >= len(order_R):
                return found
            count *= _MORE

    def _rows_of(self, conditions: tuple[Condition, ...]) -> npt.NDArray[np.int64]:
        import pyarrow as pa

        columns = list(dict.fromkeys(one.column for one in conditions))
        table = self.rows.select(columns).append_column("_row", pa.array(np.arange(len(self.rows))))
        found: npt.NDArray[np.int64] = table.filter(expression(conditions))["_row"].to_numpy()
        return found

    def _probes(self) -> int:
        return max(_LEAST_PROBES, round(_PROBED * int(self.index.nlist)))

    def _parameters(self, probes: int, rows_N: npt.NDArray[np.int64] | None) -> Any:
        faiss = import_faiss()
        make = faiss.IVFRaBitQSearchParameters if self.kind == "faiss_rabitq" else faiss.SearchParametersIVF
        probes = min(self.index.nlist, probes)
        if rows_N is None:
            return make(nprobe=probes)
        mask = np.zeros(len(self.rows), dtype=bool)
        mask[rows_N] = True
        return make(nprobe=probes, sel=faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little")))


def import_faiss() -> Any:
    """Return FAISS. Raises `UserError` if it is not installed."""
    return import_extra("faiss", "index", "index: faiss")
