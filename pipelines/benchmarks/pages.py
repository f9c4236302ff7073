"""Document sets in parquet (ViDoRe, VisRAG, and the like): queries, pages as pictures, grades.

What is assumed, from the sets' pages on the hub and the loaders of MMEB-V2's authors; the files were not at hand:

    {data}/queries/{split}-*.parquet    query-id, query
    {data}/corpus/{split}-*.parquet     corpus-id, image {bytes, path}
    {data}/qrels/{split}-*.parquet      query-id, corpus-id, score
    {media}/{corpus-id}.png             the picture; written from the corpus where it is not there, as the authors do

VisRAG's ids are long names of files: there a picture is named by its first 50 letters and 8 digits of its MD5
(`pages_short`). Of two scores for one pair the higher counts; scores of 0 are not relevant; queries without a relevant
page are left out. `Dataset.notes` counts all of these. All languages of a multilingual set are asked.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from pipelines.benchmarks.files import Line, find_parts, read_parts
from pipelines.benchmarks.qrels import Qrels
from pipelines.benchmarks.types import Dataset, Query, Row, file_in, make_item
from pipelines.errors import UserError
from pipelines.items.types import Item
from pipelines.samples import FileRef


def read_pages(row: Row, root: Path) -> Dataset:
    """Writes the pictures that are missing below `root / row.media`."""
    data, fetch = root / row.data, f"fetch {row.source} into {root / row.data}"
    queries, corpus, qrels = (find_parts(data, row.split, part, fetch) for part in ("queries", "corpus", "qrels"))
    names = [str(line["corpus-id"]) for line in read_parts(corpus, ("corpus-id",))]
    _check_twice(corpus, {name for name, count in Counter(names).items() if count > 1})
    paths = {name: _path(row, root, name) for name in names}
    _write_pictures(corpus, {name: path for name, path in paths.items() if not path.exists()})
    pages = {name: _page(row, root, name, path) for name, path in paths.items()}
    judged = Qrels(higher_counts=True)
    for line in read_parts(qrels, ("query-id", "corpus-id", "score")):
        judged.add(f"{data} qrels", str(line["query-id"]), str(line["corpus-id"]), line["score"])
    grades = judged.relevant()
    if lacking := {name for mine in grades.values() for name in mine} - pages.keys():
        raise UserError(f"{data} qrels", f"name {min(lacking)!r}, which the corpus lacks", fetch)
    asked = []
    num_queries = 0
    for line in read_parts(queries, ("query-id", "query")):
        num_queries += 1
        name = str(line["query-id"])
        if name in grades:
            relevance = {pages[page].id: grade for page, grade in grades[name].items()}
            asked.append(Query(make_item(name, str(line["query"]), (), root, "q", row.instruction), relevance))
    notes = judged.notes()
    if left_out := num_queries - len(asked):
        notes.append(f"{left_out} queries have no relevant page and are left out")
    if lacking := grades.keys() - {query.item.name for query in asked}:
        notes.append(f"{len(lacking)} queries have grades and are not among the queries, {min(lacking)!r} for example")
    if row.suite == "custom":
        _check_queries_once(data, asked)
    return Dataset(row, asked, list(pages.values()), row.name, tuple(notes))


def _check_queries_once(data: Path, asked: list[Query]) -> None:
    for name, count in Counter(query.item.name for query in asked).items():
        if count > 1:
            raise UserError(f"{data} queries {name}", "is there twice", "give each query a name of its own")


def _page(row: Row, root: Path, name: str, path: Path) -> Item:
    return make_item(name, "", [("image", FileRef(str(path)))], root, "p", row.target_instruction)


def _path(row: Row, root: Path, name: str) -> Path:
    if row.layout == "pages_short":
        stem, suffix = os.path.splitext(name)  # noqa: PTH122 - a Path would drop what is not part of the name
        return file_in(root / row.media, f"{stem[:50]}_{hashlib.md5(name.encode()).hexdigest()[:8]}{suffix}")
    return file_in(root / row.media, f"{name}.png")


def _check_twice(corpus: list[Path], names: Collection[str]) -> None:
    """Rows of one id are one page if they show the same. Raises `UserError` if they do not."""
    if names:
        seen: dict[str, bytes] = {}
        for line in read_parts(corpus, ("corpus-id", "image")):
            name = str(line["corpus-id"])
            if name in names and seen.setdefault(name, _picture(corpus, line)) != _picture(corpus, line):
                problem = f"has two pages called {name!r}, which show different things"
                raise UserError(str(corpus[0].parent), problem, "fetch a repaired version")


def _write_pictures(corpus: list[Path], missing: dict[str, Path]) -> None:
    """The bytes as they are in the corpus, whole or not at all."""
    if not missing:
        return
    for line in read_parts(corpus, ("corpus-id", "image")):
        path = missing.get(str(line["corpus-id"]))
        if path is not None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            partial.write_bytes(_picture(corpus, line))
            partial.replace(path)


def _picture(corpus: list[Path], line: Line) -> bytes:
    image = line["image"]
    if not isinstance(image, dict) or not isinstance(image.get("bytes"), bytes):
        raise UserError(f"{corpus[0].parent} {line['corpus-id']}", "has no bytes of a picture", "fetch it again")
    found: bytes = image["bytes"]
    return found
