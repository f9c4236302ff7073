"""An embedded corpus, which `rzen embed` writes: what it was made of, its vectors, and the nearest ones to a query.

`rzen search` and `Embedder.search` read it here, so that both give the same hits.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NotRequired

import numpy as np
from typing_extensions import TypedDict

from pipelines.config import DataConfig, NonNegativeInt
from pipelines.errors import UserError
from pipelines.instructions import INSTRUCTIONS
from pipelines.samples import MODALITIES, DecodedInput, MediaKind, Modality
from pipelines.storage.location import open_store
from pipelines.storage.store import Store
from pipelines.stored_json import parse_json, stored_file
from rzen.config import Dtype
from rzen.embedding.inputs import Embeddable, InputReader, named
from rzen.embedding.tasks import NamedTask
from rzen.evaluation.ranking import top_k
from rzen.evaluation.vectors import FloatArray, StoredArray, as_stored, check_width
from rzen.model.checkpoints import MadeBy

if TYPE_CHECKING:  # models are loaded without pyarrow
    import pyarrow as pa

MANIFEST = "vectors.json"
_TASKS: dict[MediaKind, str] = {"image": "text_image", "document": "text_page", "video": "text_video"}


@stored_file
class VectorsFile(TypedDict):
    """`vectors.json`: the parts of a dataset's vectors, and what they were made of."""

    parts: list[str]
    num_vectors: NonNegativeInt
    model: str
    config: str
    made_by: NotRequired[MadeBy]
    dtype: Dtype | None
    data: DataConfig
    fingerprints: NotRequired[dict[str, str]]
    """Split -> fingerprint of the manifest of the data. Missing in files of earlier versions, as `made_by`."""


@dataclass(frozen=True, slots=True)
class CorpusHit:
    """A target that a search found.

    `rank` counts from 1, `score` is the cosine with the query. `title` is the caption, or the text itself for a text.
    `origin` is the file (and page or line in it). The target is number `index` of `source` in the dataset's `split`.
    """

    rank: int
    score: float
    modality: Modality
    title: str
    origin: str
    split: str
    source: str
    index: int


@dataclass(frozen=True)
class Corpus:
    """Targets that may be found, each once, and their unit vectors `[N, D]`.

    `rows` has the columns of a part without `vector`. `key` is equal for equal content.
    """

    url: str
    key: str
    manifest: VectorsFile
    rows: pa.Table
    vectors: StoredArray

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
                    decoded = replace(
                        decoded, instruction=self._fitting(decoded) if instruction is None else instruction
                    )
                found.append(decoded)
        finally:
            reader.close()
        return found

    def instruction_of(self, task: NamedTask) -> str:
        """Return the instruction of queries of a task; none if the targets have none."""
        return task["instruction"] if self.manifest["data"].instructions else ""

    def nearest(self, queries_QD: FloatArray, k: int) -> list[list[CorpusHit]]:
        """Return the k best targets for each query, best first. Raises `UserError` for vectors of another width."""
        if k < 1:
            raise UserError("top_k", f"is {k}", "use at least 1")
        if not len(queries_QD):
            return []
        check_width(self.vectors, queries_QD.shape[1], self.url)
        rows_QK, scores_QK = top_k(queries_QD, self.vectors, k)
        return [
            [
                CorpusHit(rank, float(score), **row)
                for rank, (row, score) in enumerate(zip(self._described(rows_K), scores_K, strict=True), start=1)
            ]
            for rows_K, scores_K in zip(rows_QK, scores_QK, strict=True)
        ]

    def titled(self, title: str, query_D: FloatArray) -> CorpusHit | None:
        """Return the target with this caption that is nearest to the query, with its rank; None if none has it."""
        rows = np.flatnonzero(self.rows["title"].to_numpy(zero_copy_only=False) == title)
        if not len(rows):
            return None
        scores = self.vectors @ query_D
        best = rows[np.argmax(scores[rows])]
        rank = 1 + int((scores > scores[best]).sum())
        (row,) = self._described([best])
        return CorpusHit(rank, float(scores[best]), **row)

    def _described(self, rows_K: Any) -> list[dict[str, Any]]:
        columns = ["modality", "title", "origin", "split", "source", "index"]
        described: list[dict[str, Any]] = self.rows.select(columns).take(rows_K).to_pylist()
        return described

    def _fitting(self, query: DecodedInput) -> str:
        if not self.manifest["data"].instructions:
            return ""
        if not query.visuals:
            return INSTRUCTIONS["text_image"][0]
        return INSTRUCTIONS["image_text_image"][0] if query.text else INSTRUCTIONS[_TASKS[query.visuals[0].kind]][1]


