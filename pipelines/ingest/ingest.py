"""The Ray Data job from raw files to shards: every sample ends in a shard or in the report, none in between.

    raw samples -> drop duplicates -> split by target -> shuffle -> blocks
    block (one Ray task) -> read files, decode each once, hash the target -> shard + index -> store
    all shards stored -> manifests -> report

What is decided before the job (order, split, keys) depends on the raw samples and the seed alone, so that a rerun
gives the same bytes. Files are told apart by name here; equal files of different names are not found.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import ray.data

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.ingest.members import load_sample
from pipelines.media.libraries import library_versions
from pipelines.samples import FileRef, Input, MediaKind, Members, RawSample, Rejected, Sample
from pipelines.shards.duplicates import with_duplicates
from pipelines.shards.manifest import (
    Manifest,
    ShardInfo,
    SourceInfo,
    index_path,
    manifest_files,
    manifest_path,
    publish_manifest,
    read_manifest,
)
from pipelines.shards.write import write_shard
from pipelines.storage.store import Store, disk_errors

TRAIN, HELD_OUT = "train", "held_out"
REPORT_PATH = "report.json"
_MAX_EXAMPLES = 20
_MIN_TRAIN_SAMPLES = 2


@dataclass(slots=True)
class IngestReport:
    """What became of every raw sample: `seen` is the sum of all counts in `accepted` and `rejected`."""

    seen: int = 0
    accepted: dict[str, dict[str, int]] = field(default_factory=dict)  # split -> source -> samples
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> samples
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> origins and details, the first 20
    num_bytes: int = 0
    elapsed_s: float = 0.0
    libraries: dict[MediaKind, str] = field(default_factory=dict)  # kind of media -> its decoder and version

    @property
    def num_accepted(self) -> int:
        """Samples in shards."""
        return sum(sum(sources.values()) for sources in self.accepted.values())

    @property
    def num_rejected(self) -> int:
        """Samples that were not used, duplicates among them."""
        return sum(self.rejected.values())

    def reject(self, item: Rejected) -> None:
        """Counts a sample that is not used."""
        self.rejected[item.reason] = self.rejected.get(item.reason, 0) + 1
        examples = self.examples.setdefault(item.reason, [])
        if len(examples) < _MAX_EXAMPLES:
            examples.append(f"{item.origin}: {item.detail}" if item.detail else item.origin)

    def to_json(self) -> bytes:
        """Readable JSON."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True, slots=True)
class Block:
    """The samples of one future shard, in order, with their keys."""

    split: str
    source: str
    ordinal: int
    samples: tuple[RawSample, ...]

    @property
    def path(self) -> str:
        """Of the shard, below the data root."""
        return f"{self.split}/{self.source}/{self.source}-{self.ordinal:06d}.tar"


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """What a task says about its block. `shard` is None if no sample was usable; `error` stops the job."""

    block_index: int
    shard: ShardInfo | None = None
    rejected: tuple[Rejected, ...] = ()
    error: UserError | None = None


def ingest(
    raw: Iterable[RawSample | Rejected],
    out: Store,
    *,
    media: MediaConfig,
    held_out_fraction: float,
    seed: int,
    samples_per_shard: int,
    materialized: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> IngestReport:
    """Writes the splits `train` and `held_out` and `report.json` below `out`; `on_progress` gets (done, all) samples.

    Videos and pages are stored as they are, or `materialized`: their frames and images, as `media` would decode them.
    A data set that is already there is withdrawn while it is rewritten. A block without one usable sample leaves a gap
    in the numbers of the shards. Raises `UserError` if nothing is usable, or
    for a fault that only the user can mend (full disk, unreachable store); then there is no manifest.
    """
    started_s = time.monotonic()
    report = IngestReport(libraries=library_versions(media))
    samples = _collect(raw, report)
    blocks = plan_blocks(samples, held_out_fraction, seed, samples_per_shard)
    out.ensure_bucket()
    retired = _withdraw(out, TRAIN) | _withdraw(out, HELD_OUT) if blocks else set()
    settings: dict[str, Any] = {
        "held_out_fraction": held_out_fraction,
        "seed": seed,
        "samples_per_shard": samples_per_shard,
    }
    settings |= {"materialized": materialized, "media": media.model_dump()}
    manifests = _manifests(blocks, _run(blocks, out, media, materialized, on_progress), report)
    assert report.num_accepted + report.num_rejected == report.seen
    report.elapsed_s = round(time.monotonic() - started_s, 3)
    out.write(REPORT_PATH, report.to_json())
    if not report.accepted[TRAIN]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(report.rejected.items()))
        problem = f"none of {report.seen} samples can be used for training ({reasons or 'there are none'})"
        raise UserError(out.url, problem, f"see {REPORT_PATH} there, and check the paths of the raw data")
    manifests = [with_duplicates(out, manifest) for manifest in manifests]
    for manifest in manifests:
        publish_manifest(out, replace(manifest, settings=settings))
    for path in sorted(retired - {path for manifest in manifests for path in manifest_files(manifest)}):
        out.delete(path)
    return report


