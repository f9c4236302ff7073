"""A collection of a Qdrant server with the rows of a corpus and their vectors. The server may have many nodes.

{folder}/collection.json    URL of the server, and name of the collection

Versions of the vectors share a collection. Each point says in which version it came (`_from`), and in which it went
(`_until`), so that a new version costs its changes, and older ones stay readable. Only the job that holds the lease of
the vectors writes here.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from typing_extensions import TypedDict

from pipelines.errors import UserError
from pipelines.imports import import_extra
from pipelines.storage.store import Store
from pipelines.stored_json import parse_json, stored_file
from rzen.evaluation.vectors import FloatArray
from rzen.index.filters import Condition, check_conditions
from rzen.index.kinds import IndexKind
from rzen.index.parts import VECTOR, Parts, vectors_of
from rzen.index.types import INDEX, IndexEntry, Row, distinct

if TYPE_CHECKING:  # models are loaded without pyarrow
    import pyarrow as pa

URL, API_KEY = "QDRANT_URL", "QDRANT_API_KEY"
"""Environment variables. A URL here comes before the one in `collection.json`: nodes may know the server by another."""
MARKER = "collection.json"
PART, FROM, UNTIL = "_part", "_from", "_until"
_LONG = ("title", "origin", "target_sha256")  # columns that are seldom filtered, and whose payload index is large
_NUMBERS_PER_REQUEST = 1_000_000  # of vectors: some 10 MB of JSON
_UPLOADS = 4  # requests at a time
_PARTS_AT_ONCE = 500
_MOST_PARTS = 10_000_000
_TRIES, _PAUSE_S, _TIMEOUT_S = 6, 0.5, 120
_POLL_S = 0.5
_FIRST, _MORE = 2, 4  # times k points are fetched, then times those, until k of them are distinct
_LEAST_CANDIDATES = 128  # of the graph, for each query
_OVERSAMPLING = 4.0  # of the int8 vectors in memory, before the server scores again with those in fp32
T = TypeVar("T")


@stored_file
class CollectionFile(TypedDict):
    """`collection.json`: where the points of an index are."""

    url: str
    collection: str


def check_server(folder: Store | None) -> None:
    """Raise `UserError` for what `sync_collection` refuses before its first row. `folder` is that of the last index."""
    _Collection(_url_for(folder), "").ask(lambda client: client.get_collections())


def _url_for(folder: Store | None) -> str:
    marked = _read_marker(folder) if folder is not None else None
    url = os.environ.get(URL) or (marked["url"] if marked else None)
    if not url:
        raise UserError("index: qdrant", f"{URL} is not set", f"set it to the server, as in {URL}=http://qdrant:6333")
    return url


def sync_collection(parts: Parts, folder: Store, old: IndexEntry | None) -> IndexEntry:
    """Give the collection of `folder` the rows of these parts, and return its entry.

    `old` is the entry of the last version. What it finds stays as it is. A killed job goes on. Raises `UserError`
    without the client of Qdrant, without a URL, and for a server that does not answer.
    """
    entry: IndexEntry = {"kind": "qdrant", "path": f"{INDEX}/{folder.url.rpartition('/')[2]}"}
    url = _url_for(folder)
    name = f"rzen-{hashlib.sha256(folder.url.encode()).hexdigest()[:32]}"
    collection = _Collection(url, name)
    is_new = not collection.ask(lambda client: client.collection_exists(name))
    before = old["version"] if old and not is_new else 0
    # Before the collection, so that its owner can be found.
    folder.write(MARKER, json.dumps(CollectionFile(url=url, collection=name)).encode())
    if is_new:
        collection.create(parts.read(0))
    changed = _Changes(collection, before, set(parts.paths))
    changed.undo_killed()
    if before and not (changed.gone or changed.new):
        return entry | {"version": before}
    changed.apply(parts)
    collection.wait_until_indexed()
    return entry | {"version": before + 1}


def keep_points(folder: Store, versions: Sequence[int]) -> None:
    """Delete the points that none of these versions of a collection has."""
    if (collection := _Collection.of(folder)) is not None:
        unused = [_range(UNTIL, lte=min(versions)), _range(FROM, gt=max(versions))]
        collection.delete(_qdrant().models.Filter(should=unused))


def drop_collection(folder: Store) -> None:
    """Delete the collection of a folder."""
    if (collection := _Collection.of(folder)) is not None:
        collection.ask(lambda client: client.delete_collection(collection.name))


@dataclass(frozen=True)
class QdrantIndex:
    """A version of a collection. The server finds candidates, and they are scored with their fp32 vectors."""

    collection: _Collection
    version: int
    schema: pa.Schema
    place: str

    @classmethod
    def open(cls, folder: Store, version: int, parts: Parts) -> QdrantIndex:
        """Open a version. Raises `UserError` if the collection is gone, or without the client."""
        collection = _Collection.of(folder)
        if collection is None or not collection.ask(lambda client: client.collection_exists(collection.name)):
            place = folder.url if collection is None else f"{collection.url} {collection.name}"
            raise UserError(place, "does not exist", "run `rzen embed` again")
        return cls(collection, version, parts.schema(), parts.place)

    @property
    def kind(self) -> IndexKind:
        """Return `qdrant`."""
        return "qdrant"

    def search(self, queries_QD: FloatArray, k: int, conditions: Sequence[Condition] = ()) -> list[list[Row]]:
        """Return the k best rows of each query, as `CorpusIndex` says. Cosines are those of the fp32 vectors."""
        queries_QD = np.asarray(queries_QD, dtype=np.float32)
        wanted = points_of(self.version, check_conditions(conditions, self.schema, self.place))
        found: list[list[Row]] = [[] for _ in queries_QD]
        open_Q, limit, exact = list(range(len(queries_QD))), _FIRST * k, False
        while open_Q:
            points = self._nearest(queries_QD[open_Q], limit, wanted, exact=exact)
            for query, some in zip(open_Q, points, strict=True):
                found[query] = distinct([_scored(point, queries_QD[query]) for point in some], k)
            if exact and max(map(len, points)) < limit:
                break
            # Duplicates of a target may take all places. Where few points fulfill the conditions, the graph may not
            # lead to all of them.
            exact = exact or min(map(len, points)) < limit
            open_Q = [query for query in open_Q if len(found[query]) < k]
            limit *= _MORE
        return found

    def _nearest(self, queries_QD: FloatArray, limit: int, wanted: Any, *, exact: bool) -> list[Any]:
        models = _qdrant().models
        params = models.SearchParams(
            exact=exact,
            hnsw_ef=max(_LEAST_CANDIDATES, limit),
            quantization=models.QuantizationSearchParams(rescore=True, oversampling=_OVERSAMPLING),
        )
        requests = [
            models.QueryRequest(
                query=query_D.tolist(), filter=wanted, params=params, limit=limit, with_payload=True, with_vector=True
            )
            for query_D in queries_QD
        ]
        found = self.collection.ask(lambda client: client.query_batch_points(self.collection.name, requests))
        return [response.points for response in found]


def points_of(version: int, conditions: Sequence[Condition] = ()) -> Any:
    """Return the filter of Qdrant for the points of a version that fulfill checked conditions.

    Raises `UserError` for a comparison of texts by `<` and `>`, which Qdrant does not have.
    """
    models = _qdrant().models
    must, must_not = [_range(FROM, lte=version)], [_range(UNTIL, lte=version)]
    for one in conditions:
        if one.operator in ("=", "!="):
            any_of = models.Filter(should=_equals(one))
            (must if one.operator == "=" else must_not).append(any_of)
            if one.operator == "!=":  # empty cells fulfill none
                must_not.append(models.IsEmptyCondition(is_empty=models.PayloadField(key=one.column)))
            continue
        (value,) = one.values
        if isinstance(value, str | bool):
            problem = f"is no number, and Qdrant compares only numbers with {one.operator}"
            raise UserError(f"filter {one.column}", problem, "use = or !=, or another kind of index")
        must.append(_range(one.column, **{_RANGES[one.operator]: value}))
    return models.Filter(must=must, must_not=must_not)


_RANGES = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}


def _equals(condition: Condition) -> list[Any]:
    """Return conditions of which one must hold. Qdrant matches texts, integers and booleans, and no other numbers."""
    models = _qdrant().models
    floats = [value for value in condition.values if isinstance(value, float)]
    if floats:
        return [_range(condition.column, gte=value, lte=value) for value in floats]
    return [
        models.FieldCondition(key=condition.column, match=models.MatchValue(value=value)) for value in condition.values
    ]


def _range(key: str, **limits: float) -> Any:
    models = _qdrant().models
    return models.FieldCondition(key=key, range=models.Range(**limits))


def _scored(point: Any, query_D: FloatArray) -> Row:
    row = {name: value for name, value in point.payload.items() if name not in (PART, FROM, UNTIL)}
    return row | {"score": float(np.asarray(point.vector, dtype=np.float32) @ query_D)}


class _Changes:
    """What makes the next version of a collection out of the one `before`, 0 for none."""

    def __init__(self, collection: _Collection, before: int, wanted: set[str]) -> None:
        self._collection, self._before = collection, before
        there = set(collection.parts(points_of(before)))
        self.gone, self.new = sorted(there - wanted), sorted(wanted - there)

    def undo_killed(self) -> None:
        """Take back what a killed job did, but for rows that the next version has, too."""
        collection, models = self._collection, _qdrant().models
        marked = models.Filter(must=[_range(UNTIL, gt=self._before)])
        collection.ask(lambda client: client.delete_payload(collection.name, [UNTIL], marked))
        others = sorted(set(collection.parts(self._begun)) - set(self.new))
        for chunk in _chunks(others):
            collection.delete(models.Filter(must=[_range(FROM, gt=self._before), _in_parts(chunk)]))

    def apply(self, parts: Parts) -> None:
        """Mark the rows of parts that are gone, and upload those of new ones that a killed job has not uploaded."""
        collection, version = self._collection, self._before + 1
        for chunk in _chunks(self.gone):
            live = points_of(self._before)
            live.must.append(_in_parts(chunk))
            collection.mark(live, {UNTIL: version})
        there = collection.parts(self._begun)
        numbers = {path: number for number, path in enumerate(parts.paths)}
        for path in self.new:
            table = parts.read(numbers[path])
            if there.get(path) != len(table):
                collection.upload(table, path, version)

    @property
    def _begun(self) -> Any:
        return _qdrant().models.Filter(must=[_range(FROM, gt=self._before)])


def _in_parts(paths: Sequence[str]) -> Any:
    models = _qdrant().models
    return models.FieldCondition(key=PART, match=models.MatchAny(any=list(paths)))


def _chunks(paths: Sequence[str]) -> Iterator[Sequence[str]]:
    for first in range(0, len(paths), _PARTS_AT_ONCE):
        yield paths[first : first + _PARTS_AT_ONCE]


class _Collection:
    """A collection of a server. Requests that fail because of the network or the server are repeated."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name
        self._client = _qdrant().QdrantClient(
            url=url, api_key=os.environ.get(API_KEY), timeout=_TIMEOUT_S, check_compatibility=False
        )

    @classmethod
    def of(cls, folder: Store) -> _Collection | None:
        """Return the collection that a folder names. None if it names none."""
        marked = _read_marker(folder)
        return cls(os.environ.get(URL) or marked["url"], marked["collection"]) if marked else None

    def ask(self, request: Callable[[Any], T]) -> T:
        """Return what the server answers. Raises `UserError` if it does not, or if it refuses."""
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        for attempt in range(1, _TRIES + 1):
            try:
                return request(self._client)
            except UnexpectedResponse as error:
                if attempt == _TRIES or (error.status_code or 500) < 500:
                    text = error.content.decode(errors="replace")[:200]
                    problem = f"refuses a request for {self.name}: {error.status_code} {text}"
                    raise UserError(self.url, problem, f"check {API_KEY} and the log of the server") from error
            except ResponseHandlingException as error:
                if attempt == _TRIES:
                    problem = f"no Qdrant server answers: {error.source}"
                    raise UserError(self.url, problem, f"start it, or set {URL} to its place") from error
            time.sleep(_PAUSE_S * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")

    def create(self, table: pa.Table) -> None:
        """Create the collection for rows like these, with payload indices for filters.

        Quantized vectors are in memory, and those in fp32 on the disk.
        """
        import pyarrow.types as types

        models = _qdrant().models
        width = len(table[VECTOR][0])
        vectors = models.VectorParams(size=width, distance=models.Distance.DOT, on_disk=True)
        int8 = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
        quantization = models.ScalarQuantization(scalar=int8)
        self.ask(
            lambda client: client.create_collection(
                self.name, vectors_config=vectors, quantization_config=quantization, on_disk_payload=True
            )
        )
        indexed = {PART: "keyword", FROM: "integer", UNTIL: "integer"}
        for column in table.schema:
            if column.name in (VECTOR, *_LONG):
                continue
            if types.is_boolean(column.type):
                indexed[column.name] = "bool"
            elif types.is_integer(column.type):
                indexed[column.name] = "integer"
            else:
                indexed[column.name] = "float" if types.is_floating(column.type) else "keyword"
        for name, type_ in indexed.items():
            self._index_payload(name, models.PayloadSchemaType(type_))

    def _index_payload(self, column: str, schema: Any) -> None:
        self.ask(lambda client: client.create_payload_index(self.name, column, schema))

    def delete(self, wanted: Any) -> None:
        """Delete the points that fulfill a filter."""
        selector = _qdrant().models.FilterSelector(filter=wanted)
        self.ask(lambda client: client.delete(self.name, selector))

    def mark(self, wanted: Any, payload: dict[str, Any]) -> None:
        """Add a payload to the points that fulfill a filter."""
        self.ask(lambda client: client.set_payload(self.name, payload, wanted))

    def parts(self, wanted: Any) -> dict[str, int]:
        """Return part -> number of its points that fulfill a filter."""
        found = self.ask(
            lambda client: client.facet(self.name, PART, facet_filter=wanted, limit=_MOST_PARTS, exact=True)
        )
        return {str(hit.value): hit.count for hit in found.hits}

    def upload(self, table: pa.Table, part: str, version: int) -> None:
        """Upload the rows of a part as points of a version. Again, it changes nothing."""
        models = _qdrant().models
        vectors_ND = vectors_of(table)
        rows = [row | {PART: part, FROM: version} for row in table.drop_columns([VECTOR]).to_pylist()]
        ids = [str(uuid.uuid5(uuid.NAMESPACE_URL, f"{version} {part} {row}")) for row in range(len(rows))]
        size = max(1, _NUMBERS_PER_REQUEST // vectors_ND.shape[1])
        batches = [
            models.Batch(
                ids=ids[first : first + size],
                vectors=vectors_ND[first : first + size].tolist(),
                payloads=rows[first : first + size],
            )
            for first in range(0, len(rows), size)
        ]
        with ThreadPoolExecutor(_UPLOADS) as pool:
            list(pool.map(self._upsert, batches))

    def _upsert(self, batch: Any) -> None:
        self.ask(lambda client: client.upsert(self.name, batch, wait=True))

    def wait_until_indexed(self) -> None:
        """Return when the server has built the graph of all points. Raises `UserError` if it cannot."""
        models = _qdrant().models
        while True:
            info = self.ask(lambda client: client.get_collection(self.name))
            if info.status == models.CollectionStatus.RED:
                problem = f"cannot index {self.name}: {info.optimizer_status}"
                raise UserError(self.url, problem, "see the log of the server")
            if info.status != models.CollectionStatus.YELLOW:
                return
            time.sleep(_POLL_S)


def _read_marker(folder: Store) -> CollectionFile | None:
    try:
        data = folder.read(MARKER)
    except FileNotFoundError:
        return None
    return parse_json(data, f"{folder.url}/{MARKER}", CollectionFile, "run `rzen embed` again")


def _qdrant() -> Any:
    return import_extra("qdrant_client", "qdrant", "index: qdrant")
