"""Units: the parts of tables that tasks read. Listing them is cheap, and reading one needs nothing but the unit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple, dataclass

from pipelines.sources.table_files import TableFile

VERSION = 1
"""Raised when the same unit and settings give other samples, so that results of earlier versions are not reused."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table, and the type of its values for people."""

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class Unit:
    """A row group or record batch `part`, the lines that begin in the bytes `start` .. `end`, or a whole file.

    `first_row` counts the rows of the file before it, where that is known.
    """

    file: TableFile
    part: int = 0
    first_row: int = 0
    num_rows: int | None = None
    start: int = 0
    end: int | None = None
    num_bytes: int = 0

    def id(self, settings: str) -> str:
        """Return 32 hex digits that change with the content of the table, the part, and the settings of the source."""
        content = json.dumps([VERSION, astuple(self), settings])
        return hashlib.sha256(content.encode()).hexdigest()[:32]
