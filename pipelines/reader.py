"""From rows of a plan to encoded batches: ranged reads, decoding, encoding, and reserves for what is damaged.

    rows -> stretches of neighbours -> one ranged read each -> decode -> encode -> collate

Knows neither Ray nor torch, so that it is tested and profiled alone; `feed.py` runs it in parallel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.config import DataConfig
from pipelines.errors import BadMedia, UserError
from pipelines.media.decode import Decoder
from pipelines.plan import SMALL, GlobalBatch, Plan, PlanSource
from pipelines.samples import DecodedSample, Rejected, Sample
from pipelines.shards import Manifest, Members, read_index, read_manifest, read_samples
from pipelines.storage import open_store

MAX_RESERVES = 16
_RANGE_BYTES = 64 << 20  # a longer stretch of neighbours is read in parts

Row = tuple[str, int]
_Item = tuple[Sample, Members] | BadMedia  # what was read for a row


class Encoder(Protocol):
    """What the learning half makes of samples. Must pickle."""

    def sample(self, sample: DecodedSample) -> Any:
        """One sample, encoded. Raises `BadMedia` for one that the model cannot take."""

    def collate(self, samples: list[Any]) -> Any:
        """One rank's share of a batch, from encoded samples in plan order."""


@dataclass(frozen=True, slots=True)
class FedBatch:
    """One rank's share of one global batch: `num_samples` good ones; `rejected` tells which others they replace."""

    step: int
    rank: int
    source: str
    task: str
    epoch: int
    num_samples: int
    batch: Any
    rejected: tuple[Rejected, ...]


@dataclass(frozen=True, slots=True)
class _Index:
    """Where the samples of a source lie: `read_index` by column."""

    keys: pa.ChunkedArray
    paths: tuple[str, ...]  # of the shards
    shards: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


