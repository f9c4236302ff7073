"""What the rules compare of each input, kept so that a shard is read and decoded once.

    {cache}/texts/{digest}.parquet    a row an input: its text, MinHash, words in a row, language
    {cache}/media/{digest}.parquet    a row an input: its hashes, grids of colors, sizes, or why it cannot be decoded

The inputs of a shard are query and positive of each sample in turn. The digest is that of the content and of the
settings, so that a file never goes out of date, whatever rules read it.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import DataConfig, MediaConfig
from pipelines.curate.pictures import GRID_BYTES, picture_of, stored_size
from pipelines.curate.texts import NUM_PERMUTATIONS, language_of, min_hashes, ngram_hashes, normalized
from pipelines.errors import BadMedia, UserError
from pipelines.feed.reader import Reader
from pipelines.feed.rows import RowReader
from pipelines.items.decode import ItemDecoder
from pipelines.items.listing import ListedShard, shards_of
from pipelines.items.types import FRAMES, Item, content_id
from pipelines.media.decode import Decoder
from pipelines.media.files import read_file
from pipelines.media.libraries import library_versions
from pipelines.samples import Input, Members, Visual
from pipelines.shards.manifest import read_manifest
from pipelines.storage.location import open_store, resolve_endpoint
from pipelines.storage.store import Store

Family = Literal["texts", "media"]
FAMILIES: tuple[Family, ...] = ("texts", "media")
_VERSION = 1  # of what the files hold
_FRAMES = 4  # of a video
_PIXELS = 512 * 512  # of a decoded picture: its grid has 256 cells
_LETTERS = {"image": "i", "video": "v", "document": "d"}
_ID_BYTES = 16

_TEXTS = pa.schema(
    [
        ("key", pa.string()),
        ("content", pa.binary(_ID_BYTES)),  # of text and media, as the shard or the item says
        ("graded", pa.bool_()),
        ("num_media", pa.int32()),
        ("text", pa.string()),  # normalized
        ("num_chars", pa.int32()),  # of the text as it is
        ("min_hash", pa.binary(4 * NUM_PERMUTATIONS)),
        ("ngrams", pa.list_(pa.uint64())),
        ("language", pa.string()),
        ("confidence", pa.float32()),
    ]
)
_MEDIA = pa.schema(
    [
        ("kinds", pa.string()),  # a letter for each medium
        ("content", pa.uint64()),  # of the bytes of all media, 0 without
        ("width", pa.int32()),  # of the first medium
        ("height", pa.int32()),
        ("hashes", pa.list_(pa.uint64())),  # of each frame of each medium
        ("grids", pa.binary()),  # 768 bytes a frame
        ("reason", pa.string()),  # why a medium cannot be decoded
    ]
)
_SCHEMAS: dict[Family, pa.Schema] = {"texts": _TEXTS, "media": _MEDIA}


@dataclass(frozen=True, slots=True)
class FeatureSettings:
    """What decides the features, in addition to the inputs."""

    media: MediaConfig
    ngram_words: int
    min_words: int
    languages: bool

    @classmethod
    def of(cls, media: MediaConfig, ngram_words: int, min_words: int, languages: bool) -> FeatureSettings:
        """Return settings with the limits of `media`, and few frames and pixels: the features are small."""
        small = media.model_copy(
            update={"frames": _FRAMES, "fps": None, "image_pixels": _PIXELS, "page_pixels": _PIXELS}
        )
        return cls(small, ngram_words, min_words, languages)

    def path(self, family: Family, inputs: str) -> str:
        """Return the place of the features of these inputs, which are identified by their content."""
        if family == "media":
            decides: object = [self.media.model_dump(mode="json"), library_versions(self.media)]
        else:
            decides = [self.ngram_words, self.min_words, self.languages]
        return f"{family}/{content_id([_VERSION, family, decides, inputs])}.parquet"


@dataclass(frozen=True, slots=True)
class ShardInputs:
    """Both inputs of each sample of a shard, in order. `fingerprint` is that of the manifest that lists the shard."""

    data: DataConfig
    shard: ListedShard
    fingerprint: str

    @property
    def digest(self) -> str:
        """Return what identifies the inputs."""
        return self.shard.digest

    def __len__(self) -> int:
        return 2 * (self.shard.stop - self.shard.start)


def shard_inputs(data: DataConfig) -> list[ShardInputs]:
    """Return the inputs of each shard of a split, source by source, in the order of their samples."""
    reader = Reader(data)
    return [ShardInputs(data, shard, reader.fingerprint) for shard in shards_of(reader)]


@dataclass(frozen=True, slots=True)
class FileInputs:
    """Inputs of evaluation sets, whose media are files."""

    items: tuple[Item, ...]

    @property
    def digest(self) -> str:
        """Return what identifies the inputs."""
        return content_id([item.id for item in self.items])

    def __len__(self) -> int:
        return len(self.items)


Inputs = ShardInputs | FileInputs


@dataclass(frozen=True, slots=True)
class Work:
    """Features that are missing: those of some inputs, of some families."""

    inputs: Inputs
    families: tuple[Family, ...]


def missing_features(
    inputs: Sequence[Inputs], families: Sequence[Family], settings: FeatureSettings, cache: Store
) -> list[Work]:
    """Return what is not in the cache yet."""
    there = {path for family in families for path in cache.list(family)}
    found = []
    for some in inputs:
        lacking = tuple(family for family in families if settings.path(family, some.digest) not in there)
        if lacking:
            found.append(Work(some, lacking))
    return found


def write_features(work: Work, settings: FeatureSettings, cache: Store) -> int:
    """Read inputs once and keep their features. Return the number of inputs."""
    inputs = work.inputs
    trusted = isinstance(inputs, ShardInputs) and inputs.data.trusted
    with Decoder(settings.media, trusted=trusted) as decoder:
        rows: dict[Family, list[dict[str, Any]]] = {family: [] for family in work.families}
        for facts, media in _read(inputs, settings, decoder, "media" in work.families):
            if "texts" in rows:
                rows["texts"].append(facts)
            if media is not None:
                rows["media"].append(media)
    if "texts" in rows:
        _add_text_features(rows["texts"], settings)
    for family, some in rows.items():
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(some, schema=_SCHEMAS[family]), sink, compression="zstd")
        cache.write(settings.path(family, inputs.digest), sink.getvalue())
    return len(inputs)


def read_features(family: Family, inputs: Inputs, settings: FeatureSettings, cache: Store) -> pa.Table:
    """Return the features of inputs, a row each. Raises `UserError` for a file that is missing or damaged."""
    path = settings.path(family, inputs.digest)
    place, fix = f"{cache.url}/{path}", "delete the file, and run the job again"
    try:
        with pq.ParquetFile(io.BytesIO(cache.read(path)), pre_buffer=False) as file:
            table = file.read(use_threads=False)
    except FileNotFoundError as error:
        raise UserError(place, "was deleted while it was needed", "run the job again") from error
    except pa.ArrowException as error:
        raise UserError(place, f"cannot be read: {error}", fix) from error
    if table.schema != _SCHEMAS[family] or len(table) != len(inputs):
        raise UserError(place, f"has {len(table)} rows, not {len(inputs)}, or other columns", fix)
    return table


_Row = tuple[dict[str, Any], dict[str, Any] | None]


def _read(inputs: Inputs, settings: FeatureSettings, decoder: Decoder, decode: bool) -> Iterator[_Row]:
    if isinstance(inputs, ShardInputs):
        return _of_shard(inputs, decoder, decode)
    return _of_files(inputs, settings, decode)


def _of_shard(inputs: ShardInputs, decoder: Decoder, decode: bool) -> Iterator[_Row]:
    shard, data = inputs.shard, inputs.data
    rows = _row_reader(data.root, resolve_endpoint(data.endpoint), shard.split, inputs.fingerprint)
    for _, found in rows.read((shard.source, index) for index in range(shard.start, shard.stop)):
        if isinstance(found, BadMedia):
            bad = _bad_media("", found.reason) if decode else None
            yield from ((_facts("", "", Input(), False), bad), (_facts("", "", Input(), False), bad))
            continue
        sample, members = found
        for part, sha256 in ((sample.query, sample.query_sha256), (sample.positive, sample.target_sha256)):
            media = _decoded(part, members, decoder) if decode else None
            yield _facts(sample.key, sha256, part, sample.relevance is not None), media


@lru_cache(2)
def _row_reader(root: str, endpoint: str | None, split: str, fingerprint: str) -> RowReader:
    """Return a reader that a process keeps: the manifest of a million shards takes seconds to read."""
    store = open_store(root, endpoint)
    manifest = read_manifest(store, split)
    if manifest.fingerprint != fingerprint:
        raise UserError(f"{store.url} {split}", "was replaced while it was read", "run the job again")
    return RowReader(store, manifest, endpoint)


def _decoded(part: Input, members: Members, decoder: Decoder) -> dict[str, Any]:
    kinds = _kinds(part)
    try:
        visuals = [decoder.member(media.kind, members[media.member]) for media in part.media]
    except BadMedia as error:
        return _bad_media(kinds, error.reason)
    except KeyError:
        return _bad_media(kinds, "missing_member")
    data = [members[media.member] for media in part.media]
    size = stored_size(part.media[0].kind, data[0], visuals[0].frames) if visuals else (0, 0)
    return _media(kinds, visuals, data, size)


def _of_files(inputs: FileInputs, settings: FeatureSettings, decode: bool) -> Iterator[_Row]:
    items = ItemDecoder(settings.media)
    for item in inputs.items:
        facts = _facts(item.name, item.content, item.input, False)
        if not decode:
            yield facts, None
            continue
        kinds = _kinds(item.input)
        try:
            visuals = items.input(item).visuals
            refs = [item.files[media.member] for media in item.input.media if not media.member.endswith(f".{FRAMES}")]
            whole = len(refs) == len(item.input.media) and all(ref.page is None for ref in refs)
            data = [read_file(ref.path, settings.media) for ref in refs] if whole else []
            size = (visuals[0].frames.shape[2], visuals[0].frames.shape[1]) if visuals else (0, 0)
            yield facts, _media(kinds, visuals, data, size)
        except BadMedia as error:
            yield facts, _bad_media(kinds, error.reason)


def _kinds(part: Input) -> str:
    return "".join(_LETTERS[media.kind] for media in part.media)


def _facts(key: str, content: str, part: Input, graded: bool) -> dict[str, Any]:
    id = bytes.fromhex(content[: 2 * _ID_BYTES]).ljust(_ID_BYTES, b"\0")
    return {"key": key, "content": id, "graded": graded, "num_media": len(part.media), "text": part.text}


def _add_text_features(rows: list[dict[str, Any]], settings: FeatureSettings) -> None:
    texts = [row["text"] for row in rows]
    plain = [normalized(text) for text in texts]
    distinct = list(dict.fromkeys(plain))
    signatures = dict(zip(distinct, min_hashes(distinct), strict=True))
    for row, text, shown in zip(rows, plain, texts, strict=True):
        language, confidence = language_of(shown) if settings.languages and shown else ("", 0.0)
        row |= {
            "text": text.encode("utf-8", "replace").decode(),
            "num_chars": len(shown),
            "min_hash": signatures[text].tobytes(),
            "ngrams": ngram_hashes(shown, settings.ngram_words, settings.min_words),
            "language": language,
            "confidence": confidence,
        }


def _media(kinds: str, visuals: Sequence[Visual], data: Sequence[bytes], size: tuple[int, int]) -> dict[str, Any]:
    pictures = [picture_of(frame) for visual in visuals for frame in visual.frames]
    digest = hashlib.sha256()
    for some in data:
        digest.update(hashlib.sha256(some).digest())
    whole = int.from_bytes(digest.digest()[:8], "little") if data else 0
    grids = b"".join(picture.grid.tobytes() for picture in pictures)
    assert len(grids) == GRID_BYTES * len(pictures)
    return {
        "kinds": kinds,
        "content": whole,
        "width": size[0],
        "height": size[1],
        "hashes": [picture.hash for picture in pictures],
        "grids": grids,
        "reason": "",
    }


def _bad_media(kinds: str, reason: str) -> dict[str, Any]:
    return {
        "kinds": kinds,
        "content": 0,
        "width": 0,
        "height": 0,
        "hashes": [],
        "grids": b"",
        "reason": reason,
    }
