"""A retrieval dataset of your own, in a folder as BEIR and TREC have it, or in one file with a list for each query.

    queries.jsonl       one object a line: "_id", and "text", "image", "video", "document" (with "page" from zero),
                        any of them, paths relative to the folder; optional "instruction"
    corpus.jsonl        the same, optional "title", which goes before the text
    qrels/{split}.tsv   query, candidate, grade (a header is skipped), or TREC's four: query, 0, candidate, grade
    dataset.json        optional: `CustomConfig`

    corpus/, queries/, qrels/    parquet in place of these files, of pictures of pages (`pages.py`), as ViDoRe has it

    lists.jsonl         one object a line: "query" (as above), "candidates" (a list of such), "relevance" (a grade for
                        each): every query has candidates of its own

A video may be a folder of frames. Grades are numbers up to 1023; those of 0 or less are not relevant. Queries without a
grade above 0 are left out: other splits have them. `Dataset.notes` counts what is left out. A pair with two grades and
a name that is there twice are errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from pipelines.benchmarks.corpus import Corpus
from pipelines.benchmarks.files import Line, read_lines
from pipelines.benchmarks.pages import read_pages
from pipelines.benchmarks.qrels import Qrels, read_qrels
from pipelines.benchmarks.types import Dataset, Query, Row, file_inside, make_item
from pipelines.config import Config, NonNegativeInt
from pipelines.errors import UserError
from pipelines.items.types import Item
from pipelines.samples import FileRef, MediaKind
from pipelines.stored_json import explain, read_json

Exclude = Literal["same_input", "same_id", "nothing"]
Own = dict[str, Item]
"""Id of a query's item -> the candidate of the same name."""
_KINDS: tuple[MediaKind, ...] = ("image", "video", "document")


