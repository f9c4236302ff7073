"""Files of a dataset or table read one after the other, a few of them ahead of who takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
Read = TypeVar("Read")


def read_ahead(read: Callable[[T], Read], wanted: Sequence[T], num_threads: int) -> Iterator[Read]:
    """Yield what `read` returns for each of `wanted`, in order, by threads.

    At most `num_threads` results are in memory, because the next ones are read when those have been taken.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, len(wanted), num_threads):
            yield from pool.map(read, wanted[start : start + num_threads])
