"""All pairs of 64-bit hashes that differ in few bits, without comparing all of them.

Multi-index hashing (Norouzi et al., arXiv 1307.2982) cuts a hash into four parts of 16 bits. If two hashes differ in 10
bits, one part differs in at most two. So only hashes with a similar part are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
_PARTS, _PART_BITS = 4, 16
_CHUNK_PAIRS = 1 << 22  # 64 MB of places


def near_pairs(hashes_N: Hashes, max_bits: int) -> Iterator[tuple[Ints, Ints]]:
    """Yield each pair (i, j), i < j, of hashes that differ in at most `max_bits` bits, in chunks. No pair comes twice.

    About 548 * N^2 / 65536 pairs of random hashes are compared for 8 to 11 bits.
    """
    for left, right in _matches(hashes_N, hashes_N, max_bits):
        keep = left < right
        if keep.any():
            yield left[keep], right[keep]


def near_matches(hashes_N: Hashes, others_M: Hashes, max_bits: int) -> Iterator[tuple[Ints, Ints]]:
    """Yield each pair (n, m) of a hash and another one that differ in at most `max_bits` bits, in chunks, once."""
    yield from _matches(hashes_N, others_M, max_bits)


def _matches(hashes_N: Hashes, others_M: Hashes, max_bits: int) -> Iterator[tuple[Ints, Ints]]:
    parts_N, parts_M = _parts(hashes_N), _parts(others_M)
    most = max_bits // _PARTS
    masks = [_mask(bits) for number in range(most + 1) for bits in combinations(range(_PART_BITS), number)]
    for part in range(_PARTS):
        order_M = np.argsort(parts_M[part], kind="stable")
        bounds = np.searchsorted(parts_M[part][order_M], np.arange((1 << _PART_BITS) + 1))
        for mask in masks:
            wanted_N = parts_N[part] ^ mask
            for left, place in _joined(bounds[wanted_N], bounds[wanted_N + 1]):
                right = order_M[place]
                near = np.bitwise_count(hashes_N[left] ^ others_M[right]) <= max_bits
                left, right = left[near], right[near]
                # An earlier part that is as close has given the pair already.
                for earlier in range(part):
                    apart = np.bitwise_count(parts_N[earlier][left] ^ parts_M[earlier][right]) > most
                    left, right = left[apart], right[apart]
                if left.size:
                    yield left, right


def _parts(hashes_N: Hashes) -> list[Ints]:
    last = np.uint64((1 << _PART_BITS) - 1)
    return [(hashes_N >> np.uint64(_PART_BITS * part) & last).astype(np.int64) for part in range(_PARTS)]


def _mask(bits: tuple[int, ...]) -> int:
    return sum(1 << bit for bit in bits)


def _joined(start_N: Ints, stop_N: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Yield each n with every place from `start_N[n]` to `stop_N[n]`, in chunks of limited size."""
    counts_N = stop_N - start_N
    ends_N = np.cumsum(counts_N)
    first, num_rows = 0, len(counts_N)
    while first < num_rows:
        before = ends_N[first - 1] if first else 0
        last = int(np.searchsorted(ends_N, before + _CHUNK_PAIRS, side="right"))
        last = max(last, first + 1)
        counts = counts_N[first:last]
        left = np.repeat(np.arange(first, last), counts)
        offsets = np.arange(left.size) - np.repeat(np.cumsum(counts) - counts, counts)
        yield left, start_N[left] + offsets
        first = last
