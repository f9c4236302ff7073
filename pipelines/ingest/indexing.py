"""The Ray job that indexes external shards: one task for each shard, then the manifest.

URLs -> shards with the store's tags -> one task each -> index below the data root
all shards indexed -> report -> manifest
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

from pipelines.config import MediaConfig
from pipelines.errors import UserError
from pipelines.ingest.tasks import run_tasks
from pipelines.shards.duplicates import with_duplicates
from pipelines.shards.external import IndexedShard, ScanCounts, ScanJob, index_shard
from pipelines.shards.manifest import DATASET, Manifest, SourceInfo, manifest_path, publish_manifest, report_path
from pipelines.shards.mapping import SourceMapping
from pipelines.shards.shuffle_check import SETTING, NeighborSimilarity, ShardSimilarity, source_similarity
from pipelines.storage.location import resolve_endpoint
from pipelines.storage.publish import claim, read_published
from pipelines.storage.shard_urls import find_shards
from pipelines.storage.store import Store

_MAX_EXAMPLES = 20
_CPUS_PER_TASK = 0.5  # a task waits for its shard about as long as it hashes it


@dataclass(slots=True)
class IndexReport:
    """Counts of all samples of all shards: `seen` is the sum of all counts in `accepted` and `rejected`.

    `findings` are places that belong to no sample, with their bytes: damage, and files without an extension.
    """

    seen: int = 0
    accepted: dict[str, int] = field(default_factory=dict)  # source -> samples
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> samples
    findings: dict[str, dict[str, int]] = field(default_factory=dict)  # reason -> places, bytes
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> shards, keys and details, the first 20
    neighbors: dict[str, NeighborSimilarity] = field(default_factory=dict)  # sources with enough samples only
    num_shards: int = 0
    num_reused: int = 0  # shards that an earlier job has indexed
    num_bytes: int = 0
    elapsed_s: float = 0.0

    def add(self, url: str, tally: ScanCounts) -> None:
        """Count one shard."""
        self.seen += tally.seen
        for reason, count in tally.rejected.items():
            self.rejected[reason] = self.rejected.get(reason, 0) + count
        for reason, (places, num_bytes) in tally.findings.items():
            sums = self.findings.setdefault(reason, {"places": 0, "bytes": 0})
            sums["places"] += places
            sums["bytes"] += num_bytes
        for reason, examples in tally.examples.items():
            known = self.examples.setdefault(reason, [])
            known += [f"{url} {example}" for example in examples][: _MAX_EXAMPLES - len(known)]

    def to_json(self) -> bytes:
        """Return readable JSON."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def index(
    sources: Mapping[str, tuple[SourceMapping, Sequence[str]]],
    out: Store,
    split: str,
    *,
    endpoint: str | None = None,
    media: MediaConfig | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    before_publish: Callable[[], None] = lambda: None,
) -> IndexReport:
    """Index the shards of each source (its mapping, its URLs) and publish them as a split of `out`.

    With `media`, every file is decoded once. `on_progress` gets (done, all) shards. `before_publish` is called when all
    are indexed, and may raise. Shards that an earlier job has indexed are not read again. Raises `UserError` for
    missing shards, for a source without a usable sample, and for a split with a source that this job does not name.
    """
    started_s = time.monotonic()
    endpoint = resolve_endpoint(endpoint)
    claim(out, DATASET)
    _check_split(out, split, sources)
    jobs = [
        ScanJob(source, found, f"{split}/{source}", mapping, media)
        for source, (mapping, urls) in sources.items()
        for found in find_shards(urls, endpoint)
    ]
    outcomes: list[IndexedShard | None] = [None] * len(jobs)
    results = run_tasks(partial(index_shard, out=out, endpoint=endpoint), jobs, _CPUS_PER_TASK)
    for done, (number, outcome) in enumerate(results, start=1):
        outcomes[number] = outcome
        if on_progress:
            on_progress(done, len(jobs))
    before_publish()
    return _publish(sources, jobs, [outcome for outcome in outcomes if outcome], out, split, started_s)


def _check_split(out: Store, split: str, sources: Mapping[str, object]) -> None:
    """Raise `UserError` if publishing would drop a source that another job has made."""
    try:
        earlier = Manifest.from_json(read_published(out, manifest_path(split)))
    except (FileNotFoundError, ValueError):  # none yet, or a damaged one, which this job replaces
        return
    place = f"{out.url}/{split}"
    for name, source in earlier.sources.items():
        if name not in sources:
            raise UserError(
                place, f"holds source {name!r}, which this job does not name", "name it too, or another out"
            )
        if source.mapping is None:
            raise UserError(
                place, f"holds shards that ingest wrote under {name!r}", "choose another out, or another name"
            )


def _publish(
    sources: Mapping[str, tuple[SourceMapping, Sequence[str]]],
    jobs: Sequence[ScanJob],
    outcomes: Sequence[IndexedShard],
    out: Store,
    split: str,
    started_s: float,
) -> IndexReport:
    report = IndexReport()
    infos: dict[str, SourceInfo] = {}
    neighbors: dict[str, list[ShardSimilarity]] = {source: [] for source in sources}
    for job, outcome in zip(jobs, outcomes, strict=True):
        report.add(job.found.url, outcome.tally)
        report.num_shards += 1
        report.num_reused += outcome.reused
        report.num_bytes += outcome.shard.num_bytes
        neighbors[job.source].append(outcome.neighbors)
    for source, (mapping, _) in sources.items():
        shards = tuple(o.shard for job, o in zip(jobs, outcomes, strict=True) if job.source == source)
        report.accepted[source] = sum(shard.num_samples for shard in shards)
        infos[source] = SourceInfo(mapping.task, report.accepted[source], shards, _plain(mapping))
        if found := source_similarity(neighbors[source]):
            report.neighbors[source] = found
    report.elapsed_s = round(time.monotonic() - started_s, 3)
    if unusable := [source for source, count in report.accepted.items() if not count]:
        out.write(report_path(split), report.to_json())
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(report.rejected.items()))
        problem = f"has no usable sample; over all sources: {reasons or 'there are none'}"
        raise UserError(f"source {unusable[0]}", problem, f"see {out.url}/{report_path(split)}, and check the mapping")
    settings = {SETTING: {source: asdict(found) for source, found in report.neighbors.items()}}
    manifest = with_duplicates(out, Manifest(split, infos, settings))
    publish_manifest(out, manifest, reports={report_path(split): report.to_json()})
    return report


def _plain(mapping: SourceMapping) -> dict[str, object]:
    """Return the fields of a mapping, without those that a spec adds to it."""
    return mapping.model_dump(include=set(SourceMapping.model_fields))
