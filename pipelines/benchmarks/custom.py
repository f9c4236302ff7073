"""A retrieval dataset of your own, in a folder as BEIR and TREC have it, or in one file with a list for each query.

    queries.jsonl       one object a line: "_id", and "text", "image", "video", "document" (with "page" from zero),
                        any of them, paths relative to the folder; optional "instruction"
    corpus.jsonl        the same, optional "title", which goes before the text
    qrels/{split}.tsv   query, candidate, grade (a header is skipped), or TREC's four: query, 0, candidate, grade
    dataset.json        optional: `CustomConfig`

    corpus/, queries/, qrels/    parquet in place of these files, of pictures of pages (`pages.py`), as ViDoRe has it

    lists.jsonl         one object a line: "query" (as above), "candidates" (a list of such), "relevance" (a grade for
                        each): every query has candidates of its own

A video may be a folder of frames. Grades are any numbers; those of 0 or less are not relevant. Queries without a grade
above 0 are left out: other splits have them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from pipelines.benchmarks.corpus import Corpus
from pipelines.benchmarks.files import Line, read_lines
from pipelines.benchmarks.pages import read_pages
from pipelines.benchmarks.types import Dataset, Query, Row, file_in, make_item
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.items.types import Item
from pipelines.samples import FileRef, MediaKind

_KINDS: tuple[MediaKind, ...] = ("image", "video", "document")


class CustomConfig(Config):
    """What `dataset.json` may say."""

    metric: str = "ndcg_linear@10"
    """The metric that counts, `hit@1` for example."""
    modality: Literal["image", "video", "visdoc", "mixed"] = "mixed"
    """Where it stands in the tables."""
    split: str = "test"
    """The grades are those of `qrels/{split}.tsv`."""
    instruction: str = ""
    """Instruction of queries that bring none."""
    target_instruction: str = ""
    """Instruction of candidates that bring none."""


def read_custom(path: Path, name: str = "") -> Dataset:
    """Read a folder, or one file of lists. `name` is its name in the tables, that of the path by default."""
    path = path.absolute()
    if not path.exists():
        raise UserError(str(path), "does not exist", "name a folder with queries.jsonl, or a file of lists")
    root = path if path.is_dir() else path.parent
    config = _config(root / "dataset.json")
    name = name or (path.name if path.is_dir() else path.stem)
    row = Row(
        name=name,
        suite="custom",
        modality=config.modality,
        meta_task=name,
        pool="global" if path.is_dir() else "local",
        metric=config.metric,
        num_queries=None,
        layout="custom",
        data=str(path),
        split=config.split,
        instruction=config.instruction,
        target_instruction=config.target_instruction,
    )
    if not path.is_dir():
        return _lists(row, path)
    if (path / "corpus").is_dir():
        return read_pages(replace(row, layout="pages", data="", media="pictures"), root)
    return _folder(row, root)


def _config(path: Path) -> CustomConfig:
    try:
        return CustomConfig.model_validate_json(path.read_bytes()) if path.is_file() else CustomConfig()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(str(path), ": ".join([*map(str, first["loc"]), first["msg"]]), "correct it") from error


def _folder(row: Row, root: Path) -> Dataset:
    grades = _qrels(root / "qrels" / f"{row.split}.tsv")
    make = partial(_item, root=root, slot="p", instruction=row.target_instruction)
    corpus = Corpus(root / "corpus.jsonl", "_id", make)
    wanted = {name for relevant in grades.values() for name in relevant}
    ids = corpus.ids(wanted)
    if len(ids) < len(wanted):
        raise UserError(str(corpus.path), f"lacks {min(wanted - ids.keys())!r}, which the grades name", "add it")
    queries = [
        Query(_item(line, root, "q", row.instruction), {ids[name]: grade for name, grade in relevant.items()})
        for line in read_lines(root / "queries.jsonl", ("_id",))
        if (relevant := grades.pop(str(line["_id"]), None))
    ]
    if grades:
        raise UserError(str(root / "queries.jsonl"), f"lacks {min(grades)!r}, which the grades name", "add it")
    return Dataset(row, queries, corpus, row.name)


def _lists(row: Row, path: Path) -> Dataset:
    candidates: dict[str, Item] = {}
    queries = []
    for number, line in enumerate(read_lines(path, ("query", "candidates", "relevance"))):
        place = f"{path}:{number + 1}"
        if len(line["candidates"]) != len(line["relevance"]):
            raise UserError(place, "has not one relevance for each candidate", "write 0 for those that are not")
        query = _item({"_id": number, **line["query"]}, path.parent, "q", row.instruction)
        pool = [
            _item({"_id": _name(item), **item}, path.parent, "p", row.target_instruction) for item in line["candidates"]
        ]
        candidates |= {item.id: item for item in pool}
        graded = zip(pool, line["relevance"], strict=True)
        relevance = {item.id: float(grade) for item, grade in graded if grade > 0}
        if not relevance:
            raise UserError(place, "has no relevant candidate", "leave the query out")
        queries.append(Query(query, relevance, tuple(dict.fromkeys(item.id for item in pool))))
    return Dataset(row, queries, list(candidates.values()), row.name)


def _name(item: Line) -> str:
    """Of a candidate without one: what it shows."""
    return " ".join(str(item[key]) for key in (*_KINDS, "page", "text") if key in item)


def _item(line: Line, root: Path, slot: str, instruction: str) -> Item:
    media = [(kind, FileRef(str(file_in(root, line[kind])), _page(line, kind))) for kind in _KINDS if line.get(kind)]
    text = " ".join(part for key in ("title", "text") if (part := str(line.get(key) or "").strip()))
    return make_item(str(line["_id"]), text, media, root, slot, line.get("instruction") or instruction)


def _page(line: Line, kind: MediaKind) -> int | None:
    return int(line.get("page") or 0) if kind == "document" else None


def _qrels(path: Path) -> dict[str, dict[str, float]]:
    """Query -> candidate -> grade above 0."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(str(path), error.strerror or "cannot be read", "write: query, candidate, grade") from error
    grades: dict[str, dict[str, float]] = {}
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or (number == 1 and not _is_number(fields[-1])):
            continue
        if len(fields) not in (3, 4) or not _is_number(fields[-1]):
            raise UserError(f"{path}:{number}", "is not: query, candidate, grade", "separate them by tabs")
        query, candidate, grade = fields[0], fields[-2], float(fields[-1])
        if grade > 0:
            if candidate in grades.setdefault(query, {}):
                raise UserError(f"{path}:{number}", f"grades {candidate!r} for {query!r} twice", "keep one of them")
            grades[query][candidate] = grade
    return grades


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