def read_vectors_file(store: Store) -> VectorsFile:
    """Return `vectors.json`. Raises `FileNotFoundError`, and `UserError` for a damaged one."""
    return _parsed(store, store.read(MANIFEST))


def read_corpus(
    url: str, modalities: Sequence[Modality] | None = None, endpoint: str | None = None, known: Corpus | None = None
) -> Corpus:
    """Read the vectors at a directory or s3:// URL; of equal targets the first one. `None` stands for all modalities.

    `known` is returned if it has the same content. Raises `UserError` where there are no vectors, or none of these
    modalities.
    """
    store = open_store(url, endpoint)
    data = _read_manifest(store)
    if unknown := set(modalities or ()) - set(MODALITIES):
        raise UserError("modalities", f"has {min(unknown)!r}", f"use {', '.join(MODALITIES)}")
    key = hashlib.sha256(json.dumps([repr(store), data.hex(), sorted(modalities or ())]).encode()).hexdigest()
    if known is not None and known.key == key:
        return known
    manifest = _parsed(store, data)
    return Corpus(store.url, key, manifest, *_read_rows(store, manifest, modalities))


def read_manifest(url: str, endpoint: str | None = None) -> VectorsFile:
    """Return what the vectors at a directory or s3:// URL were made of. Raises `UserError` where there are none."""
    store = open_store(url, endpoint)
    return _parsed(store, _read_manifest(store))


def _read_manifest(store: Store) -> bytes:
    try:
        return store.read(MANIFEST)
    except FileNotFoundError as error:
        fix = "run a job of kind embed that writes here"
        raise UserError(f"{store.url}/{MANIFEST}", "does not exist", fix) from error


def _parsed(store: Store, data: bytes) -> VectorsFile:
    return parse_json(data, f"{store.url}/{MANIFEST}", VectorsFile, "run the job embed again")


def _read_rows(
    store: Store, manifest: VectorsFile, modalities: Sequence[Modality] | None
) -> tuple[pa.Table, StoredArray]:
    import pyarrow as pa

    tables = [_read_part(store, part) for part in manifest["parts"]]
    if not tables:
        raise UserError(store.url, "holds no vectors", "embed a dataset with targets that can be decoded")
    table = pa.concat_tables(tables)
    _, first = np.unique(table["target_sha256"].to_numpy(zero_copy_only=False), return_index=True)
    wanted = np.isin(table["modality"].to_numpy(zero_copy_only=False), modalities or MODALITIES)
    kept = np.intersect1d(first, np.flatnonzero(wanted))
    if not len(kept):
        raise UserError("modalities", f"{store.url} holds none of {', '.join(modalities or ())}", "ask for others")
    table = table.take(kept)
    return table.drop_columns(["vector"]), as_stored(np.stack(table["vector"].to_numpy(zero_copy_only=False)))


def _read_part(store: Store, path: str) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(io.BytesIO(store.read(path)))
    except (FileNotFoundError, pa.ArrowException, OSError) as error:
        raise UserError(f"{store.url}/{path}", f"cannot be read: {error}", "run the job embed again") from error


def _has_instruction(query: Embeddable) -> bool:
    if isinstance(query, dict):
        return query.get("instruction") is not None
    return isinstance(query, DecodedInput)
