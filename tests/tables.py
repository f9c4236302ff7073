"""Tables and media for tests of sources: pictures as bytes, and rows in every format."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.samples import RawSample, Rejected
from pipelines.sources.table import TableReader, open_table
from pipelines.sources.table_config import TableSource

Rows = Sequence[Mapping[str, Any]]


@cache
def picture(number: int = 0, form: str = "PNG") -> bytes:
    """A small picture that differs from every other."""
    pixels = np.random.default_rng(number).integers(0, 255, (8, 12, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, form)
    return sink.getvalue()


def write_pictures(folder: Path, *names: str) -> Path:
    """Write a picture of its own for each name, a JPEG whatever the extension."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number, "JPEG"))
    return folder


def write_table(path: Path, rows: Rows, **options: Any) -> str:
    """Write rows in the format that the extension names. Return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(list(rows)), path, **options)
        case ".arrow":  # as `save_to_disk` writes it: a stream
            table = pa.Table.from_pylist(list(rows))
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table, **options)
        case ".feather":
            table = pa.Table.from_pylist(list(rows))
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table, **options)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case _:
            with path.open("w", newline="") as file:
                delimiter = "\t" if path.suffix == ".tsv" else ","
                writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
                writer.writeheader()
                writer.writerows(rows)
    return str(path)


def opened(table: Any, name: str = "mine", **settings: Any) -> TableReader:
    """Open a table with settings as a spec has them."""
    options = {key: settings.pop(key) for key in ("seed", "endpoint", "follow_links") if key in settings}
    return open_table(name, TableSource.model_validate({"table": table, **settings}), **options)


def read(table: Any, **settings: Any) -> tuple[list[RawSample], list[tuple[str, str]]]:
    """Samples, and (origin, reason) of all rows that gave none."""
    return split(opened(table, **settings).read_all())


def split(items: Iterator[RawSample | Rejected]) -> tuple[list[RawSample], list[tuple[str, str]]]:
    """Samples, and (origin, reason) of the others."""
    found = list(items)
    samples = [item for item in found if isinstance(item, RawSample)]
    return samples, [(item.origin, item.reason) for item in found if isinstance(item, Rejected)]
