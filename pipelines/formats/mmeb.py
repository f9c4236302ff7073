"""MMEB's layout: Parquet with texts and paths of pictures, and zips of the pictures.

`<|image_1|>` is put before the text of an input with an image. With more than one negative, texts and paths of
negatives are written as Python lists, as mmE5 has them. Further columns hold what MMEB lacks: instructions, relevance.
Instructions in several wordings are lists.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.formats.format import Samples, constants, folders_of, several_media
from pipelines.formats.shape import SourceShape, extension
from pipelines.samples import Input, Members

IMAGES = "images"
"""Folder of the zips, and the first part of all paths of media."""
_MARK = "<|image_1|>"
_TEXTS = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
_FURTHER = (("target_instruction", pa.string()), ("relevance", pa.float64()))
_ROWS_PER_GROUP = 1000


class Mmeb:
    """Tables of MMEB and mmE5, with the files of media in zips of the same place."""

    reader = "ingest"

    def problem(self, shape: SourceShape) -> tuple[str, str] | None:
        """Return why the table cannot hold such samples: there is one path for each input."""
        return several_media(shape)

    def write(self, folder: Path, place: str, samples: Samples, shape: SourceShape) -> list[str]:
        """Write a table, and a zip if there are media. Paths in the table are those in the zip."""
        table, archive = f"{place}.parquet", f"{IMAGES}/{place}.zip"
        for path in (table, archive):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
        schema = _schema(shape)
        with (
            zipfile.ZipFile(folder / archive, "w", zipfile.ZIP_STORED, strict_timestamps=False) as images,
            pq.ParquetWriter(folder / table, schema) as writer,
        ):
            rows: list[dict[str, Any]] = []
            for row in _rows(place, samples, shape, images):
                rows.append(row)
                if len(rows) == _ROWS_PER_GROUP:
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                    rows = []
            writer.write_table(pa.Table.from_pylist(rows, schema))
            num_images = len(images.namelist())
        if num_images:
            return [table, archive]
        (folder / archive).unlink()
        return [table]

    def settings(self, root: str, task: str, shape: SourceShape, files: list[str]) -> dict[str, Any]:
        """Return the settings for `rzen ingest`."""
        tables = [path for path in files if path.endswith(".parquet")]
        archives = [f"{root}/{path}" for path in files if path.endswith(".zip")]
        found: dict[str, Any] = {"table": folders_of(root, tables)}
        found |= {"preset": "mme5" if shape.max_negatives > 1 else "mmeb", "task": task}
        if archives:
            found["media_root"] = archives
        for name in ("instruction", "target_instruction"):
            found[name] = constants(shape).get(name, {"column": f"{name}?"})
        if shape.num_graded:
            found["relevance"] = "relevance"
        return found


def _schema(shape: SourceShape) -> pa.Schema:
    instruction = pa.list_(pa.string()) if shape.has_variants else pa.string()
    return pa.schema([*((name, pa.string()) for name in _TEXTS), ("instruction", instruction), *_FURTHER])


def _rows(place: str, samples: Samples, shape: SourceShape, images: zipfile.ZipFile) -> Iterator[dict[str, Any]]:
    for number, (sample, members) in enumerate(samples):

        def parts(given: Input, name: str, number: int = number, members: Members = members) -> tuple[str, str]:
            """Return text and path, and add the file to the archive."""
            if not given.media:
                return given.text, ""
            (medium,) = given.media
            path = f"{IMAGES}/{place}/{number:06d}-{name}.{extension(medium.member)}"
            images.writestr(zipfile.ZipInfo(path), members[medium.member])
            mark = f"{_MARK}\n" if medium.kind == "image" else ""
            return f"{mark}{given.text}", path

        query, positive = parts(sample.query, "query"), parts(sample.positive, "positive")
        negatives = [parts(given, f"negative{n}") for n, given in enumerate(sample.negatives)]
        if shape.max_negatives > 1:
            texts, paths = (repr([pair[part] for pair in negatives]) for part in (0, 1))
        else:
            texts, paths = negatives[0] if negatives else ("", "")
        yield {
            **dict(zip(_TEXTS, (*query, *positive, texts, paths), strict=True)),
            "instruction": list(sample.instructions) if shape.has_variants else sample.instruction,
            "target_instruction": sample.target_instruction,
            "relevance": sample.relevance,
        }
