"""Rows of a plan to encoded batches: ranged reads, decoding, encoding, and reserves for damaged samples.

    rows -> runs of adjacent rows -> one ranged read each -> decode -> encode -> collate

Neither Ray nor torch is imported, so that this can be tested and profiled without them. `feed.py` runs it in parallel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

import numpy as np

from pipelines.candidates.table import CandidateTable, open_table
from pipelines.candidates.types import content_id
from pipelines.config import DataConfig
from pipelines.errors import BadMedia, UserError
from pipelines.feed.batch import Candidate, Encoder, FeedBatch, FeedBlock, NoEncoder
from pipelines.feed.candidates import CandidateReader, with_plan_rows
from pipelines.feed.rows import RowReader, StoredSample
from pipelines.media.cache import PixelCache
from pipelines.media.decode import Decoder
from pipelines.plan.plan import Plan
from pipelines.plan.sources import PlanSource
from pipelines.plan.subset import seed_of_name
from pipelines.plan.types import INSTRUCTION_STREAM, Row, SourceTable
from pipelines.plan.weights import one_of_each_query
from pipelines.samples import Clip, DecodedInput, DecodedSample, Input, Members, Rejected, Sample, TimeRange
from pipelines.shards.duplicates import source_table
from pipelines.shards.index import content_sha256
from pipelines.shards.manifest import FORMAT_VERSION, Manifest, SourceInfo, is_stored, read_manifest, source_info
from pipelines.shards.shuffle_check import SETTING, NeighborSimilarity, warning
from pipelines.storage.location import open_store, resolve_endpoint

MAX_RESERVES = 16
_PICKLED = ("data", "encoder", "_endpoint", "_store", "_table_fingerprints")
Role = Literal["query", "positive"]
_SMALL = 10_000  # samples; no global batch is larger, so that no larger source is merged for being small


class Reader:
    """Reads one split. Pickles as its arguments: each process makes its own manifest, indices and decoders.

    Shards that ingest wrote are read from the data root, and external ones in place, through the same endpoint.

    Without an encoder, samples stay decoded and a batch is a list of them. Every method raises `UserError` for data
    that are missing or out of reach. Not thread-safe.
    """

    def __init__(self, data: DataConfig, encoder: Encoder | None = None) -> None:
        self.data = data
        self.encoder = encoder
        self._endpoint = resolve_endpoint(data.endpoint)  # here, because workers may lack the variable
        self._store = open_store(data.root, self._endpoint)
        self._cache: PixelCache | None = None
        self._table_fingerprints: dict[str, str] = {}

    def use_cache(self, cache: PixelCache) -> None:
        """Take pixels from a cache of this node, and keep there what is decoded. Call it before the first sample."""
        self._cache = cache

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_cache": None}

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in _PICKLED}

    def exists(self) -> bool:
        """Return whether the split was published."""
        return is_stored(self._store, self.data.split)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest: equal for byte-identical data."""
        return self._manifest.fingerprint

    def sizes(self) -> dict[str, int]:
        """Return the number of samples of each source of the split."""
        return {name: source.num_samples for name, source in self._manifest.sources.items()}

    def tables(self) -> dict[str, SourceTable]:
        """Return each source of the split as `build_plan` takes it. Raises `UserError` for a split without a sample."""
        if not self._manifest.sources:
            problem = "has no pair to train on"
            fix = 'caption the raw files with lines such as {"file": "a.jpg", "caption": "a dog"} in captions.jsonl'
            raise UserError(f"{self._store.url}/{self.data.split}", problem, f"{fix}, or only embed and search them")
        mixture = self.data.mixture
        grouped = {member for members in mixture.groups.values() for member in members}
        wanted = set(mixture.weights or self._manifest.sources)
        wanted |= {member for group in wanted for member in mixture.groups.get(group, ())}
        tables = {}
        for name, source in self._manifest.sources.items():
            if name in wanted:
                tables[name] = self._table(name, source, is_grouped=name in grouped)
            else:
                tables[name] = SourceTable(source.num_samples)
        return tables

    def _table(self, name: str, source: SourceInfo, *, is_grouped: bool) -> SourceTable:
        # Sources that are drawn together may hold duplicates of each other's targets.
        merged = is_grouped or (self.data.mixture.merge_small and self._is_small(name, source))
        table = source_table(self._store, self.data.split, name, source, merged=merged)
        table = self._with_plan_rows(table, name)
        if self.data.mixture.positives == "all":
            return table
        if len(table.queries) < len(table.duplicates):
            problem = "says which samples to draw from by their queries, whose hashes these data do not have"
            fix = "run the ingest or index job again, or set it to all"
            raise UserError("data.mixture.positives", problem, fix)
        return one_of_each_query(table)

    def _is_small(self, name: str, source: SourceInfo) -> bool:
        """Return whether few samples of a source are left by the tables."""
        num_samples = source.num_samples
        return num_samples < _SMALL or self._with_plan_rows(SourceTable(num_samples), name).num_kept < _SMALL

    def _with_plan_rows(self, table: SourceTable, name: str) -> SourceTable:
        return with_plan_rows(table, name, self._candidate_table, self._curation)

    def fingerprints(self, plan: Plan) -> dict[str, str]:
        """Return the SHA-256 of each source that a plan draws from: equal for byte-identical data."""
        return {member: self._manifest.sources[member].fingerprint for member in plan.members}

    def table_fingerprints(self) -> dict[str, Any]:
        """Return the fingerprints of the candidate table and of the curation tables. Empty without any."""
        found: dict[str, Any] = {}
        if self._candidate_table is not None:
            found["candidates"] = self._candidate_table.fingerprint
        if self._curation:
            found["curation"] = sorted(table.fingerprint for table in self._curation)
        return found

    def has_teacher_scores(self) -> bool:
        """Return whether the candidate table holds scores of a judge."""
        table = self._candidate_table
        return table is not None and "judge" in (table.manifest.stage, *table.manifest.made_from)

    def has_candidates(self, source: str) -> bool:
        """Return whether the candidate table has rows of a source."""
        return self._candidate_table is not None and self._candidate_table.has_rows(source)

    def source(self, name: str) -> SourceInfo:
        """Return what the manifest says of a source. Raises `UserError` if the split has no such source."""
        return source_info(self._store, self._manifest, name)

    def task_of(self, source: str) -> str:
        """Return the task that all samples of a source have."""
        return self._manifest.sources[source].task

    def tasks(self, plan: Plan) -> tuple[str, ...]:
        """Return the sorted tasks of all batches that the plan may give. Each has its own temperature."""
        return tuple(sorted({self._batch_task(source) for source in plan.sources}))

    def warnings(self, plan: Plan) -> list[str]:
        """Return a warning for each source of the plan that its index job has found not to be shuffled.

        Return one more for a dataset whose equal queries are not known.
        """
        measured = self._manifest.settings.get(SETTING, {})
        run_length = self.data.mixture.run_length
        warnings = []
        if self._manifest.format_version < FORMAT_VERSION:
            warnings.append(
                f"{self.data.root} {self.data.split} has format {self._manifest.format_version}, without hashes of"
                " queries: batches may hold equal queries, which the loss masks. Run its ingest or index job again to"
                " keep them apart."
            )
        for source in plan.sources:
            for member in source.members:
                if member not in measured:
                    continue
                similarity = NeighborSimilarity(**measured[member])
                if text := warning(member, similarity, run_length, source.batch):
                    warnings.append(text)
        return warnings

    def raw(self, source: str, indices: Iterable[int]) -> Iterator[tuple[Sample, Members]]:
        """Yield samples and their files, undecoded, in the order given. Raises `BadMedia` (`damaged_shard`)."""
        for _, item in self._rows.read((source, index) for index in indices):
            if isinstance(item, BadMedia):
                raise item
            yield item

    def records(self, source: str, indices: Iterable[int]) -> Iterator[Sample | Rejected]:
        """Yield samples without their files, in the order given, with `Rejected` for each that cannot be read."""
        for row, item in self._rows.read((source, index) for index in indices):
            yield self._rejected(row, item) if isinstance(item, BadMedia) else item[0]

    def inputs(self, source: str, rows: Iterable[tuple[int, Role]]) -> Iterator[DecodedInput | Rejected]:
        """Yield one decoded input of a sample for each (index, role), in order, with `Rejected` for each bad one.

        Adjacent rows cost one request, and so do both inputs of a sample that follow each other.
        """
        wanted = [(index, [role for _, role in group]) for index, group in groupby(rows, key=itemgetter(0))]
        read = self._rows.read((source, index) for index, _ in wanted)
        for (row, item), (_, roles) in zip(read, wanted, strict=True):
            for role in roles:
                try:
                    yield getattr(self._decode(_only(item, role)), role)
                except BadMedia as error:
                    yield self._rejected(row, error)

    def segments(self, source: str, index: int, segments: Sequence[TimeRange]) -> Iterator[DecodedInput | Rejected]:
        """Yield each segment of a target that is a video, in the order of their starts, with one request for all.

        The text of the target goes with each of them. `Rejected` stands for one that cannot be decoded.
        """
        ((row, item),) = self._rows.read([(source, index)])
        try:
            sample, data = _video_of(item)
            instruction = sample.target_instruction if self.data.instructions else ""
            for segment, found in zip(segments, self._decoder.segments(data, segments), strict=True):
                if isinstance(found, BadMedia):
                    yield Rejected(f"{self._rows.origin(row)} {segment}", found.reason, found.detail)
                else:
                    yield DecodedInput(sample.positive.text, (found,), instruction)
        except BadMedia as error:
            yield from [self._rejected(row, error)] * len(segments)

    def clip(self, source: str, index: int, segment: TimeRange | None) -> Clip | None:
        """Return a target that is a video, or a segment of it, as a file that a browser plays.

        None if the target is no video or cannot be cut. Raises `BadMedia`.
        """
        ((_, item),) = self._rows.read([(source, index)])
        if isinstance(item, BadMedia):
            raise item
        if [media.kind for media in item[0].positive.media] != ["video"]:
            return None
        return self._decoder.clip(_video_of(item)[1], segment)

    def video_lengths(self, source: str, indices: Iterable[int]) -> Iterator[float | Rejected]:
        """Yield the length in seconds of each target that is a video, in order, without decoding it."""
        for row, item in self._rows.read((source, index) for index in indices):
            try:
                yield self._decoder.video_length(_video_of(item)[1])
            except BadMedia as error:
                yield self._rejected(row, error)

    def samples(self, source: str, indices: Iterable[int]) -> Iterator[DecodedSample | Rejected]:
        """Yield decoded samples in the order given, with `Rejected` for each bad one."""
        for row, item in self._rows.read((source, index) for index in indices):
            try:
                yield self._decode(item)
            except BadMedia as error:
                yield self._rejected(row, error)

    def batch(self, plan: Plan, step: int, rank: int, world_size: int) -> FeedBatch:
        """Return one rank's share of global batch `step`, encoded and collated.

        A bad sample is replaced by a reserve of the plan and listed in `rejected`. Raises `UserError` if no reserve is
        good.
        """
        share = plan.batch(step, rank, world_size)
        sizes = [len(block.rows) for block in share.blocks]
        # Reserves are chosen by the position in the whole batch, so that every number of workers takes the same. Blocks
        # of the whole batch are `world_size` times as long, and this rank's share of each is contiguous.
        starts = np.cumsum([0, *sizes[:-1]]) * world_size + rank * np.array(sizes)
        positions = np.concatenate([start + np.arange(size) for start, size in zip(starts, sizes, strict=True)])
        rejected: list[Rejected] = []
        good: list[_GoodRow] = []
        counts = self._cache_counts()
        epochs = [block.epoch for block in share.blocks for _ in block.rows]
        read = zip(positions.tolist(), epochs, self._rows.read(share.rows), strict=True)
        for position, epoch, (row, item) in read:
            try:
                good.append(self._encode(row, item, plan.seed, epoch))
            except BadMedia as error:
                rejected.append(self._rejected(row, error))
                good.append(self._replacement(plan, step, position, epoch, rejected))
        encoded, bad_candidates, num_candidates = self._with_candidates(good, epochs, plan.seed)
        batch = self._encoder.collate(encoded)
        tasks = {source.name: self._batch_task(source) for source in plan.sources}
        blocks = [FeedBlock(block.source, tasks[block.source], block.epoch, len(block.rows)) for block in share.blocks]
        hits, misses = (now - before for now, before in zip(self._cache_counts(), counts, strict=True))
        cached = hits / max(1, hits + misses)
        return FeedBatch(
            step, rank, tuple(blocks), batch, tuple(rejected), cached, tuple(bad_candidates), num_candidates
        )

    def _with_candidates(
        self, good: Sequence[_GoodRow], epochs: Sequence[int], seed: int
    ) -> tuple[list[Any], list[Rejected], int]:
        """Return the encoded rows with their candidates, the bad candidates, and the number of different ones.

        A bad candidate is left out. The positive of a row is not read again as a candidate of others.
        """
        reader, most = self._candidates, self.data.negatives_per_sample
        if reader is None or not most:
            return [one.encoded for one in good], [], 0
        chosen = []
        for one, epoch in zip(good, epochs, strict=True):
            room = 0 if one.sample.relevance is not None else most - len(one.sample.negatives[:most])
            draw = (seed, epoch) if self.data.negatives_draw == "random" else None
            chosen.append(reader.chosen(one.row, room, draw))
        ids = {number: id for some in chosen for number, id in zip(some.numbers, some.ids, strict=True)}
        positives = {content_id(one.sample.target_sha256): one for one in good}
        made: dict[int, tuple[Any, str]] = {}
        bad = []
        for number, id in ids.items():
            if id in positives and reader.is_own(number, positives[id].row[0]):
                made[number] = self._encoder.positive_of(positives[id].encoded), positives[id].sample.target_sha256
        for number, item, origin in reader.read({number: id for number, id in ids.items() if number not in made}):
            try:
                decoded = self._decode(_only(item, "positive"))
                made[number] = self._encoder.candidate(decoded.positive), decoded.sample.target_sha256
            except BadMedia as error:
                bad.append(Rejected(origin, error.reason, error.detail))
        encoded = []
        for one, some in zip(good, chosen, strict=True):
            scored = zip(some.numbers, some.teacher, strict=True)
            usable = [Candidate(*made[number], teacher) for number, teacher in scored if number in made]
            encoded.append(self._encoder.with_candidates(one.encoded, usable, some.positive_teacher))
        return encoded, bad, len(ids)

    def _cache_counts(self) -> tuple[int, int]:
        return (self._cache.num_hits, self._cache.num_misses) if self._cache else (0, 0)

    def _replacement(self, plan: Plan, step: int, position: int, epoch: int, rejected: list[Rejected]) -> _GoodRow:
        """Return the first good reserve, encoded. The bad ones before it are added to `rejected`."""
        for row, item in self._rows.read(plan.reserves(step, position, MAX_RESERVES)):
            try:
                return self._encode(row, item, plan.seed, epoch)
            except BadMedia as error:
                rejected.append(self._rejected(row, error))
        last = rejected[-1]
        raise UserError(
            f"{self._store.url}/{self.data.split}/{plan.batch(step).rows[position][0]}",
            f"has no sample left to replace a bad one in step {step}; the last failure is"
            f" {last.reason} of {last.origin} ({last.detail})",
            "replace its files, or leave the source out of data.mixture.weights",
        )

    def _encode(self, row: Row, item: StoredSample, seed: int, epoch: int) -> _GoodRow:
        decoded = self._decode(item)
        if decoded.sample.instruction_variants and decoded.query.instruction:
            wording = _drawn_wording(decoded.sample, row, seed, epoch)
            decoded = replace(decoded, query=replace(decoded.query, instruction=wording))
        return _GoodRow(row, decoded.sample, self._encoder.sample(decoded))

    def _decode(self, item: StoredSample) -> DecodedSample:
        if isinstance(item, BadMedia):
            raise item
        sample, members = item
        sample = replace(sample, negatives=sample.negatives[: self.data.negatives_per_sample])
        decoded = self._decoder.sample(sample, members, self.data.instructions)
        contents = tuple(content_sha256(negative, members) for negative in sample.negatives)
        return replace(decoded, negative_sha256=contents)

    def _rejected(self, row: Row, error: BadMedia) -> Rejected:
        return Rejected(self._rows.origin(row), error.reason, error.detail)

    def _batch_task(self, source: PlanSource) -> str:
        tasks = {self.task_of(member) for member in source.members}
        return tasks.pop() if len(tasks) == 1 else source.name

    @cached_property
    def _manifest(self) -> Manifest:
        return read_manifest(self._store, self.data.split)

    @cached_property
    def _rows(self) -> RowReader:
        return RowReader(self._store, self._manifest, self._endpoint)

    @property
    def _encoder(self) -> Encoder:
        return self.encoder or NoEncoder()

    @cached_property
    def _candidate_table(self) -> CandidateTable | None:
        if not self.data.candidates:
            return None
        table = self._open_table(self.data.candidates)
        table.check_candidates("name it in data.curation")
        return table

    @cached_property
    def _curation(self) -> list[CandidateTable]:
        return [self._open_table(url) for url in self.data.curation]

    def _open_table(self, url: str) -> CandidateTable:
        """Open a table of these data. Raises `UserError` for one of others, or one that was replaced meanwhile."""
        table = open_table(url, self._endpoint)
        table.check_data(self._manifest)
        if self._table_fingerprints.setdefault(url, table.fingerprint) != table.fingerprint:
            raise UserError(table.store.url, "was replaced while it was read", "run the job again")
        return table

    @cached_property
    def _candidates(self) -> CandidateReader | None:
        if (table := self._candidate_table) is None:
            return None
        return CandidateReader(table, self._store, self._manifest, self._rows, self._endpoint)

    @cached_property
    def _decoder(self) -> Decoder:
        # What the manifest says about itself is no reason to trust it: whoever made the shards wrote it.
        pixels: int | None = getattr(self.encoder, "visual_pixels", None)
        media = self.data.media.for_model(pixels) if pixels else self.data.media
        return Decoder(media, trusted=self.data.trusted, cache=self._cache)


