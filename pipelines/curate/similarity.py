"""Whether two inputs show or say the same: checked for proposed pairs, from their features."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipelines.curate.hamming import Ints
from pipelines.curate.pictures import grid_distances
from pipelines.curate.settings import MediaSimilarity, TextSimilarity
from pipelines.curate.tables import Bools, MediaTable, TextTable
from pipelines.curate.texts import jaccard, pieces

_PAGE = b"d"
_CHUNK_FRAMES = 1 << 15  # 100 MB of differences
_DOUBT = 0.25  # five standard errors of a share that is estimated from 120 values
_CHUNK_PAIRS = 1 << 16


def media_similar(
    one: MediaTable,
    places: Ints,
    other: MediaTable,
    other_places: Ints,
    rule: MediaSimilarity,
    *,
    any_kind: bool = False,
) -> Bools:
    """Return which of P pairs of inputs show the same media in the same order.

    Inputs without media are similar. Frames of videos are compared one by one, and the means count. With `any_kind`,
    a page and an image may be similar.
    """
    frames = one.num_frames[places]
    similar = frames == other.num_frames[other_places]
    kinds, other_kinds = one.kinds[places], other.kinds[other_places]
    if not any_kind:
        similar &= kinds == other_kinds
    else:
        similar &= (kinds == other_kinds) | (frames == 1)
    pages = _has_page(kinds) | _has_page(other_kinds)
    for count in np.unique(frames[similar]):
        if count == 0:
            continue
        mine = np.flatnonzero(similar & (frames == count))
        for start in range(0, len(mine), max(1, _CHUNK_FRAMES // int(count))):
            some = mine[start : start + max(1, _CHUNK_FRAMES // int(count))]
            left = one.bounds[places[some], None] + np.arange(count)
            right = other.bounds[other_places[some], None] + np.arange(count)
            similar[some] = _frames_similar(one, left, other, right, pages[some], rule)
    return np.asarray(similar)


def _frames_similar(
    one: MediaTable, left_PT: Ints, other: MediaTable, right_PT: Ints, pages_P: Bools, rule: MediaSimilarity
) -> Bools:
    shape = left_PT.shape
    bits = np.bitwise_count(one.hashes[left_PT] ^ other.hashes[right_PT]).mean(axis=1)
    mean, cell = grid_distances(one.grids[left_PT.ravel()], other.grids[right_PT.ravel()])
    mean, cell = mean.reshape(shape).mean(axis=1), cell.reshape(shape).mean(axis=1)
    as_page = (mean <= rule.page_color) & (cell <= rule.page_cell)
    found: Bools = (bits <= rule.hash_bits) & np.where(pages_P, as_page, mean <= rule.color)
    return found


def _has_page(kinds: npt.NDArray[np.bytes_]) -> Bools:
    return np.asarray(np.strings.find(kinds, _PAGE) >= 0)


class TextComparer:
    """Compares texts of one table. Pieces of recent texts are kept."""

    def __init__(self, table: TextTable, rule: TextSimilarity) -> None:
        self._table, self._rule = table, rule
        self._pieces = lru_cache(1 << 14)(self._pieces_of)

    def similar(self, places: Ints, others: Ints) -> Bools:
        """Return which of P pairs of texts have enough pieces in common. Two empty texts are similar."""
        similar = self.plausible(places, others)
        for pair in np.flatnonzero(similar):
            one, other = self._pieces(int(places[pair])), self._pieces(int(others[pair]))
            similar[pair] = jaccard(one, other) >= self._rule.jaccard
        return similar

    def plausible(self, places: Ints, others: Ints) -> Bools:
        """Return which pairs may be similar, by the share of equal MinHash values."""
        found = np.empty(len(places), np.bool_)
        for start in range(0, len(places), _CHUNK_PAIRS):
            some = slice(start, start + _CHUNK_PAIRS)
            shares = (self._table.min_hash[places[some]] == self._table.min_hash[others[some]]).mean(axis=1)
            found[some] = shares >= self._rule.jaccard - _DOUBT
        return found

    def _pieces_of(self, place: int) -> set[str]:
        return pieces(self._table.texts[place].as_py())