def _collect(raw: Iterable[RawSample | Rejected], report: IngestReport) -> list[RawSample]:
    """The raw samples without repetitions, in the order given. Raises `UserError` for a source that cannot be one."""
    unique: dict[str, RawSample] = {}
    tasks: dict[str, str] = {}
    for item in raw:
        report.seen += 1
        if isinstance(item, Rejected):
            report.reject(item)
            continue
        sample = item.sample
        if tasks.setdefault(sample.source, sample.task) != sample.task:
            problem = f"has samples of the tasks {tasks[sample.source]!r} and {sample.task!r}"
            raise UserError(f"source {sample.source}", problem, "give each task a source of its own")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", sample.source):
            raise UserError(f"source {sample.source!r}", "is no folder name", "use letters, digits, - and _")
        identity = f"{sample.source} {_pair_identity(item)}"
        if identity in unique:
            report.reject(Rejected(sample.origin, "duplicate", "the same query and target as an earlier sample"))
        unique.setdefault(identity, item)
    return list(unique.values())


def _side_identity(side: Input, files: dict[str, FileRef], root: str = "/") -> str:
    """Text and files of a side, named relative to `root`, so that moved raw data gives the same shards."""
    refs = [(media.kind, files.get(media.member)) for media in side.media]
    names = [(kind, os.path.relpath(ref.path, root), ref.page) if ref else (kind, "", None) for kind, ref in refs]
    return json.dumps([side.text, names], ensure_ascii=False)


def _pair_identity(raw: RawSample, root: str = "/") -> str:
    sides = [_side_identity(side, raw.files, root) for side in (raw.sample.query, raw.sample.positive)]
    return json.dumps([raw.sample.instruction, *sides], ensure_ascii=False)


def plan_blocks(samples: list[RawSample], held_out_fraction: float, seed: int, samples_per_shard: int) -> list[Block]:
    """Pure: splits, shuffles and cuts each source. Keys count the samples of a source in a split from 0."""
    folders = {str(Path(ref.path).absolute().parent) for raw in samples for ref in raw.files.values()}
    root = os.path.commonpath(folders) if folders else "/"
    by_source: dict[str, list[RawSample]] = defaultdict(list)
    for raw in samples:
        by_source[raw.sample.source].append(raw)
    blocks = []
    for source, members in sorted(by_source.items()):
        for split, chosen in _split(members, held_out_fraction, seed, root).items():
            chosen.sort(key=lambda raw: _draw(seed, "order", _pair_identity(raw, root)))
            keyed = [_with_key(raw, f"{position:08d}") for position, raw in enumerate(chosen)]
            for ordinal, start in enumerate(range(0, len(keyed), samples_per_shard)):
                blocks.append(Block(split, source, ordinal, tuple(keyed[start : start + samples_per_shard])))
    return blocks


def _split(samples: list[RawSample], fraction: float, seed: int, root: str) -> dict[str, list[RawSample]]:
    """Samples go where they say. Of the n others round(fraction * n) are held out, or fewer: samples of one target stay
    together, and train keeps two.
    """
    splits: dict[str, list[RawSample]] = {TRAIN: [], HELD_OUT: []}
    by_target: dict[str, list[RawSample]] = defaultdict(list)
    free = [raw for raw in samples if raw.split is None]
    for raw in samples:
        if raw.split:
            splits[raw.split].append(raw)
    for raw in free:
        by_target[_side_identity(raw.sample.positive, raw.files, root)].append(raw)
    room = max(0, min(round(fraction * len(free)), len(free) - _MIN_TRAIN_SAMPLES))
    for target in sorted(by_target, key=lambda target: _draw(seed, "held out", target)):
        group = by_target[target]
        fits = len(group) <= room
        room -= len(group) * fits
        splits[HELD_OUT if fits else TRAIN] += group
    return splits