@dataclass(frozen=True, slots=True)
class _GoodRow:
    """A row of a batch that could be read, decoded and encoded."""

    row: Row
    sample: Sample
    encoded: Any


def _video_of(item: StoredSample) -> tuple[Sample, bytes]:
    """Return a sample and the bytes of its target's video. Raises `BadMedia`: what the row is, missing_member."""
    if isinstance(item, BadMedia):
        raise item
    sample, members = item
    (medium,) = sample.positive.media
    if medium.member not in members:
        raise BadMedia("missing_member", medium.member)
    return sample, members[medium.member]


def _drawn_wording(sample: Sample, row: Row, seed: int, epoch: int) -> str:
    """Return one wording of the instruction. It depends on the sample, the seed and the epoch only."""
    source, index = row
    rng = np.random.default_rng([seed, epoch, INSTRUCTION_STREAM, seed_of_name(source), index])
    return sample.instructions[rng.integers(len(sample.instructions))]


def _only(item: StoredSample, role: Role) -> StoredSample:
    """The same sample with one input, so that nothing else of it is decoded."""
    if isinstance(item, BadMedia):
        return item
    sample, members = item
    others = {"query": Input(), "positive": Input()} | {role: getattr(sample, role)}
    return replace(sample, negatives=(), **others), members
