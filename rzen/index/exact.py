"""Exact search: every query is compared with every vector. Small corpora stay in memory, others are read in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rzen.evaluation.vectors import FloatArray, StoredArray, check_width
from rzen.index.filters import Condition, check_conditions, expression
from rzen.index.kinds import IndexKind
from rzen.index.parts import VECTOR, Parts, vectors_of
from rzen.index.types import KEY, Row

if TYPE_CHECKING:  # models are loaded without pyarrow
    import pyarrow as pa

MEMORY_BYTES = 2 << 30
"""Bytes of vectors and rows that stay in memory from one search to the next."""
_BLOCK_ROWS = 32_768
_Kept = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Block:
    rows: pa.Table
    vectors: StoredArray


@dataclass
class ExactIndex:
    """All vectors of a version. Memory is bounded: at most `memory_bytes` are kept, and blocks of 32,768 rows read."""

    parts: Parts
    memory_bytes: int = MEMORY_BYTES
    _kept: list[_Block] | None = field(default=None, repr=False)
    _chosen: tuple[tuple[Condition, ...], _Kept] | None = field(default=None, repr=False)

    @property
    def kind(self) -> IndexKind:
        """Return `exact`."""
        return "exact"

    def search(self, queries_QD: FloatArray, k: int, conditions: Sequence[Condition] = ()) -> list[list[Row]]:
        """Return the k best rows of each query, as `CorpusIndex` says. Equal scores come in the order of the rows."""
        kept = self.chosen(conditions)
        best: list[list[Row]] = [[] for _ in queries_QD]
        start = 0
        for block in self._blocks():
            rows = np.flatnonzero(kept[start : start + len(block.vectors)])
            start += len(block.vectors)
            if not len(rows):
                continue
            check_width(block.vectors, queries_QD.shape[1], self.parts.place)
            vectors = block.vectors if len(rows) == len(block.vectors) else block.vectors[rows]
            scores_QN = queries_QD @ vectors.T
            for number, scores_N in enumerate(scores_QN):
                best[number] = _merged(best[number], block, rows, scores_N, k)
        return best

    def best_of(
        self, query_D: FloatArray, wanted: Sequence[Condition], conditions: Sequence[Condition] = ()
    ) -> tuple[int, Row] | None:
        """Return the best row that fulfills `wanted` too, and its rank among those that fulfill `conditions`.

        None if no row does. Equal scores share the first of their ranks.
        """
        kept = self.chosen(conditions)
        both = check_conditions((*conditions, *wanted), self.parts.schema(), self.parts.place)
        found, num_rows = self._fulfilling(both)
        asked = _mask(found["row"].to_numpy(), num_rows)
        above: list[FloatArray] = []
        best: list[Row] = []
        start = 0
        for block in self._blocks():
            here = slice(start, start + len(block.vectors))
            start += len(block.vectors)
            check_width(block.vectors, len(query_D), self.parts.place)
            # Every comparison is of scores of one product. Another one has other last bits.
            scores_N = (query_D[None] @ block.vectors.T)[0]
            above.append(scores_N[kept[here]])
            if len(rows := np.flatnonzero(asked[here])):
                best = _merged(best, block, rows, scores_N[rows], 1)
        if not best:
            return None
        return 1 + int(sum((scores_N > best[0]["score"]).sum() for scores_N in above)), best[0]

    def chosen(self, conditions: Sequence[Condition] = ()) -> _Kept:
        """Return which rows may be found: those that fulfill the conditions, of equal targets the first."""
        wanted = check_conditions(conditions, self.parts.schema(), self.parts.place)
        if self._chosen is None or self._chosen[0] != wanted:
            self._chosen = wanted, self._choose(wanted)
        return self._chosen[1]

    def _choose(self, conditions: tuple[Condition, ...]) -> _Kept:
        found, num_rows = self._fulfilling(conditions)
        _, first = np.unique(found[KEY].to_numpy(zero_copy_only=False), return_index=True)
        return _mask(found["row"].to_numpy()[first], num_rows)

    def _fulfilling(self, conditions: tuple[Condition, ...]) -> tuple[pa.Table, int]:
        """Return key and number (`row`) of the rows that fulfill checked conditions, and the number of all rows."""
        import pyarrow as pa

        columns = list(dict.fromkeys([KEY, *(one.column for one in conditions)]))
        held = [block.rows.select(columns) for block in self._kept] if self._kept else self.parts.read_all(columns)
        tables = list(held)
        table = pa.concat_tables(tables).append_column("row", pa.array(np.arange(sum(map(len, tables)))))
        where = expression(conditions)
        return (table if where is None else table.filter(where)), len(table)

    def _blocks(self) -> Iterator[_Block]:
        """Yield all rows in order, from memory if they fit."""
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[_Block] | None = []
        num_bytes = 0
        for block in self._read_blocks():
            num_bytes += block.vectors.nbytes + block.rows.nbytes
            kept = None if kept is None or num_bytes > self.memory_bytes else [*kept, block]
            yield block
        self._kept = kept

    def _read_blocks(self) -> Iterator[_Block]:
        waiting: list[pa.Table] = []
        for table in self.parts.read_all():
            waiting.append(table)
            if sum(map(len, waiting)) >= _BLOCK_ROWS:
                yield _block(waiting)
                waiting = []
        if waiting:
            yield _block(waiting)


def _mask(rows: npt.NDArray[np.int64], num_rows: int) -> _Kept:
    found = np.zeros(num_rows, dtype=bool)
    found[rows] = True
    return found


def _block(tables: list[pa.Table]) -> _Block:
    import pyarrow as pa

    table = pa.concat_tables(tables, promote_options="default")
    return _Block(table.drop_columns([VECTOR]), vectors_of(table))


def _merged(best: list[Row], block: _Block, rows: npt.NDArray[np.int64], scores_N: FloatArray, k: int) -> list[Row]:
    """Return the k best of those so far and of a block, whose rows come later in the corpus."""
    if len(best) == k and scores_N.max() <= best[-1]["score"]:
        return best
    count = min(k, len(scores_N))
    lowest = np.partition(scores_N, -count)[-count]
    above = np.flatnonzero(scores_N >= lowest)
    top = above[np.argsort(-scores_N[above], kind="stable")[:k]]
    found = block.rows.take(rows[top]).to_pylist()
    new = [row | {"score": float(score)} for row, score in zip(found, scores_N[top], strict=True)]
    return sorted([*best, *new], key=lambda row: -row["score"])[:k]