def _draw(seed: int, purpose: str, identity: str) -> bytes:
    """A pseudo-random rank that depends on nothing but its arguments."""
    return sha256(f"{seed} {purpose} {identity}".encode()).digest()


def _with_key(raw: RawSample, key: str) -> RawSample:
    return replace(raw, sample=replace(raw.sample, key=key))


def _run(
    blocks: list[Block],
    out: Store,
    media: MediaConfig,
    materialized: bool,
    on_progress: Callable[[int, int], None] | None,
) -> list[WrittenShard]:
    """One Ray task per block. Raises the first `UserError` of a task."""
    if not blocks:
        return []
    rows = [{"index": index, "block": pickle.dumps(block)} for index, block in enumerate(blocks)]
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    outcomes = []
    num_done, num_samples = 0, sum(len(block.samples) for block in blocks)
    with ray.data.DataContext.current(context):
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _task, fn_kwargs={"out": out, "media": media, "materialized": materialized}, num_cpus=1
        )
        for row in results.iter_rows():
            outcome: WrittenShard = pickle.loads(row["outcome"])
            if outcome.error:
                raise outcome.error
            outcomes.append(outcome)
            num_done += len(blocks[outcome.block_index].samples)
            if on_progress:
                on_progress(num_done, num_samples)
    return sorted(outcomes, key=lambda outcome: outcome.block_index)


def _task(row: dict[str, Any], out: Store, media: MediaConfig, materialized: bool) -> dict[str, bytes]:
    """Errors of the user travel as values: Ray would wrap them, retry the task and log tracebacks."""
    try:
        outcome = make_shard(row["index"], pickle.loads(row["block"]), out, media, materialized)
    except UserError as error:
        outcome = WrittenShard(row["index"], error=error)
    return {"outcome": pickle.dumps(outcome)}


def make_shard(
    block_index: int, block: Block, out: Store, media: MediaConfig, materialized: bool = False
) -> WrittenShard:
    """Loads, checks and stores the samples of one block, one sample in memory at a time."""
    rejected: list[Rejected] = []

    def usable() -> Iterator[tuple[Sample, Members]]:
        for raw in block.samples:
            try:
                yield load_sample(raw, media, materialized=materialized)
            except BadMedia as error:
                rejected.append(Rejected(raw.sample.origin or raw.sample.key, error.reason, error.detail))

    place = tempfile.gettempdir()
    with disk_errors(place), tempfile.TemporaryDirectory(prefix="rzen-shard-", dir=place) as folder:
        local = Path(folder, Path(block.path).name)
        shard = write_shard(local, usable())
        if shard.num_samples == 0:
            return WrittenShard(block_index, None, tuple(rejected))
        out.upload(local, block.path)
        out.upload(Path(index_path(str(local))), index_path(block.path))
    return WrittenShard(block_index, replace(shard, path=block.path), tuple(rejected))


def _manifests(blocks: list[Block], outcomes: list[WrittenShard], report: IngestReport) -> list[Manifest]:
    """The manifests of both splits, without settings; counts the outcomes in the report."""
    shards: dict[str, dict[str, list[ShardInfo]]] = {TRAIN: {}, HELD_OUT: {}}
    tasks = {block.source: block.samples[0].sample.task for block in blocks}
    for outcome in outcomes:
        block = blocks[outcome.block_index]
        for item in outcome.rejected:
            report.reject(item)
        if outcome.shard:
            shards[block.split].setdefault(block.source, []).append(outcome.shard)
            report.num_bytes += outcome.shard.num_bytes
    manifests = []
    for split, by_source in shards.items():
        counts = {source: sum(shard.num_samples for shard in found) for source, found in by_source.items()}
        report.accepted[split] = counts
        sources = {
            source: SourceInfo(tasks[source], counts[source], tuple(found)) for source, found in by_source.items()
        }
        manifests.append(Manifest(split, sources))
    return manifests


def _withdraw(out: Store, split: str) -> set[str]:
    """Makes a split unreadable while it is rewritten; returns the files it consisted of."""
    try:
        files = manifest_files(read_manifest(out, split))
    except UserError:  # none yet, or a damaged one, which this job replaces
        files = set()
    out.delete(manifest_path(split))
    return files