class Reader:
    """Reads one split. Pickles as its arguments: manifest, indices and decoder are made at first use, per process.

    Without an encoder samples stay decoded, and a batch is their list. Every method raises `UserError` for data that
    is missing or out of reach. Not thread-safe.
    """

    def __init__(self, data: DataConfig, encoder: Encoder | None = None) -> None:
        self.data = data
        self.encoder = encoder
        self._store = open_store(data.root, data.endpoint)  # resolves the endpoint: workers may lack the variable

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("data", "encoder", "_store")}

    @property
    def fingerprint(self) -> str:
        """Of the manifest: equal for byte-identical data."""
        return self._manifest.fingerprint

    def sizes(self) -> dict[str, int]:
        """Samples of each source of the split: what `build_plan` takes."""
        return {name: source.num_samples for name, source in self._manifest.sources.items()}

    def task_of(self, source: str) -> str:
        """The task that all samples of a source have."""
        return self._manifest.sources[source].task

    def tasks(self, plan: Plan) -> tuple[str, ...]:
        """Sorted tasks of all batches that the plan may give: each owns a temperature."""
        return tuple(sorted({self._batch_task(source) for source in plan.sources}))

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

    def batch(self, plan: Plan, step: int, rank: int, world_size: int) -> FedBatch:
        """One rank's share of global batch `step`, encoded and collated.

        A bad sample is replaced by one of its `reserves`, and told in `rejected`. Raises `UserError` if none is good.
        """
        whole = plan.batch(step)
        rows = whole.of_rank(rank, world_size)
        rejected: list[Rejected] = []
        encoded: list[Any] = []
        for position, (row, item) in enumerate(self._read(rows), start=rank * len(rows)):
            try:
                encoded.append(self._encoded(item))
            except BadMedia as error:
                rejected.append(self._rejected(row, error))
                encoded.append(self._replacement(plan, whole, position, rejected))
        batch = self.encoder.collate(encoded) if self.encoder else encoded
        source = next(source for source in plan.sources if source.name == whole.source)
        task = self._batch_task(source)
        return FedBatch(step, rank, whole.source, task, whole.epoch, len(rows), batch, tuple(rejected))

    def _replacement(self, plan: Plan, whole: GlobalBatch, position: int, rejected: list[Rejected]) -> Any:
        """The first good reserve, encoded; the bad ones before it are added to `rejected`."""
        for row, item in self._read(reserves(plan, whole, position)):
            try:
                return self._encoded(item)
            except BadMedia as error:
                rejected.append(self._rejected(row, error))
        last = rejected[-1]
        raise UserError(
            f"{self._store.url}/{self.data.split}/{whole.rows[position][0]}",
            f"has no sample left to replace a bad one in step {whole.step}; the last failure is"
            f" {last.reason} of {last.origin} ({last.detail})",
            "run the ingest job again, or leave the source out of data.mixture.weights",
        )

    def _encoded(self, item: _Item) -> Any:
        decoded = self._decoded(item)
        return self.encoder.sample(decoded) if self.encoder else decoded

    def _decoded(self, item: _Item) -> DecodedSample:
        if isinstance(item, BadMedia):
            raise item
        return self._decoder.sample(*item, self.data.instructions)

    def _read(self, rows: Iterable[Row]) -> Iterator[tuple[Row, _Item]]:
        """Each row with what was read for it, in order, holding one stretch of neighbours in memory."""
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
        shards = self._index(source).shards
        if row != (source, last + 1) or shards[last] != shards[last + 1]:
            return False
        _, length = self._span(source, first, last + 1)
        return length <= _RANGE_BYTES

    def _span(self, source: str, first: int, last: int) -> tuple[int, int]:
        """Offset and length, in the shard, of the samples from `first` to `last` inclusive."""
        index = self._index(source)
        start = int(index.offsets[first])
        return start, int(index.offsets[last] + index.lengths[last]) - start

    def _read_stretch(self, stretch: Sequence[Row]) -> list[_Item]:
        """One ranged read; if its bytes are damaged, one for each sample, so that healthy neighbours are kept."""
        (source, first), (_, last) = stretch[0], stretch[-1]
        path, (offset, length) = self._shard_path(source, first), self._span(source, first, last)
        try:
            found = read_samples(self._store, path, offset, length)
            if len(found) != len(stretch):
                raise BadMedia("damaged_shard", f"{path} at byte {offset}: {len(found)} of {len(stretch)} samples")
            return [*found]
        except BadMedia as error:
            if len(stretch) == 1:
                return [error]
            return [item for row in stretch for item in self._read_stretch([row])]
        except FileNotFoundError as error:
            place = f"{self._store.url}/{path}"
            raise UserError(place, "is named in the manifest but missing", "run the ingest job again") from error

    def _rejected(self, row: Row, error: BadMedia) -> Rejected:
        source, position = row
        origin = f"{self._store.url}/{self._shard_path(source, position)} key {self._index(source).keys[position]}"
        return Rejected(origin, error.reason, error.detail)

    def _shard_path(self, source: str, position: int) -> str:
        index = self._index(source)
        return index.paths[int(index.shards[position])]

    def _batch_task(self, source: PlanSource) -> str:
        tasks = {self.task_of(member) for member in source.members}
        return tasks.pop() if len(tasks) == 1 else SMALL

    def _index(self, source: str) -> _Index:
        if source not in self._indices:
            table = read_index(self._store, self._manifest, source)
            shards, offsets, lengths = (table[name].to_numpy() for name in ("shard", "offset", "length"))
            paths = tuple(shard.path for shard in self._manifest.sources[source].shards)
            self._indices[source] = _Index(table["key"], paths, shards, offsets, lengths)
        return self._indices[source]

    @cached_property
    def _manifest(self) -> Manifest:
        return read_manifest(self._store, self.data.split)

    @cached_property
    def _indices(self) -> dict[str, _Index]:
        return {}

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.data.media)


def reserves(plan: Plan, batch: GlobalBatch, position: int) -> list[Row]:
    """Up to `MAX_RESERVES` samples that may stand in for row `position`, best first: of its source, not in the batch.

    A pure function of the plan's seed, the step and the position, so that every number of workers takes the same.
    Two bad rows may, rarely, get the same reserve; their equal targets are then no negatives of each other.
    """
    source = batch.rows[position][0]
    sizes = {name: size for group in plan.sources for name, size in zip(group.members, group.sizes, strict=True)}
    used = [index for name, index in batch.rows if name == source]
    free = np.setdiff1d(np.arange(sizes[source]), used)
    rng = np.random.default_rng([plan.seed, 2, batch.step, position])
    chosen = rng.choice(free, min(MAX_RESERVES, len(free)), replace=False)
    return [(source, int(index)) for index in chosen]
