"""The Ray Data job from raw files to shards: every sample ends in a shard or in the report.

    raw samples -> drop duplicates -> split by target -> shuffle -> blocks      (blocks.py)
    block (one Ray task) -> read files, decode each once, hash the target -> shard + index -> store
    all shards stored -> manifests -> report

Order, split and keys depend only on the raw samples and the seed, so that a rerun gives the same bytes.
"""

from __future__ import annotations

import json
import pickle
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray.data

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.ingest.blocks import HELD_OUT, TRAIN, UNCAPTIONED, Block, pair_identity, plan_blocks
from pipelines.ingest.card import CARD_PATH, NUM_EXAMPLES, data_card, license_of
from pipelines.ingest.members import load_sample
from pipelines.media.libraries import library_versions
from pipelines.samples import MediaKind, Members, RawSample, Rejected, Sample
from pipelines.shards.duplicates import with_duplicates
from pipelines.shards.manifest import (
    DATASET,
    DIGEST_CHARS,
    Manifest,
    ShardInfo,
    SourceInfo,
    index_path,
    is_stored,
    publish_manifest,
)
from pipelines.shards.write import write_shard
from pipelines.sources.folder import LIST_NAME, caption_line
from pipelines.sources.references import ReferenceReader
from pipelines.storage.publish import claim
from pipelines.storage.store import Store, disk_errors

REPORT_PATH = "report.json"
_MAX_EXAMPLES = 20


