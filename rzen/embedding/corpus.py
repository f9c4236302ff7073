"""An embedded corpus, which `rzen embed` writes: what it was made of, its vectors, and the nearest ones to a query.

`rzen search` and `Embedder.search` read it here, so that both give the same hits.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NotRequired

import numpy as np
from typing_extensions import TypedDict

from pipelines.config import DataConfig, NonNegativeInt, PositiveFloat
from pipelines.errors import UserError
from pipelines.instructions import INSTRUCTIONS
from pipelines.samples import MODALITIES, DecodedInput, MediaKind, Modality, TimeRange
from pipelines.storage.location import open_store
from pipelines.storage.store import Store
from pipelines.stored_json import parse_json, stored_file
from rzen.config import Dtype
from rzen.embedding.inputs import Embeddable, InputReader, named
from rzen.embedding.tasks import NamedTask
from rzen.evaluation.vectors import FloatArray
from rzen.index.build import open_index
from rzen.index.exact import ExactIndex
from rzen.index.filters import Condition, parse_conditions
from rzen.index.parts import VECTOR, Parts
from rzen.index.types import KEY, CorpusIndex, IndexEntry, Row, TargetPlace
from rzen.model.checkpoints import MadeBy

MANIFEST = "vectors.json"
VERSIONS = "versions"
"""Folder with a copy of `vectors.json` for each version that is kept."""
_TASKS: dict[MediaKind, str] = {"image": "text_image", "document": "text_page", "video": "text_video"}


_COLUMNS = ("score", "modality", "title", "origin", "split", "source", "index")
_PARTS_OF_EXAMPLES = 16
_PART = re.compile(r"parts/(?P<place>.+)-(?P<start>\d{9})-[0-9a-f]{16}\.parquet")
_MS = 0.001
_MOST_HITS = 1000
_MORE = 4  # times the hits, until they are of enough targets


@stored_file
class SegmentsEntry(TypedDict):
    """How long videos were divided, and into how many segments. Segments begin `overlap_s` before the last one ends."""

    seconds: PositiveFloat
    overlap_s: float
    num_videos: NonNegativeInt
    num_segments: NonNegativeInt


@stored_file
class VectorsFile(TypedDict):
    """`vectors.json`: the parts of a dataset's vectors, and what they were made of."""

    parts: list[str]
    query_parts: NotRequired[list[str]]
    """Parts of the vectors of queries, which no search finds. A student learns from them."""
    segments: NotRequired[SegmentsEntry]
    """Segments of videos. Without it, each video has one vector, and rows have no `start_s` and `end_s`."""
    num_vectors: NonNegativeInt
    model: str
    config: str
    made_by: NotRequired[MadeBy]
    dtype: Dtype | None
    data: DataConfig
    fingerprints: NotRequired[dict[str, str]]
    """Split -> fingerprint of the manifest of the data. Missing in files of earlier versions, as `made_by`."""
    version: NotRequired[str]
    """Name of the content: equal parts of an equal configuration have the same."""
    previous: NotRequired[list[str]]
    """Earlier versions that are kept, the newest first."""
    index: NotRequired[IndexEntry | None]
    """What searches the vectors. Without one, every vector is compared."""


@dataclass(frozen=True, slots=True)
class CorpusHit:
    """A target that a search found.

    `rank` counts from 1, `score` is the cosine with the query. `title` is the caption, or the text itself for a text.
    `origin` is the file (and page or line in it). The target is number `index` of `source` in the dataset's `split`.
    `start_s` and `end_s` are those of a segment of a video, None for a whole target.
    """

    rank: int
    score: float
    modality: Modality
    title: str
    origin: str
    split: str
    source: str
    index: int
    start_s: float | None = None
    end_s: float | None = None

    @property
    def segment(self) -> TimeRange | None:
        """Return the part of the video that the hit is, None for a whole target."""
        return range_of({"start_s": self.start_s, "end_s": self.end_s})

    @property
    def target(self) -> tuple[str, str, int]:
        """Return the place of the target in the dataset: equal for the segments of a video."""
        return self.split, self.source, self.index

    def place(self) -> str:
        """Return file and time, such as `lecture.mp4 12:30-13:00`."""
        return self.origin if self.segment is None else f"{self.origin} {self.segment}"


