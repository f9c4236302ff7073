"""Parquet as sentence-transformers trains on it: anchor, positive, negative_1, ..., or sentence1, sentence2, score.

A column holds texts, or media as `{bytes, path}`, or both as `{text, image}`. Metadata for the library `datasets` say
which ones are images and videos. There are no other columns, because sentence-transformers would take them for inputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.formats.format import Samples, constants, folders_of, partly_graded
from pipelines.formats.shape import InputShape, SourceShape
from pipelines.samples import Input, Media, MediaKind, Members, Sample

_FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_FEATURES: dict[MediaKind, str] = {"image": "Image", "video": "Video", "document": "Pdf"}
_GROUP_BYTES = 64 << 20
_SCORE = "score"


class SentenceTransformers:
    """Tables whose columns are the inputs of a loss of sentence-transformers, in its order."""

    reader = "ingest"

    def problem(self, shape: SourceShape) -> tuple[str, str] | None:
        """Return why the table cannot hold such samples: it has no column for what differs from row to row."""
        if len(constants(shape)) < 2:
            return "has several instructions, and the table has no column for them", "use the format mmeb"
        if found := partly_graded(shape):
            return found
        if shape.with_fewer_negatives:
            problem = "has samples with fewer negatives than others, which sentence-transformers refuses"
            return problem, "use the format mmeb"
        return None

    def write(self, folder: Path, place: str, samples: Samples, shape: SourceShape) -> list[str]:
        """Write a table, in row groups of about 64 MB."""
        path = f"{place}.parquet"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        schema = _schema(shape)
        with pq.ParquetWriter(folder / path, schema) as writer:
            for rows in _groups(samples, shape):
                writer.write_table(pa.Table.from_pylist(rows, schema))
        return [path]

    def settings(self, root: str, task: str, shape: SourceShape, files: list[str]) -> dict[str, Any]:
        """Return the settings for `rzen ingest`."""
        names = _names(shape)
        found: dict[str, Any] = {"table": folders_of(root, files), "task": task, **constants(shape)}
        sides = [_selectors(name, given) for name, given in names.items()]
        found["query"], found["positive"], *negatives = sides
        if negatives:
            found["negatives"] = negatives
        if shape.num_graded:
            found["relevance"] = _SCORE
        return found


def _names(shape: SourceShape) -> dict[str, InputShape]:
    """Return the columns of inputs, in order."""
    if shape.num_graded:
        return {"sentence1": shape.query, "sentence2": shape.positive}
    negatives = {f"negative_{number}": shape.negatives for number in range(1, shape.max_negatives + 1)}
    return {"anchor": shape.query, "positive": shape.positive, **negatives}


def _files(given: InputShape) -> pa.DataType:
    return _FILE if given.max_media == 1 else pa.list_(_FILE)


def _medium(given: InputShape) -> str:
    """Return the field of media next to a text: sentence-transformers knows image and video."""
    return next(iter(given.kinds)) if len(given.kinds) == 1 else "media"


def _type(given: InputShape) -> pa.DataType:
    if not given.with_media:
        return pa.string()
    return pa.struct([("text", pa.string()), (_medium(given), _files(given))]) if given.with_text else _files(given)


def _feature(given: InputShape) -> Any:
    """Return the feature of `datasets` for a column."""
    text = {"dtype": "string", "_type": "Value"}
    if not given.with_media:
        return text
    if len(given.kinds) > 1:
        media: Any = {"bytes": {"dtype": "binary", "_type": "Value"}, "path": text}
    else:
        media = {"_type": _FEATURES[next(iter(given.kinds))]}
    if given.max_media > 1:
        media = {"feature": media, "_type": "List"}
    return {"text": text, _medium(given): media} if given.with_text else media


def _schema(shape: SourceShape) -> pa.Schema:
    names = _names(shape)
    columns = [(name, _type(given)) for name, given in names.items()]
    features = {name: _feature(given) for name, given in names.items()}
    if shape.num_graded:
        columns.append((_SCORE, pa.float64()))
        features[_SCORE] = {"dtype": "float64", "_type": "Value"}
    return pa.schema(columns, {"huggingface": json.dumps({"info": {"features": features}})})


def _groups(samples: Samples, shape: SourceShape) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each row group, at last one that may be empty."""
    rows: list[dict[str, Any]] = []
    num_bytes = 0
    for sample, members in samples:
        rows.append(_row(sample, members, shape))
        num_bytes += sum(map(len, members.values()))
        if num_bytes >= _GROUP_BYTES:
            yield rows
            rows, num_bytes = [], 0
    yield rows


def _row(sample: Sample, members: Members, shape: SourceShape) -> dict[str, Any]:
    values = {
        name: _value(one, given, members)
        for (name, given), one in zip(_names(shape).items(), sample.inputs(), strict=True)
    }
    return values | ({_SCORE: sample.relevance} if shape.num_graded else {})


def _value(one: Input, given: InputShape, members: Members) -> Any:
    def file(media: Media) -> dict[str, Any]:
        return {"bytes": members[media.member], "path": media.member}

    if not given.with_media:
        return one.text
    files: Any = [file(media) for media in one.media]
    if given.max_media == 1:
        files = files[0] if files else None
    return {"text": one.text, _medium(given): files} if given.with_text else files


def _selectors(name: str, given: InputShape) -> dict[str, str]:
    if not given.with_media:
        return {"text": name}
    if not given.with_text:
        return {"media": name}
    return {"text": f"{name}.text?", "media": f"{name}.{_medium(given)}?"}
