"""Candidates of any number, read from their file whenever they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.benchmarks.files import Line, read_lines
from pipelines.errors import UserError
from pipelines.items.types import Item


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

    def ids(self, names: Collection[str]) -> dict[str, str]:
        """Name -> id, of those of `names` that exist. Raises `UserError` where one of them is there twice."""
        found: dict[str, str] = {}
        for line in read_lines(self.path, (self.key,)):
            name = str(line[self.key])
            if name in names:
                if name in found:
                    raise UserError(f"{self.path} {name}", "is there twice", "give each candidate a name of its own")
                found[name] = self.make(line).id
        return found
