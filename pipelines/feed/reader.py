"""From rows of a plan to encoded batches: ranged reads, decoding, encoding, and reserves for what is damaged.

    rows -> stretches of neighbors -> one ranged read each -> decode -> encode -> collate

Knows neither Ray nor torch, so that it is tested and profiled alone; `feed.py` runs it in parallel.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipelines.config import DataConfig
from pipelines.errors import BadMedia, UserError
from pipelines.media.decode import Decoder
from pipelines.plan.plan import Plan
from pipelines.plan.sources import PlanSource
from pipelines.plan.types import Row, SourceTable
from pipelines.samples import DecodedSample, Members, Rejected, Sample
from pipelines.shards.duplicates import source_table
from pipelines.shards.index import ShardIndex, read_shard_index
from pipelines.shards.manifest import Manifest, ShardInfo, read_manifest, source_info
from pipelines.shards.mapping import SourceMapping
from pipelines.shards.read import Parser, external_sample_parser, parse_native_sample, read_samples, shard_file
from pipelines.shards.shuffle_check import SETTING, NeighborSimilarity, warning
from pipelines.storage.location import open_store, resolve_endpoint
from pipelines.storage.store import Store

MAX_RESERVES = 16
_RANGE_BYTES = 64 << 20  # a longer stretch of neighbors is read in parts
_SMALL = 10_000  # samples; no global batch is larger, so that no larger source is merged for being small
_INDEX_BYTES = 256 << 20  # of shard indices that a process keeps in memory

_Item = tuple[Sample, Members] | BadMedia  # what was read for a row


class Encoder(Protocol):
    """What the learning half makes of samples. Must pickle."""

    def sample(self, sample: DecodedSample) -> Any:
        """One sample, encoded. Raises `BadMedia` for one that the model cannot take."""

    def collate(self, samples: list[Any]) -> Any:
        """One rank's share of a batch, from encoded samples in plan order."""


@dataclass(frozen=True, slots=True)
class FeedBlock:
    """One rank's share of what is contrasted with each other: `num_samples` of one source, with one task."""

    source: str
    task: str
    epoch: int
    num_samples: int


@dataclass(frozen=True, slots=True)
class FeedBatch:
    """One rank's share of one global batch: good samples, block after block; `rejected` tells which they replace."""

    step: int
    rank: int
    blocks: tuple[FeedBlock, ...]
    batch: Any
    rejected: tuple[Rejected, ...]

    @property
    def source(self) -> str:
        """Of all blocks, joined by `+`."""
        return "+".join(block.source for block in self.blocks)

    @property
    def num_samples(self) -> int:
        """Of all blocks."""
        return sum(block.num_samples for block in self.blocks)


@dataclass(frozen=True, slots=True)
class _Source:
    """A source of the manifest. Of S shards, s holds positions `starts[s]` .. `starts[s + 1] - 1` (int64 [S + 1])."""

    shards: tuple[ShardInfo, ...]
    starts: npt.NDArray[np.int64]
    parse: Parser

    def locate(self, position: int) -> tuple[int, int]:
        """Ordinal of the shard that holds a position, and the row within it."""
        if not 0 <= position < self.starts[-1]:
            raise IndexError(f"sample {position} is outside 0..{self.starts[-1] - 1}")
        ordinal = int(np.searchsorted(self.starts, position, side="right")) - 1
        return ordinal, position - int(self.starts[ordinal])


class _Indices:
    """Shard indices, read when first needed. The least recently used are dropped beyond `_INDEX_BYTES`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: OrderedDict[str, ShardIndex] = OrderedDict()
        self.num_bytes = 0

    def of(self, shard: ShardInfo) -> ShardIndex:
        """Raises `UserError` for an index that is missing or not the manifest's."""
        if shard.index_path in self._kept:
            self._kept.move_to_end(shard.index_path)
            return self._kept[shard.index_path]
        index = read_shard_index(self._store, shard)
        self._kept[shard.index_path] = index
        self.num_bytes += index.num_bytes
        while self.num_bytes > _INDEX_BYTES and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self.num_bytes -= dropped.num_bytes
        return index