@dataclass(slots=True)
class IngestReport:
    """Counts of all raw samples: `seen` is the sum of all counts in `accepted` and `rejected`."""

    seen: int = 0
    accepted: dict[str, dict[str, int]] = field(default_factory=dict)  # split -> source -> samples
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> samples
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> origins and details, the first 20
    num_bytes: int = 0
    elapsed_s: float = 0.0
    libraries: dict[MediaKind, str] = field(default_factory=dict)  # kind of media -> its decoder and version
    licenses: dict[str, str] = field(default_factory=dict)  # source -> license, where it is stated

    @property
    def num_accepted(self) -> int:
        """Samples in shards."""
        return sum(sum(sources.values()) for sources in self.accepted.values())

    @property
    def num_rejected(self) -> int:
        """Samples that are not used, duplicates included."""
        return sum(self.rejected.values())

    def reject(self, item: Rejected) -> None:
        """Count a sample that is not used."""
        self.rejected[item.reason] = self.rejected.get(item.reason, 0) + 1
        examples = self.examples.setdefault(item.reason, [])
        if len(examples) < _MAX_EXAMPLES:
            examples.append(f"{item.origin}: {item.detail}" if item.detail else item.origin)

    def to_json(self) -> bytes:
        """Return readable JSON."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """Result of a task for its block. `shard` is None if no sample was usable. An `error` stops the job."""

    block_index: int
    shard: ShardInfo | None = None  # and the first samples in it, `examples`
    rejected: tuple[Rejected, ...] = ()
    error: UserError | None = None
    examples: tuple[Sample, ...] = ()


def ingest(
    raw: Iterable[RawSample | Rejected],
    out: Store,
    *,
    media: MediaConfig,
    held_out_fraction: float,
    seed: int,
    samples_per_shard: int,
    materialized: bool = False,
    keep_uncaptioned: bool = False,
    endpoint: str | None = None,
    licenses: Mapping[str, str] = MappingProxyType({}),
    on_progress: Callable[[int, int], None] | None = None,
    before_publish: Callable[[], None] = lambda: None,
) -> IngestReport:
    """Write the splits `train` and `held_out`, `report.json` and `DATA.md` below `out`.

    `on_progress` gets (done, all) samples. `before_publish` is called when all shards are stored, and may raise.
    `endpoint` is that of raw media at s3:// URLs, and `licenses` are those of sources, by name.

    With `keep_uncaptioned`, there is the split `uncaptioned`, too, and `train` may be empty. Otherwise an earlier
    split of that name becomes empty.

    Videos and pages are stored as they are, or with `materialized` as the frames and images that `media` decodes. An
    existing dataset stays as it is until the new one is whole. A block without a usable sample leaves a gap in the
    numbers of the shards. Raises `UserError` if nothing is usable, for a folder that holds files of others, or for a
    fault that only the user can fix (full disk, unreachable store).
    """
    started_s = time.monotonic()
    report = IngestReport(libraries=library_versions(media))
    samples = _collect(raw, report)
    blocks = plan_blocks(samples, held_out_fraction, seed, samples_per_shard)
    claim(out, DATASET)
    settings: dict[str, Any] = {
        "held_out_fraction": held_out_fraction,
        "seed": seed,
        "samples_per_shard": samples_per_shard,
    }
    settings |= {"materialized": materialized, "media": media.model_dump()}
    splits = [TRAIN, HELD_OUT]
    if keep_uncaptioned or is_stored(out, UNCAPTIONED):
        splits.append(UNCAPTIONED)
    outcomes = _run(blocks, out, media, materialized, endpoint, on_progress)
    manifests = _manifests(splits, blocks, outcomes, report)
    assert report.num_accepted + report.num_rejected == report.seen
    report.elapsed_s = round(time.monotonic() - started_s, 3)
    if not report.accepted[TRAIN] and not report.accepted.get(UNCAPTIONED):
        out.write(REPORT_PATH, report.to_json())
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(report.rejected.items()))
        problem = f"none of {report.seen} samples can be used for training ({reasons or 'there are none'})"
        raise UserError(out.url, problem, _fix(report))
    manifests = [replace(with_duplicates(out, manifest), settings=settings) for manifest in manifests]
    report.licenses = {
        source: found
        for source in sorted({source for counts in report.accepted.values() for source in counts})
        if (found := license_of(source, licenses))
    }
    card = data_card(report.accepted, _tasks(blocks), report.rejected, licenses, _examples(blocks, outcomes))
    before_publish()
    publish_manifest(out, *manifests, reports={REPORT_PATH: report.to_json(), CARD_PATH: card})
    return report


def _tasks(blocks: Sequence[Block]) -> dict[str, str]:
    """Return the task of each source."""
    return {block.source: block.samples[0].sample.task for block in blocks}


def _examples(blocks: Sequence[Block], outcomes: Sequence[WrittenShard]) -> dict[str, tuple[Sample, ...]]:
    """Return the first samples of each source that were stored."""
    found: dict[str, tuple[Sample, ...]] = {}
    for outcome in outcomes:
        if outcome.examples:
            found.setdefault(blocks[outcome.block_index].source, outcome.examples)
    return found


def _fix(report: IngestReport) -> str:
    """Return what to do when no sample can be used for training."""
    if uncaptioned := report.examples.get("no_caption"):
        line = caption_line(uncaptioned[0])
        return f"write {LIST_NAME} into the raw folder with lines such as {line}, or set keep_uncaptioned to search it"
    return f"see {REPORT_PATH} there, and check the paths of the raw data"


def _collect(raw: Iterable[RawSample | Rejected], report: IngestReport) -> list[RawSample]:
    """Return the raw samples without duplicates, in the order given. Raises `UserError` for an invalid source."""
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
            raise UserError(f"source {sample.source}", problem, "give each task its own source")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", sample.source):
            raise UserError(f"source {sample.source!r}", "is not a folder name", "use letters, digits, - and _")
        identity = f"{sample.source} {pair_identity(item)}"
        if identity in unique:
            report.reject(Rejected(sample.origin, "duplicate", "the same query and target as an earlier sample"))
        unique.setdefault(identity, item)
    return list(unique.values())


def _run(
    blocks: list[Block],
    out: Store,
    media: MediaConfig,
    materialized: bool,
    endpoint: str | None,
    on_progress: Callable[[int, int], None] | None,
) -> list[WrittenShard]:
    """Run one Ray task for each block. Raises the first `UserError` of a task."""
    if not blocks:
        return []
    rows = [{"index": index, "block": pickle.dumps(block)} for index, block in enumerate(blocks)]
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    outcomes = []
    num_done, num_samples = 0, sum(len(block.samples) for block in blocks)
    with ray.data.DataContext.current(context):
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _task,
            fn_kwargs={"out": out, "media": media, "materialized": materialized, "endpoint": endpoint},
            num_cpus=1,
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


def _task(
    row: dict[str, Any], out: Store, media: MediaConfig, materialized: bool, endpoint: str | None
) -> dict[str, bytes]:
    """Return a `UserError` as a value: if raised, Ray would wrap it, retry the task and log tracebacks."""
    try:
        outcome = make_shard(row["index"], pickle.loads(row["block"]), out, media, materialized, endpoint)
    except UserError as error:
        outcome = WrittenShard(row["index"], error=error)
    return {"outcome": pickle.dumps(outcome)}


def make_shard(
    block_index: int,
    block: Block,
    out: Store,
    media: MediaConfig,
    materialized: bool = False,
    endpoint: str | None = None,
) -> WrittenShard:
    """Load, check and store the samples of one block, with one sample in memory at a time."""
    rejected: list[Rejected] = []
    examples: list[Sample] = []

    def usable(reader: ReferenceReader) -> Iterator[tuple[Sample, Members]]:
        reader.prepare(block.samples)
        for raw in block.samples:
            try:
                sample, members = load_sample(raw, media, materialized=materialized, reader=reader)
                if len(examples) < NUM_EXAMPLES:
                    examples.append(sample)
                yield sample, members
            except BadMedia as error:
                rejected.append(Rejected(raw.sample.origin or raw.sample.key, error.reason, error.detail))

    place = tempfile.gettempdir()
    with disk_errors(place), tempfile.TemporaryDirectory(prefix="rzen-shard-", dir=place) as folder:
        local = Path(folder, Path(block.path).name)
        with ReferenceReader(media, endpoint) as reader:
            shard = write_shard(local, usable(reader))
        if shard.num_samples == 0:
            return WrittenShard(block_index, None, tuple(rejected))
        path = f"{block.path.removesuffix('.tar')}-{shard.sha256[:DIGEST_CHARS]}.tar"
        out.upload(local, path)
        out.upload(Path(index_path(str(local))), index_path(path))
    return WrittenShard(block_index, replace(shard, path=path), tuple(rejected), examples=tuple(examples))


def _manifests(
    splits: Sequence[str], blocks: list[Block], outcomes: list[WrittenShard], report: IngestReport
) -> list[Manifest]:
    """Return the manifests of the splits, without settings, and count the results in the report."""
    shards: dict[str, dict[str, list[ShardInfo]]] = {split: {} for split in splits}
    tasks = _tasks(blocks)
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
