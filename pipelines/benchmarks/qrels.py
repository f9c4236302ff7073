"""Grades of pairs of a query and a candidate, checked line by line. Lines that are not used are counted for `notes`.

A grade is a number up to 1023, because the exponential gain is 2^grade. Grades of 0 or less are not relevant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.benchmarks.types import MAX_GRADE
from pipelines.errors import UserError


@dataclass
class Qrels:
    """Query -> candidate -> grade, as lines name them. With `higher_counts`, a pair may have two grades."""

    higher_counts: bool = False
    num_repeated: int = 0
    """Lines that give a pair the grade that it has already."""
    num_contradictory: int = 0
    """Lines that give a pair another grade."""
    num_not_relevant: int = 0
    """Pairs with a grade of 0 or less."""
    _graded: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, place: str, query: str, candidate: str, grade: object) -> None:
        """Take one line. Raises `UserError` for a grade that is no number up to 1023, and for a contradiction."""
        value = parse_grade(place, grade)
        mine = self._graded.setdefault(query, {})
        earlier = mine.get(candidate)
        if earlier is None:
            mine[candidate] = value
        elif earlier == value:
            self.num_repeated += 1
        elif self.higher_counts:
            self.num_contradictory += 1
            mine[candidate] = max(earlier, value)
        else:
            problem = f"grades {candidate!r} for {query!r} twice, as {earlier:g} and as {value:g}"
            raise UserError(place, problem, "keep one of them")

    def __len__(self) -> int:
        return sum(map(len, self._graded.values()))

    def relevant(self) -> dict[str, dict[str, float]]:
        """Return the grades above 0, without queries that have none. Counts the others."""
        found = {
            query: {candidate: grade for candidate, grade in mine.items() if grade > 0}
            for query, mine in self._graded.items()
        }
        self.num_not_relevant = len(self) - sum(map(len, found.values()))
        return {query: mine for query, mine in found.items() if mine}

    def notes(self) -> list[str]:
        """Describe what was not used, after `relevant`."""
        told = {
            "grades are 0 or less: not relevant": self.num_not_relevant,
            "lines repeat an earlier grade": self.num_repeated,
            "lines give a pair a second grade: the higher counts": self.num_contradictory,
        }
        return [f"{count} {what}" for what, count in told.items() if count]


def parse_grade(place: str, grade: object) -> float:
    """Return a grade as a number. Raises `UserError` for text, nan, infinity, and a number above 1023."""
    try:
        value = float(grade)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value) or isinstance(grade, bool):
        raise UserError(place, f"has the grade {grade!r}", "write a finite number")
    if value > MAX_GRADE:
        raise UserError(place, f"has the grade {value:g}, above {MAX_GRADE}", "write smaller numbers, such as 0 to 4")
    return value


def read_qrels(path: Path) -> Qrels:
    """Read query, candidate, grade (a header is skipped) or TREC's four fields, by tabs or spaces.

    Raises `UserError` for a missing file, other lines, and a file without grades.
    """
    found = Qrels()
    for number, line in _lines(path):
        fields = line.split("\t") if "\t" in line else line.split()
        if number == 1 and not _is_number(fields[-1]):
            continue
        if len(fields) not in (3, 4) or not _is_number(fields[-1]):
            raise UserError(f"{path}:{number}", "is not: query, candidate, grade", "separate them by tabs")
        found.add(f"{path}:{number}", fields[0], fields[-2], fields[-1])
    if not len(found):
        raise UserError(str(path), "has no grades", "write lines of query, candidate, grade")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise UserError(str(path), problem or "cannot be read", "write: query, candidate, grade") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, line.rstrip("\r")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