class Reader:
    """Reads one split. Pickles as its arguments: manifest, indices and decoders are made at first use, per process.

    Shards of ours are read from the data root, foreign ones in place, through the same endpoint.

    Without an encoder samples stay decoded, and a batch is their list. Every method raises `UserError` for data that
    is missing or out of reach. Not thread-safe.
    """

    def __init__(self, data: DataConfig, encoder: Encoder | None = None) -> None:
        self.data = data
        self.encoder = encoder
        self._endpoint = resolve_endpoint(data.endpoint)  # here, as workers may lack the variable
        self._store = open_store(data.root, self._endpoint)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("data", "encoder", "_endpoint", "_store")}

    @property
    def fingerprint(self) -> str:
        """Of the manifest: equal for byte-identical data."""
        return self._manifest.fingerprint

    def sizes(self) -> dict[str, int]:
        """Samples of each source of the split."""
        return {name: source.num_samples for name, source in self._manifest.sources.items()}

    def tables(self) -> dict[str, SourceTable]:
        """Each source of the split as `build_plan` takes it."""
        mixture = self.data.mixture
        grouped = {member for members in mixture.groups.values() for member in members}
        wanted = set(mixture.weights or self._manifest.sources)
        wanted |= {member for group in wanted for member in mixture.groups.get(group, ())}
        tables = {}
        for name, source in self._manifest.sources.items():
            if name in wanted:
                # Sources that are drawn together may hold duplicates of each other's targets.
                merged = name in grouped or (mixture.merge_small and source.num_samples < _SMALL)
                tables[name] = source_table(self._store, self.data.split, name, source, merged=merged)
            else:
                tables[name] = SourceTable(source.num_samples)
        return tables

    def fingerprints(self, plan: Plan) -> dict[str, str]:
        """Of each source that a plan draws from: equal for byte-identical data."""
        return {member: self._manifest.sources[member].fingerprint for s in plan.sources for member in s.members}

    def task_of(self, source: str) -> str:
        """The task that all samples of a source have."""
        return self._manifest.sources[source].task

    def tasks(self, plan: Plan) -> tuple[str, ...]:
        """Sorted tasks of all batches that the plan may give: each owns a temperature."""
        return tuple(sorted({self._batch_task(source) for source in plan.sources}))

    def unshuffled(self, plan: Plan) -> list[str]:
        """A warning for each source of the plan whose neighbors are alike, as its index job has measured."""
        measured = self._manifest.settings.get(SETTING, {})
        run_length = self.data.mixture.run_length
        told = (
            warning(member, NeighborSimilarity(**measured[member]), run_length, source.batch)
            for source in plan.sources
            for member in source.members
            if member in measured
        )
        return [text for text in told if text]

    def raw(self, source: str, indices: Iterable[int]) -> Iterator[tuple[Sample, Members]]:
        """Samples and their files, undecoded, in the order asked for. Raises `BadMedia` (`damaged_shard`)."""
        for _, item in self._read((source, index) for index in indices):
            if isinstance(item, BadMedia):
                raise item
            yield item

    def samples(self, source: str, indices: Iterable[int]) -> Iterator[DecodedSample | Rejected]:
        """Decoded samples in the order asked for, each either good or told as rejected."""
        for row, item in self._read((source, index) for index in indices):
            try:
                yield self._decoded(item)
            except BadMedia as error:
                yield self._rejected(row, error)

    def batch(self, plan: Plan, step: int, rank: int, world_size: int) -> FeedBatch:
        """One rank's share of global batch `step`, encoded and collated.

        A bad sample is replaced by a reserve of the plan, and told in `rejected`. Raises `UserError` if none is good.
        """
        share = plan.batch(step, rank, world_size)
        rejected: list[Rejected] = []
        encoded: list[Any] = []
        sizes = [len(block.rows) for block in share.blocks]
        starts = np.cumsum([0, *sizes[:-1]]) * world_size + rank * np.array(sizes)  # in the whole batch
        positions = np.concatenate([start + np.arange(size) for start, size in zip(starts, sizes, strict=True)])
        for position, (row, item) in zip(positions.tolist(), self._read(share.rows), strict=True):
            try:
                encoded.append(self._encoded(item))
            except BadMedia as error:
                rejected.append(self._rejected(row, error))
                encoded.append(self._replacement(plan, step, position, rejected))
        batch = self.encoder.collate(encoded) if self.encoder else encoded
        tasks = {source.name: self._batch_task(source) for source in plan.sources}
        blocks = [FeedBlock(block.source, tasks[block.source], block.epoch, len(block.rows)) for block in share.blocks]
        return FeedBatch(step, rank, tuple(blocks), batch, tuple(rejected))

    def _replacement(self, plan: Plan, step: int, position: int, rejected: list[Rejected]) -> Any:
        """The first good reserve, encoded; the bad ones before it are added to `rejected`."""
        for row, item in self._read(plan.reserves(step, position, MAX_RESERVES)):
            try:
                return self._encoded(item)
            except BadMedia as error:
                rejected.append(self._rejected(row, error))
        last = rejected[-1]
        raise UserError(
            f"{self._store.url}/{self.data.split}/{plan.batch(step).rows[position][0]}",
            f"has no sample left to replace a bad one in step {step}; the last failure is"
            f" {last.reason} of {last.origin} ({last.detail})",
            "replace its files, or leave the source out of data.mixture.weights",
        )

    def _encoded(self, item: _Item) -> Any:
        decoded = self._decoded(item)
        return self.encoder.sample(decoded) if self.encoder else decoded

    def _decoded(self, item: _Item) -> DecodedSample:
        if isinstance(item, BadMedia):
            raise item
        # Ingest has decoded every file of ours in a killable child once; nobody has looked at those of strangers.
        # Images cannot run away, as their size is limited before they are decoded.
        sample, members = item
        sample = replace(sample, negatives=sample.negatives[: self.data.negatives_per_sample])
        kinds = {media.kind for side in sample.inputs() for media in side.media}
        is_foreign = self._manifest.sources[sample.source].mapping is not None
        decoder = self._isolated_decoder if is_foreign and kinds - {"image"} else self._decoder
        return decoder.sample(sample, members, self.data.instructions)

    def _read(self, rows: Iterable[Row]) -> Iterator[tuple[Row, _Item]]:
        """Each row with what was read for it, in order, holding one stretch of neighbors in memory."""
        for stretch in self._stretches(rows):
            yield from zip(stretch, self._read_stretch(stretch), strict=True)

    def _stretches(self, rows: Iterable[Row]) -> Iterator[list[Row]]:
        """Cuts rows into those that one ranged read gives. A run of the plan stays whole, unless it crosses shards."""
        stretch: list[Row] = []
        for row in rows:
            if stretch and not self._extends(stretch, row):
                yield stretch
                stretch = []
            stretch.append(row)
        if stretch:
            yield stretch

    def _extends(self, stretch: Sequence[Row], row: Row) -> bool:
        (source, first), (_, last) = stretch[0], stretch[-1]
        if row != (source, last + 1):
            return False
        shard, begin = self._source(source).locate(first)
        following, end = self._source(source).locate(last + 1)
        if shard != following:
            return False
        _, length = self._indices.of(self._source(source).shards[shard]).span(begin, end)
        return length <= _RANGE_BYTES

    def _read_stretch(self, stretch: Sequence[Row]) -> Sequence[_Item]:
        source, first = stretch[0]
        ordinal, begin = self._source(source).locate(first)
        shard = self._source(source).shards[ordinal]
        store, path = shard_file(self._store, shard, self._endpoint)
        rows = range(begin, begin + len(stretch))
        try:
            return read_samples(store, path, self._indices.of(shard), rows, self._source(source).parse)
        except FileNotFoundError as error:
            place = f"{store.url}/{path}"
            raise UserError(place, "is named in the manifest but missing", shard.remedy) from error

    def _rejected(self, row: Row, error: BadMedia) -> Rejected:
        source, position = row
        ordinal, within = self._source(source).locate(position)
        shard = self._source(source).shards[ordinal]
        store, path = shard_file(self._store, shard, self._endpoint)
        origin = f"{store.url}/{path} key {self._indices.of(shard).keys[within]}"
        return Rejected(origin, error.reason, error.detail)

    def _batch_task(self, source: PlanSource) -> str:
        tasks = {self.task_of(member) for member in source.members}
        return tasks.pop() if len(tasks) == 1 else source.name

    def _source(self, name: str) -> _Source:
        if name not in self._sources:
            info = source_info(self._store, self._manifest, name)
            starts = np.cumsum([0, *(shard.num_samples for shard in info.shards)], dtype=np.int64)
            mapping = info.mapping
            parse = (
                parse_native_sample
                if mapping is None
                else external_sample_parser(name, SourceMapping.model_validate(mapping))
            )
            self._sources[name] = _Source(info.shards, starts, parse)
        return self._sources[name]

    @cached_property
    def _manifest(self) -> Manifest:
        return read_manifest(self._store, self.data.split)

    @cached_property
    def _sources(self) -> dict[str, _Source]:
        return {}

    @cached_property
    def _indices(self) -> _Indices:
        return _Indices(self._store)

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.data.media)

    @cached_property
    def _isolated_decoder(self) -> Decoder:
        return Decoder(self.data.media, isolated=True)
