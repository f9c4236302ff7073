"""What a benchmark gives: queries and candidates as inputs with unique ids, pools, relevance, and its row of the table.

Ids are digests of name and content. Equal names with unlike content are two candidates, as are unlike names with equal
content: the protocols count candidates by name, and their own scripts merge what shares a name.
"""

from __future__ import annotations

import posixpath
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from pipelines.errors import UserError
from pipelines.items.types import FRAMES, ID, Item, as_ids, content_id
from pipelines.samples import FileRef, Input, Media, MediaKind

Suite = Literal["MMEB-V2", "M-BEIR", "M-BEIR global", "custom", "held_out", "train"]
"""Public benchmarks, custom datasets, and the splits of a dataset of ours."""
Modality = Literal["image", "video", "visdoc", "mixed"]
MAX_GRADE = 1023
"""The largest grade: 2^1024 is no double."""


@dataclass(frozen=True, slots=True)
class Row:
    """One dataset of the table: what is scored, and where its files are.

    `pool` is `local` where every query has candidates of its own (in M-BEIR: where the task has), else `global`.
    `metric` is the one that counts. `cutoffs` are scored in addition to 1, 5 and 10. `num_queries` are those of the
    protocol; a dataset with another number is incomplete. `data` and `media` are folders under the benchmark's,
    `source` and `revision` what to fetch. The other fields are for the reader `layout`, which finds things by them.
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
    cutoffs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Query:
    """A query with the grades of its relevant candidates by id, all above 0, and its pool: ids, or None for all.

    `relevance` is empty where no relevant candidate is in the pool at all: the query scores 0 and is counted.
    `excluded` candidates are never ranked, such as the document that a query was taken from.
    """

    item: Item
    relevance: Mapping[str, float]
    pool: tuple[str, ...] | None = None
    excluded: tuple[str, ...] = ()


class Stream(Protocol):
    """Candidates that are too many to hold. They are read again each time."""

    def __iter__(self) -> Iterator[Item]: ...

    def pick(self, places: Collection[int]) -> dict[int, Item]:
        """Those at these places, from zero; quicker than a pass over all."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """One benchmark dataset. `candidates` has every candidate once, in the same order each time.

    Datasets of one `corpus` have the same candidates, which need to be embedded and read once (`Pool`). `notes` report
    what the files hold and the dataset does not.
    """

    row: Row
    queries: Sequence[Query]
    candidates: Sequence[Item] | Stream
    corpus: str
    notes: tuple[str, ...] = ()

    def pool_size(self, query: Query) -> int:
        """Return how many candidates a query has. Only for candidates that are in memory."""
        if query.pool is not None:
            return len(set(query.pool).difference(query.excluded))
        assert isinstance(self.candidates, Sequence)
        return len(self.candidates) - len(query.excluded)

    def pick(self, places: Iterable[int]) -> dict[int, Item]:
        """The candidates at these places."""
        if isinstance(self.candidates, Sequence):
            return {place: self.candidates[place] for place in places}
        return self.candidates.pick(set(places))


def make_item(
    name: str, text: str, media: Sequence[tuple[MediaKind, FileRef]], root: Path, slot: str, instruction: str = ""
) -> Item:
    """An item of text, files, or both. `slot` is `q` for queries and `p` for candidates, as in samples.

    A file counts by its path under `root`, its page, its size and the time of its last change. Raises `UserError` for
    an item of nothing and a file that is not there.
    """
    if not text and not media:
        raise UserError(f"{root} {name}", "has neither text nor media", "repair the file")
    members: list[Media] = []
    files: dict[str, FileRef] = {}
    shown: list[object] = []
    for number, (kind, ref) in enumerate(media):
        path = Path(ref.path)
        version = _version(path, kind)
        suffix = path.suffix.lower().removeprefix(".") if isinstance(version, tuple) else FRAMES
        member = f"{slot}{number}.{suffix}"
        members.append(Media(kind, member))
        files[member] = ref
        shown += [kind, path.relative_to(root).as_posix(), ref.page, version]
    id, content = content_id([name, text, instruction, *shown]), content_id([text, *shown])
    return Item(id, name, Input(text, tuple(members)), content, instruction, files)


def _version(path: Path, kind: MediaKind) -> tuple[int, int] | list[tuple[str, int, int]]:
    """Bytes of a file and when it was changed, in ns; of a video's folder the names and versions of its frames.

    To hash the pictures of a corpus would take longer than to list it by hours. Tags of shards on a disk are the same.
    """
    try:
        info = path.stat()
        if not stat.S_ISDIR(info.st_mode):
            return info.st_size, info.st_mtime_ns
        found = [(entry.name, entry.stat()) for entry in path.iterdir()]
        frames = sorted((name, info.st_size, info.st_mtime_ns) for name, info in found)
    except OSError as error:
        raise UserError(str(path), error.strerror or "cannot be read", "fetch it, or repair the list") from error
    if kind != "video" or not frames:
        raise UserError(str(path), "has no frames" if kind == "video" else "is a folder", "unpack it again")
    return frames


def without_instructions(dataset: Dataset) -> Dataset:
    """The same questions without instruction, under ids of their own; candidates stay as they are."""
    queries = []
    for query in dataset.queries:
        id = content_id([query.item.id, "without instruction"])
        queries.append(replace(query, item=replace(query.item, id=id, instruction="")))
    return replace(dataset, queries=queries)


def file_in(root: Path, name: str) -> Path:
    """Return the file that a list names, relative to `root`. Raises `UserError` if it would be outside."""
    relative = posixpath.normpath(name)
    if posixpath.isabs(relative) or relative == ".." or relative.startswith("../"):
        raise UserError(f"{root} {name}", "is outside the folder of the benchmark", "put it inside")
    return root / relative


def file_inside(root: Path, name: str) -> Path:
    """Return the file as `file_in` does. Raises `UserError` for a link that leaves `root`, too."""
    path = file_in(root, name)
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{root} {name}", "is a link to a file outside of the folder", "put the file inside")
    return path


@dataclass(frozen=True, slots=True)
class Pool:
    """The ids of a corpus in its order, `[N]` as bytes of 32, and the instructions that its candidates carry."""

    ids: npt.NDArray[np.bytes_]
    instructions: frozenset[str]


def read_pool(dataset: Dataset) -> Pool:
    """One pass over the candidates, for all datasets of the corpus. Raises `UserError` for one that is there twice."""
    instructions = set[str]()

    def ids() -> Iterator[bytes]:
        for item in dataset.candidates:
            instructions.add(item.instruction)
            yield item.id.encode()

    found = np.fromiter(ids(), dtype=ID)
    order = np.argsort(found, kind="stable")
    twice = order[1:][found[order[1:]] == found[order[:-1]]]
    if len(twice):
        name = dataset.pick([int(twice[0])])[int(twice[0])].name
        raise UserError(f"{dataset.row.name} {name}", "is among the candidates twice", "repair its reader")
    return Pool(found, frozenset(instructions))


def check(dataset: Dataset, pool: Pool) -> None:
    """Raise `UserError` for what would cost points without an error.

    That is a query that is there twice, relevance or pools that name no candidate, and no answer at all. It is also a
    relevant candidate that is excluded, and a candidate with an instruction that the protocol does not give it.
    """
    row = dataset.row
    wrong = pool.instructions - {row.target_instruction}
    if wrong and not _brings_instructions(row):
        problem = f"has candidates with the instruction {min(wrong)!r}, not {row.target_instruction!r}"
        raise UserError(row.name, problem, "candidates carry what the protocol gives them, never that of queries")
    if not len(dataset.queries) or not len(pool.ids):
        raise UserError(row.name, f"has {len(dataset.queries)} queries, {len(pool.ids)} candidates", "fetch it again")
    ids = Counter(query.item.id for query in dataset.queries)
    checked: dict[int, frozenset[str]] = {}  # pools that many queries share
    for query in dataset.queries:
        place = f"{row.name} {query.item.name}"
        if ids[query.item.id] > 1:
            raise UserError(place, "is among the queries twice", "repair its reader")
        pool_ids = checked.get(id(query.pool)) or checked.setdefault(id(query.pool), frozenset(query.pool or ()))
        if query.pool is not None and len(pool_ids) < len(query.pool):
            raise UserError(place, "has a pool with a candidate twice", "repair its reader")
        if query.pool is not None and not query.relevance.keys() <= pool_ids:
            raise UserError(place, "has a relevant candidate outside its pool", "repair its reader")
        if any(not 0 < grade <= MAX_GRADE for grade in query.relevance.values()):
            problem = f"has a relevant candidate of grade 0 or less, above {MAX_GRADE}, or of none"
            raise UserError(place, problem, "leave it out")
        if len(set(query.excluded)) < len(query.excluded) or query.relevance.keys() & set(query.excluded):
            raise UserError(place, "excludes a candidate twice, or a relevant one", "repair its reader")
    named = {id for query in dataset.queries for id in (*query.relevance, *query.excluded)}.union(*checked.values())
    if (unknown := np.setdiff1d(as_ids(named), pool.ids)).size:
        raise UserError(row.name, f"names a candidate {unknown[0].decode()} that it has not", "repair its reader")
    if not any(query.relevance for query in dataset.queries):
        raise UserError(row.name, "has no relevant candidate for any query", "fetch it again")


def _brings_instructions(row: Row) -> bool:
    """Return whether the files say what candidates carry: data of your own, and image sets with images as targets."""
    return row.suite in ("custom", "held_out", "train") or row.meta_task in ("image retrieval", "image grounding")