@dataclass(frozen=True)
class Corpus:
    """A version of embedded targets, and the index that finds them. A search finds each target once.

    `conditions` hold for every hit. `key` is equal for equal content.
    """

    url: str
    key: str
    manifest: VectorsFile
    parts: Parts
    index: CorpusIndex
    conditions: tuple[Condition, ...] = ()

    def check_made_by(self, model: MadeBy, name: str) -> None:
        """Raise `UserError` unless the vectors were made by this model, whatever its name."""
        own = self.manifest.get("made_by")
        if own is None:
            raise UserError(self.url, "does not say which weights made its vectors", "run `rzen embed` again")
        parts = {"base": "other weights", "adapter": "another adapter", "identity": "another prompt or readout"}
        if other := [text for part, text in parts.items() if own[part] != model[part]]:  # type: ignore[literal-required]
            problem = f"has vectors of {self.manifest['model']}, and {name} has {' and '.join(other)}"
            raise UserError(self.url, problem, "load the model of the vectors, or run `rzen embed` with this one")

    def read_queries(
        self, queries: Iterable[Embeddable], instruction: str | None, visual_pixels: int, endpoint: str | None
    ) -> list[DecodedInput]:
        """Return decoded queries, by the limits and frames with which the targets were decoded.

        `instruction` goes with those that have none of their own. If it is None, it is that of a task which fits: what
        shows a medium and says nothing gets the instruction of targets, so that it finds itself. It is empty for
        targets without instructions. `visual_pixels` are those of an image of the model. Raises the errors of
        `InputReader`, with `queries[3]` as their place.
        """
        reader = InputReader(self.manifest["data"].media.for_model(visual_pixels), endpoint)
        found = []
        try:
            for number, query in enumerate(reader.ahead(queries)):
                with named(f"queries[{number}]"):
                    decoded = reader.read(query)
                if not _has_instruction(query):
                    words = self.fitting_instruction(decoded) if instruction is None else instruction
                    decoded = replace(decoded, instruction=words)
                found.append(decoded)
        finally:
            reader.close()
        return found

    def instruction_of(self, task: NamedTask) -> str:
        """Return the instruction of queries of a task; none if the targets have none."""
        return task["instruction"] if self.manifest["data"].instructions else ""

    def nearest(
        self, queries_QD: FloatArray, k: int, filters: Sequence[str] | Mapping[str, Any] = ()
    ) -> list[list[CorpusHit]]:
        """Return the k best targets for each query, best first.

        `filters` are further conditions, such as `source=photos`, or columns with their values. Raises `UserError` for
        vectors of another width and for unknown columns.
        """
        if k < 1:
            raise UserError("top_k", f"is {k}", "use at least 1")
        if not len(queries_QD):
            return []
        found = self.index.search(queries_QD, k, (*self.conditions, *parse_conditions(filters)))
        if not any(found) and not filters and self.conditions:
            wanted = "; ".join(
                f"{one.column} {one.operator} {', '.join(map(str, one.values))}" for one in self.conditions
            )
            raise UserError("filters", f"{self.url} holds no target with {wanted}", "ask for others")
        return [[_hit(rank, row) for rank, row in enumerate(rows, start=1)] for rows in found]

    def nearest_targets(
        self, query_D: FloatArray, k: int, filters: Sequence[str] | Mapping[str, Any] = ()
    ) -> list[list[CorpusHit]]:
        """Return the k best targets as lists of hits, best first: of a video, its best segments, else the target alone.

        A search of `_MOST_HITS` segments ends, even if it found fewer than k targets.
        """
        count = k
        while True:
            (hits,) = self.nearest(query_D[None], count, filters)
            groups: dict[tuple[str, str, int], list[CorpusHit]] = {}
            for hit in hits:
                groups.setdefault(hit.target, []).append(hit)
            if len(groups) >= k or len(hits) < count or count >= max(k, _MOST_HITS):
                return list(groups.values())[:k]
            count = min(_MORE * count, max(k, _MOST_HITS))

    def find_row(self, target: TargetPlace) -> Row | None:
        """Return content (`target_sha256`) and vector of a target or segment, None where there is none."""
        import pyarrow.compute as pc

        place = ["split", "source", "index"]
        same = pc.field("split") == target.split
        same &= (pc.field("source") == target.source) & (pc.field("index") == target.index)
        if "start_s" in self.parts.schema().names:
            place.append("start_s")
            same &= pc.is_null(pc.field("start_s")) if target.start_s is None else _equal_s(target.start_s)
        elif target.start_s is not None:
            return None
        for number in self._parts_of(target):
            found = self.parts.read(number, [KEY, VECTOR, *place]).filter(same)
            if len(found):
                row: Row = found.select([KEY, VECTOR]).slice(0, 1).to_pylist()[0]
                return row
        return None

    def _parts_of(self, target: TargetPlace) -> list[int]:
        """Return the parts that may hold a target, by their names: all of them if these do not say."""
        named = [_PART.fullmatch(path) for path in self.parts.paths]
        if not all(named):
            return list(range(len(named)))
        starts = [
            (int(found["start"]), number)
            for number, found in enumerate(named)
            if found and found["place"] == f"{target.split}-{target.source}" and int(found["start"]) <= target.index
        ]
        return [max(starts)[1]] if starts else []

    def titled(self, title: str, query_D: FloatArray) -> CorpusHit | None:
        """Return the target with this caption that is nearest to the query, with its rank among all.

        None if no target has the caption, or if an index answers: it does not know the rank of a target far away.
        """
        if not title or not isinstance(self.index, ExactIndex):
            return None
        found = self.index.best_of(query_D, [Condition("title", "=", (title,))], self.conditions)
        return found and _hit(*found)

    def examples(self, count: int) -> list[Row]:
        """Return a few targets, spread over the corpus: those with a caption, and held-out ones, if there are any."""
        import pyarrow as pa
        import pyarrow.compute as pc

        columns = [name for name in self.parts.schema().names if name != VECTOR]
        spread = range(0, len(self.parts.paths), max(1, len(self.parts.paths) // _PARTS_OF_EXAMPLES))
        some = Parts(self.parts.store, [self.parts.paths[number] for number in spread])
        kept = ExactIndex(some).chosen(self.conditions)
        table = pa.concat_tables(some.read_all(columns)).filter(pa.array(kept))
        table = table.filter(pc.not_equal(table["title"], "")) or table
        table = table.filter(pc.equal(table["split"], "held_out")) or table
        chosen: list[Row] = table.take(np.linspace(0, len(table) - 1, min(count, len(table)), dtype=int)).to_pylist()
        return chosen

    def fitting_instruction(self, query: DecodedInput) -> str:
        """Return the instruction of a task which fits a query that has none. See `read_queries`."""
        if not self.manifest["data"].instructions:
            return ""
        if not query.visuals:
            return INSTRUCTIONS["text_image"][0]
        return INSTRUCTIONS["image_text_image"][0] if query.text else INSTRUCTIONS[_TASKS[query.visuals[0].kind]][1]


def range_of(row: Row) -> TimeRange | None:
    """Return the part of a video that a row is, None for a whole target."""
    start_s, end_s = row.get("start_s"), row.get("end_s")
    return None if start_s is None or end_s is None else TimeRange(start_s, end_s)


def all_parts(manifest: VectorsFile) -> list[str]:
    """Return the parts of targets and of queries."""
    return [*manifest["parts"], *manifest.get("query_parts", [])]


def read_vectors_file(store: Store) -> VectorsFile:
    """Return `vectors.json`. Raises `FileNotFoundError`, and `UserError` for a damaged one."""
    return _parsed(store, store.read(MANIFEST))


def read_version(store: Store, version: str) -> VectorsFile | None:
    """Return what a version that is kept was made of; None if it is not there. Raises `UserError` if it is damaged."""
    try:
        return _parsed(store, store.read(f"{VERSIONS}/{version}.json"))
    except FileNotFoundError:
        return None


def read_corpus(
    url: str,
    modalities: Sequence[Modality] | None = None,
    endpoint: str | None = None,
    known: Corpus | None = None,
    *,
    filters: Sequence[str] | Mapping[str, Any] = (),
    version: str | None = None,
) -> Corpus:
    """Open the vectors at a directory or s3:// URL with the index that is there. `None` stands for all modalities.

    `filters` are conditions for all hits, such as `source=photos`. `version` names an earlier version that is kept.
    `known` is a corpus that was opened before: its index stays open while the content is the same. Raises `UserError`
    where there are no vectors, and for modalities that do not exist.
    """
    store = open_store(url, endpoint)
    data = _read_manifest(store, version)
    if unknown := set(modalities or ()) - set(MODALITIES):
        raise UserError("modalities", f"has {min(unknown)!r}", f"use {', '.join(MODALITIES)}")
    conditions = parse_conditions(filters)
    if modalities:
        conditions = (Condition("modality", "=", tuple(modalities)), *conditions)
    key = hashlib.sha256(json.dumps([repr(store), data.hex()]).encode()).hexdigest()
    if known is not None and known.key == key:
        return known if known.conditions == conditions else replace(known, conditions=conditions)
    manifest = _parsed(store, data)
    parts = Parts(store, manifest["parts"])
    parts.schema()
    return Corpus(store.url, key, manifest, parts, open_index(manifest.get("index"), parts, endpoint), conditions)


def read_manifest(url: str, endpoint: str | None = None) -> VectorsFile:
    """Return what the vectors at a directory or s3:// URL were made of. Raises `UserError` where there are none."""
    store = open_store(url, endpoint)
    return _parsed(store, _read_manifest(store))


def _read_manifest(store: Store, version: str | None = None) -> bytes:
    path = MANIFEST if version is None else f"{VERSIONS}/{version}.json"
    try:
        return store.read(path)
    except FileNotFoundError as error:
        fix = "run a job of kind embed that writes here"
        if version is not None:
            fix = f"use one of those in {VERSIONS}"
        raise UserError(f"{store.url}/{path}", "does not exist", fix) from error


def _parsed(store: Store, data: bytes) -> VectorsFile:
    return parse_json(data, f"{store.url}/{MANIFEST}", VectorsFile, "run the job embed again")


def _equal_s(seconds: float) -> Any:
    import pyarrow.compute as pc

    return pc.less(pc.abs(pc.subtract(pc.field("start_s"), seconds)), _MS / 2)


def _hit(rank: int, row: Row) -> CorpusHit:
    return CorpusHit(rank, **{name: row[name] for name in _COLUMNS}, start_s=row.get("start_s"), end_s=row.get("end_s"))


def _has_instruction(query: Embeddable) -> bool:
    if isinstance(query, dict):
        return query.get("instruction") is not None
    return isinstance(query, DecodedInput)
