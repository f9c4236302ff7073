"""Candidates of any number, read from their file whenever they are asked for."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.benchmarks.files import Line, read_lines
from pipelines.errors import UserError
from pipelines.items.types import Item

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Corpus:
    """The candidates of a file of JSON lines; `key` is the field of their names. Pickles if `make` does."""

    path: Path
    key: str
    make: Callable[[Line], Item]

    def __iter__(self) -> Iterator[Item]:
        return map(self.make, read_lines(self.path, (self.key,)))

    def pick(self, places: Collection[int]) -> dict[int, Item]:
        """The candidates at these places, without making the others."""
        lines = enumerate(read_lines(self.path, (self.key,)))
        return {place: self.make(line) for place, line in lines if place in places}

    def find(self, names: Collection[str]) -> Iterator[tuple[str, Item]]:
        """Yield those of `names` that exist. At the end, raises `UserError` where any candidate is there twice."""
        hashes = array("q")  # of all names: the names of ten million candidates are a gigabyte
        for line in read_lines(self.path, (self.key,)):
            name = str(line[self.key])
            hashes.append(hash(name))
            if name in names:
                yield name, self.make(line)
        self._check_twice(np.array(hashes))

    def ids(self, names: Collection[str]) -> dict[str, str]:
        """Name -> id, of those of `names` that exist. Raises `UserError` where any candidate is there twice."""
        return {name: item.id for name, item in self.find(names)}

    def _check_twice(self, hashes: IntArray) -> None:
        values, counts = np.unique(hashes, return_counts=True)
        suspects = set(values[counts > 1].tolist())
        seen = set[str]()
        for line in read_lines(self.path, (self.key,)) if suspects else ():
            name = str(line[self.key])
            if hash(name) in suspects:
                if name in seen:
                    raise UserError(f"{self.path} {name}", "is there twice", "give each candidate a name of its own")
                seen.add(name)
