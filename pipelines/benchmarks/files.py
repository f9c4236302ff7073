"""Rows of parquet and of JSON lines, as datasets are published: found, complete, with the columns that are needed."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import UserError
from pipelines.stored_json import parse_json, read_json
from pipelines.texts import MAX_TEXT_BYTES, bounded_lines

Line = dict[str, Any]
_PART = re.compile(r"-(\d+)-of-(\d+)\.parquet$")


def find_parts(folder: Path, split: str, subset: str = "", fetch: str = "") -> list[Path]:
    """The files of a split: `{split}-00000-of-00003.parquet` and so on, or `{split}.parquet`, `.jsonl`, `.json`.

    Looked for in `folder/{subset}`, `folder/{subset}/data`, `folder` and `folder/data`, in this order. Raises
    `UserError` where there are none, and where parts are missing: a corpus with a part missing is an easier one.
    """
    places = [*([folder / subset, folder / subset / "data"] if subset else []), folder, folder / "data"]
    for place in places:
        parts = sorted(place.glob(f"{split}-*-of-*.parquet"))
        if parts:
            match = _PART.search(parts[0].name)
            if match and len(parts) != int(match[2]):
                raise UserError(str(place), f"has {len(parts)} of {int(match[2])} parts of {split}", fetch)
            return parts
        for suffix in ("parquet", "jsonl", "json"):
            if (place / f"{split}.{suffix}").is_file():
                return [place / f"{split}.{suffix}"]
    raise UserError(str(places[0]), f"has no {split}-*.parquet or {split}.jsonl", fetch)


def read_parts(parts: Sequence[Path], columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Line]:
    """Their rows in order, with these columns and those of `optional` that exist. Raises `UserError` for others."""
    for part in parts:
        if part.suffix == ".parquet":
            yield from _parquet(part, columns, optional)
        else:
            yield from read_lines(part, columns)


def _parquet(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Line]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_columns(str(path), columns, names)
            wanted = [*columns, *(name for name in optional if name in names)]
            for batch in file.iter_batches(batch_size=64, columns=wanted):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(str(path), f"cannot be read: {error}", "fetch it again") from error


def read_lines(path: Path, columns: Sequence[str] = ()) -> Iterator[Line]:
    """Objects of a file of JSON lines, or of a JSON list. Raises `UserError` for a missing file and for a bad line."""
    try:
        if path.suffix == ".json":
            for number, line in enumerate(read_json(path, list[dict[str, Any]], "repair the file"), start=1):
                _check_columns(f"{path}:{number}", columns, line)
                yield line
            return
        with path.open("rb") as lines:
            for number, data in enumerate(bounded_lines(lines), start=1):
                if data is None:
                    raise UserError(f"{path}:{number}", f"is longer than {MAX_TEXT_BYTES} bytes", "repair the line")
                if data.strip():
                    text = data.removeprefix(codecs.BOM_UTF8) if number == 1 else data
                    line = parse_json(text, f"{path}:{number}", dict[str, Any], "repair the line")
                    _check_columns(f"{path}:{number}", columns, line)
                    yield line
    except FileNotFoundError as error:
        raise UserError(str(path), "does not exist", "fetch it, or name another") from error
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"cannot be read: {error}", "repair the file") from error


def _check_columns(place: str, columns: Sequence[str], names: Sequence[str] | Line) -> None:
    if missing := [name for name in columns if name not in names]:
        have = ", ".join(names)
        raise UserError(place, f"has no {', '.join(missing)}, but {have}", "fetch the version that the table names")
