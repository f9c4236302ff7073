"""What a benchmark gives: queries and candidates as sides with unique ids, pools, relevance, and its row of the table.

Ids are digests of name and content. Equal names with unlike content are two candidates, as are unlike names with equal
content: the protocols count candidates by name, and their own scripts merge what shares a name.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pipelines.errors import UserError
from pipelines.samples import FileRef, Media, MediaKind, Side

Suite = Literal["MMEB-V2", "M-BEIR", "M-BEIR global", "own"]
Modality = Literal["image", "video", "visdoc", "mixed"]
FRAMES = "frames"
"""Suffix of the member of a video that lies on disk as a folder of pictures (`pipelines.benchmarks.frames`)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One dataset of the table: what is scored, and where its files lie.

    `pool` is `local` where every query has candidates of its own (in M-BEIR: where the task has), else `global`.
    `metric` is the one that counts. `num_queries` are those of the protocol; a dataset with another number is
    incomplete. `data` and `media` are folders under the benchmark's, `source` and `revision` what to fetch. The other
    fields tell the reader `layout` where things are.
    """

    name: str
    suite: Suite
    modality: Modality
    meta_task: str
    pool: Literal["local", "global"]
    metric: str
    num_queries: int | None
    layout: str
    data: str = ""
    media: str = ""
    source: str = ""
    revision: str = ""
    subset: str = ""
    split: str = "test"
    id_column: str = ""
    text_column: str = ""
    num_classes: int = 0
    instruction: str = ""
    target_instruction: str = ""


@dataclass(frozen=True, slots=True)
class Item:
    """A query or a candidate. `name` is the benchmark's own, which its files speak of; `id` is 32 hex digits.

    `files` has a file for every member of `side`, and a folder for a video of frames (member `*.frames`).
    """

    id: str
    name: str
    side: Side
    instruction: str = ""
    files: dict[str, FileRef] = field(default_factory=dict)

    @property
    def modality(self) -> str:
        """`text`, `image`, `image+text`, `video`, ...: what it shows, instructions apart."""
        kinds = sorted({media.kind for media in self.side.media})
        return "+".join([*kinds, *(["text"] if self.side.text else [])])


@dataclass(frozen=True, slots=True)
class Query:
    """A query with the grades of its relevant candidates by id, all above 0, and its pool: ids, or None for all.

    `relevance` is empty where no relevant candidate is in the pool at all: the query scores 0 and is counted.
    """

    item: Item
    relevance: Mapping[str, float]
    pool: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Dataset:
    """One benchmark dataset. `candidates` yields every candidate once, the same each time.

    Datasets of one `corpus` have the same candidates, which need to be embedded once.
    """

    row: Row
    queries: Sequence[Query]
    candidates: Iterable[Item]
    corpus: str


def make_item(
    name: str, text: str, media: Sequence[tuple[MediaKind, FileRef]], root: Path, slot: str, instruction: str = ""
) -> Item:
    """An item of text, files, or both. `slot` is `q` for queries and `p` for candidates, as in samples.

    A file counts by its path under `root`, its page and its size: whoever puts another file of the same size in its
    place must drop what was computed from it. Raises `UserError` for an item of nothing and a file that is not there.
    """
    if not text and not media:
        raise UserError(f"{root} {name}", "has neither text nor media", "repair the file")
    members: list[Media] = []
    files: dict[str, FileRef] = {}
    content: list[object] = [name, text, instruction]
    for number, (kind, ref) in enumerate(media):
        path = Path(ref.path)
        suffix = FRAMES if kind == "video" and path.is_dir() else path.suffix.lower().removeprefix(".")
        member = f"{slot}{number}.{suffix}"
        members.append(Media(kind, member))
        files[member] = ref
        content += [kind, path.relative_to(root).as_posix(), ref.page, _size(path)]
    digest = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
    return Item(digest[:32], name, Side(text, tuple(members)), instruction, files)


def _size(path: Path) -> object:
    """Bytes of a file; names and bytes of the pictures of a folder."""
    try:
        if not path.is_dir():
            return path.stat().st_size
        pictures = sorted([entry.name, entry.stat().st_size] for entry in path.iterdir())
    except OSError as error:
        raise UserError(str(path), error.strerror or "cannot be read", "fetch it, or repair the list") from error
    if not pictures:
        raise UserError(str(path), "has no frames", "unpack it again")
    return pictures


def without_instructions(dataset: Dataset) -> Dataset:
    """The same questions without instruction, under ids of their own; candidates stay as they are."""
    queries = []
    for query in dataset.queries:
        id = hashlib.sha256(f"{query.item.id} without instruction".encode()).hexdigest()[:32]
        queries.append(replace(query, item=replace(query.item, id=id, instruction="")))
    return replace(dataset, queries=queries)


def file_in(root: Path, name: str) -> Path:
    """The file that a list names, relative to `root`. Raises `UserError` where it would lie outside."""
    relative = posixpath.normpath(name)
    if posixpath.isabs(relative) or relative == ".." or relative.startswith("../"):
        raise UserError(f"{root} {name}", "lies outside the folder of the benchmark", "put it inside")
    return root / relative


def check(dataset: Dataset) -> int:
    """Number of candidates. Raises `UserError` for ids that are not unique, relevance or pools that name no candidate,
    a dataset without any answer, and queries' instructions on candidates, which cost models points unseen.
    """
    row, seen = dataset.row, set[str]()
    asked = {query.item.instruction for query in dataset.queries} - {""}
    for candidate in dataset.candidates:
        if candidate.id in seen:
            raise UserError(f"{row.name} {candidate.name}", "is among the candidates twice", "repair its reader")
        if candidate.instruction in asked:
            problem = f"a candidate has the queries' instruction {candidate.instruction!r}"
            raise UserError(f"{row.name} {candidate.name}", problem, "give candidates their own, or none")
        seen.add(candidate.id)
    ids = [query.item.id for query in dataset.queries]
    if not ids or not seen:
        raise UserError(row.name, f"has {len(ids)} queries and {len(seen)} candidates", "fetch it again")
    if len(set(ids)) < len(ids):
        twice = next(query.item.name for query in dataset.queries if ids.count(query.item.id) > 1)
        raise UserError(f"{row.name} {twice}", "is among the queries twice", "repair its reader")
    for query in dataset.queries:
        _check_query(row, query, seen)
    if not any(query.relevance for query in dataset.queries):
        raise UserError(row.name, "has no relevant candidate for any query", "fetch it again")
    return len(seen)


def _check_query(row: Row, query: Query, known: set[str]) -> None:
    place = f"{row.name} {query.item.name}"
    pool = known if query.pool is None else set(query.pool)
    if query.pool is not None and (len(pool) < len(query.pool) or not pool <= known):
        raise UserError(place, "has a pool with a candidate twice, or one that does not exist", "repair its reader")
    if not query.relevance.keys() <= pool:
        raise UserError(place, "has a relevant candidate outside its pool", "repair its reader")
    if any(not 0 < grade < float("inf") for grade in query.relevance.values()):
        raise UserError(place, "has a relevant candidate of grade 0 or less, or of none", "leave it out")