class CustomConfig(Config):
    """What `dataset.json` may say."""

    metric: str = "ndcg_linear@10"
    """The metric that counts, `hit@1` or `recall@100` for example."""
    cutoffs: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Cut-offs of all metrics, in addition to 1, 5, 10 and that of `metric`."""
    exclude: Exclude = "same_input"
    """Candidates that a query is not compared with. `same_id`: the one with its `_id`, as BEIR does where queries are
    documents. `same_input`: that one if it shows the same text and files and is not relevant. `nothing`: none."""
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
        cutoffs=_cutoffs(config),
    )
    if not path.is_dir():
        dataset, own = _lists(row, path)
    elif (path / "corpus").is_dir():
        dataset = read_pages(replace(row, layout="pages", data="", media="pictures"), root)
        by_name = {item.name: item for item in dataset.candidates}
        names = ((query.item.id, query.item.name) for query in dataset.queries)
        own = {id: by_name[name] for id, name in names if name in by_name}
    else:
        dataset, own = _folder(row, root)
    return dataset if config.exclude == "nothing" else _without_own(dataset, own, config.exclude)


def _cutoffs(config: CustomConfig) -> tuple[int, ...]:
    of_metric = config.metric.rpartition("@")[2]
    return tuple(sorted({*config.cutoffs, *([int(of_metric)] if of_metric.isdecimal() and int(of_metric) else [])}))


def _config(path: Path) -> CustomConfig:
    return read_json(path, CustomConfig, "correct it") if path.is_file() else CustomConfig()


def _folder(row: Row, root: Path) -> tuple[Dataset, Own]:
    qrels_path = root / "qrels" / f"{row.split}.tsv"
    qrels = read_qrels(qrels_path)
    grades = qrels.relevant()
    if not grades:
        raise UserError(str(qrels_path), "has no grade above 0", "add relevant candidates")
    asked = dict(_queries(root / "queries.jsonl", root, row.instruction))
    if lacking := grades.keys() - asked.keys():
        raise UserError(str(root / "queries.jsonl"), f"lacks {min(lacking)!r}, which the grades name", "add it")
    make = partial(_item, root=root, slot="p", instruction=row.target_instruction)
    corpus = Corpus(root / "corpus.jsonl", "_id", make)
    wanted = {name for relevant in grades.values() for name in relevant}
    ids: dict[str, str] = {}
    own: Own = {}
    for name, item in corpus.find(wanted | grades.keys()):
        ids[name] = item.id
        if name in grades:
            own[asked[name].id] = item
    if lacking := wanted - ids.keys():
        raise UserError(str(corpus.path), f"lacks {min(lacking)!r}, which the grades name", "add it")
    queries = []
    for name, query in asked.items():
        if name in grades:
            queries.append(Query(query, {ids[candidate]: grade for candidate, grade in grades[name].items()}))
    notes = qrels.notes()
    if left_out := len(asked) - len(queries):
        notes.append(f"{left_out} queries have no relevant candidate and are left out")
    return Dataset(row, queries, corpus, row.name, tuple(notes)), own


def _queries(path: Path, root: Path, instruction: str) -> Iterator[tuple[str, Item]]:
    """Yield name and item of each query. Raises `UserError` for a name that is there twice."""
    seen = set[str]()
    for line in read_lines(path, ("_id",)):
        name = str(line["_id"])
        if name in seen:
            raise UserError(f"{path} {name}", "is there twice", "give each query a name of its own")
        seen.add(name)
        yield name, _item(line, root, "q", instruction)


def _lists(row: Row, path: Path) -> tuple[Dataset, Own]:
    candidates: dict[str, Item] = {}
    queries = []
    qrels = Qrels()
    own: Own = {}
    for number, line in enumerate(read_lines(path, ("query", "candidates", "relevance"))):
        place = f"{path}:{number + 1}"
        _check(_List, line, place)
        if len(line["candidates"]) != len(line["relevance"]):
            raise UserError(place, "has not one relevance for each candidate", "write 0 for those that are not")
        query = _item({"_id": number, **line["query"]}, path.parent, "q", row.instruction)
        pool = [
            _item({"_id": _name(item), **item}, path.parent, "p", row.target_instruction) for item in line["candidates"]
        ]
        candidates |= {item.id: item for item in pool}
        for item, given, grade in zip(pool, line["candidates"], line["relevance"], strict=True):
            qrels.add(place, query.id, item.id, grade)
            if "_id" in line["query"] and "_id" in given and item.name == query.name:
                own[query.id] = item
        queries.append((place, query, tuple(dict.fromkeys(item.id for item in pool))))
    grades = qrels.relevant()
    for place, query, _ in queries:
        if query.id not in grades:
            raise UserError(place, "has no relevant candidate", "leave the query out")
    asked = [Query(query, grades[query.id], ids) for _, query, ids in queries]
    return Dataset(row, asked, list(candidates.values()), row.name, tuple(qrels.notes())), own


def _without_own(dataset: Dataset, own: Own, exclude: Exclude) -> Dataset:
    """Exclude the candidate that a query is itself, and report it."""
    queries = []
    num_excluded = num_relevant = 0
    for query in dataset.queries:
        item = own.get(query.item.id)
        is_relevant = item is not None and item.id in query.relevance
        if item is None or (exclude == "same_input" and (is_relevant or not _shows_the_same(query.item, item))):
            queries.append(query)
            continue
        num_excluded += 1
        num_relevant += is_relevant
        relevance = {id: grade for id, grade in query.relevance.items() if id != item.id}
        if relevance:
            queries.append(replace(query, relevance=relevance, excluded=(item.id,)))
    told = {
        "queries are not compared with the candidate that they are themselves": num_excluded,
        "queries have themselves for a relevant candidate, which exclude: same_id leaves out": num_relevant,
        "queries have no other relevant candidate and are left out": len(dataset.queries) - len(queries),
    }
    notes = [f"{count} {what}" for what, count in told.items() if count]
    return replace(dataset, queries=queries, notes=(*dataset.notes, *notes))


def _shows_the_same(query: Item, candidate: Item) -> bool:
    """Return whether both show the same text and files, whatever their instructions."""
    shown = []
    for item in (query, candidate):
        shown.append((item.input.text, [(media.kind, item.files[media.member]) for media in item.input.media]))
    return shown[0] == shown[1]


def _name(item: Line) -> str:
    """Of a candidate without one: what it shows."""
    return " ".join(str(item[key]) for key in (*_KINDS, "page", "text") if key in item)


class _Item(Config):
    """A query or a candidate; other keys are ignored."""

    model_config = ConfigDict(extra="ignore")

    title: str | float | None = None
    text: str | float | None = None
    image: str | None = None
    video: str | None = None
    document: str | None = None
    page: NonNegativeInt | None = None
    instruction: str | None = None


class _List(Config):
    """A line of a file of lists."""

    model_config = ConfigDict(extra="ignore")

    query: dict[str, Any]
    candidates: list[dict[str, Any]]
    relevance: list[Any]


def _check(kind: type[Config], line: Line, place: str) -> None:
    try:
        kind.model_validate(line)
    except ValidationError as error:
        raise UserError(place, explain(error), "correct it") from error


def _item(line: Line, root: Path, slot: str, instruction: str) -> Item:
    _check(_Item, line, f"{root} {line['_id']!s:.60}")
    media = [
        (kind, FileRef(str(file_inside(root, line[kind])), _page(line, kind))) for kind in _KINDS if line.get(kind)
    ]
    text = " ".join(part for key in ("title", "text") if (part := str(line.get(key) or "").strip()))
    return make_item(str(line["_id"]), text, media, root, slot, line.get("instruction") or instruction)


def _page(line: Line, kind: MediaKind) -> int | None:
    return int(line.get("page") or 0) if kind == "document" else None
