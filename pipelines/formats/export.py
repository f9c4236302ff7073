"""The Ray job that writes a split in a format: one task for each shard, twice.

every shard -> what its samples have   -> the shape of each source
every shard -> the files of the format -> report, and the spec that reads them back

Until the report appears, each shard whose files are stored has a marker next to them. The same command keeps them.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import BadMedia, UserError
from pipelines.feed.rows import RowReader
from pipelines.formats.format import Format, FormatName
from pipelines.formats.mmeb import IMAGES, Mmeb
from pipelines.formats.sentence_transformers import SentenceTransformers
from pipelines.formats.shape import SourceShape, shape_of
from pipelines.formats.webdataset import WebDataset
from pipelines.ingest.tasks import run_tasks
from pipelines.samples import Members, Sample
from pipelines.shards.manifest import Manifest, read_manifest
from pipelines.storage.publish import publish_files
from pipelines.storage.store import Store, disk_errors

KIND = "data export"
REPORT, SPEC = "report.json", "read_back.yaml"
_OURS = re.compile(r".+/[0-9]{6}\.(tar|parquet|zip|json)")
FORMATS: dict[FormatName, Format] = {
    "webdataset": WebDataset(),
    "mmeb": Mmeb(),
    "sentence_transformers": SentenceTransformers(),
}
_MAX_EXAMPLES = 20
_CPUS_PER_TASK = 0.5  # a task mostly waits for its store


@dataclass(slots=True)
class ExportReport:
    """What became of the samples of a split: `accepted` and `rejected` add up to those of the manifest."""

    format: FormatName
    split: str
    fingerprint: str
    """That of the manifest that was read."""
    accepted: dict[str, int] = field(default_factory=dict)  # source -> samples
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> samples
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> shards and details, the first 20
    files: list[str] = field(default_factory=list)

    def add(self, written: _Written) -> None:
        """Count one shard."""
        self.accepted[written.source] = self.accepted.get(written.source, 0) + written.num_samples
        self.files += written.files
        for reason, details in written.rejected.items():
            self.rejected[reason] = self.rejected.get(reason, 0) + len(details)
            known = self.examples.setdefault(reason, [])
            known += details[: _MAX_EXAMPLES - len(known)]


@dataclass(frozen=True, slots=True)
class _Job:
    """One shard: `place` is its path in the export, without an extension. `manifest` has this shard alone."""

    source: str
    place: str
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class _Written:
    source: str
    num_samples: int
    files: list[str]
    rejected: dict[str, list[str]]


def export_data(
    data: Store,
    out: Store,
    format_name: FormatName,
    split: str,
    *,
    sources: Sequence[str] | None = None,
    endpoint: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    before_publish: Callable[[], None] = lambda: None,
) -> ExportReport:
    """Write a split of a dataset, or some of its sources, in a format. `out` is claimed by the caller.

    `endpoint` is that of external shards at s3:// URLs. `on_progress` gets (done, all) tasks. `before_publish` is
    called when all files are stored, and may raise. Then the report appears, and what earlier exports of the split
    have left is deleted.

    Raises `UserError` for a source that is not there or does not fit the format, before anything is written.
    """
    manifest = read_manifest(data, split)
    jobs = _jobs(data, manifest, sources)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if on_progress:
            on_progress(done, 2 * len(jobs))

    shapes: dict[str, SourceShape] = {}
    read = partial(_shape, data=data, endpoint=endpoint)
    for number, shape in run_tasks(read, jobs, _CPUS_PER_TASK):
        source = jobs[number].source
        shapes[source] = shapes.get(source, SourceShape()) + shape
        count()
    chosen = FORMATS[format_name]
    for source, shape in shapes.items():
        if found := chosen.problem(shape):
            raise UserError(f"source {source}", *found)
    report = ExportReport(format_name, split, manifest.fingerprint)
    write = partial(_write, data=data, out=out, endpoint=endpoint, chosen=chosen, shapes=shapes)
    written: list[_Written | None] = [None] * len(jobs)
    for number, outcome in run_tasks(write, jobs, _CPUS_PER_TASK):
        written[number] = outcome
        count()
    for shard in written:
        assert shard is not None
        report.add(shard)
    before_publish()
    _publish(out, report, _spec(out, manifest, chosen, shapes, [shard for shard in written if shard]))
    return report


def _jobs(data: Store, manifest: Manifest, sources: Sequence[str] | None) -> list[_Job]:
    jobs = []
    for source in sources if sources is not None else sorted(manifest.sources):
        if source not in manifest.sources:
            known = ", ".join(sorted(manifest.sources)) or "none"
            raise UserError(f"{data.url}/{manifest.split}", f"has no source {source!r}", f"its sources: {known}")
        info = manifest.sources[source]
        for number, shard in enumerate(info.shards):
            alone = {source: replace(info, num_samples=shard.num_samples, shards=(shard,))}
            place = f"{manifest.split}/{source}/{number:06d}"
            jobs.append(_Job(source, place, replace(manifest, sources=alone, settings={})))
    return jobs


def _read(job: _Job, data: Store, endpoint: str | None) -> Iterator[tuple[Sample, Members] | BadMedia]:
    rows = ((job.source, row) for row in range(job.manifest.num_samples))
    return (found for _, found in RowReader(data, job.manifest, endpoint).read(rows))


def _shape(job: _Job, data: Store, endpoint: str | None) -> SourceShape:
    return shape_of(item[0] for item in _read(job, data, endpoint) if not isinstance(item, BadMedia))


def _write(
    job: _Job,
    data: Store,
    out: Store,
    endpoint: str | None,
    chosen: Format,
    shapes: Mapping[str, SourceShape],
) -> _Written:
    identity = _identity(job, chosen, shapes[job.source])
    if stored := _stored(out, job, identity):
        return stored
    rejected: dict[str, list[str]] = {}
    num_samples = 0

    def usable() -> Iterator[tuple[Sample, Members]]:
        nonlocal num_samples
        for item in _read(job, data, endpoint):
            if isinstance(item, BadMedia):
                rejected.setdefault(item.reason, []).append(item.detail)
            else:
                num_samples += 1
                yield item

    place = tempfile.gettempdir()
    with disk_errors(place), tempfile.TemporaryDirectory(prefix="rzen-export-", dir=place) as folder:
        files = chosen.write(Path(folder), job.place, usable(), shapes[job.source])
        for path in files:
            out.upload(Path(folder, path), path)
    written = _Written(job.source, num_samples, files, rejected)
    tags = [out.tag(path) for path in files]
    out.write(_marker(job), json.dumps({"identity": identity, "tags": tags, "written": asdict(written)}).encode())
    return written


def _marker(job: _Job) -> str:
    return f"{job.place}.json"


def _identity(job: _Job, chosen: Format, shape: SourceShape) -> str:
    """Return a hash of all that decides the files of a shard."""
    shards = [repr(shard) for info in job.manifest.sources.values() for shard in info.shards]
    content = [type(chosen).__name__, shards, json.dumps(asdict(shape), default=sorted)]
    return sha256(json.dumps(content).encode()).hexdigest()


def _stored(out: Store, job: _Job, identity: str) -> _Written | None:
    """Return what an interrupted export has written of a shard, if its files are as they were left."""
    try:
        marker = json.loads(out.read(_marker(job)))
        written = _Written(**marker["written"])
        as_left = marker["identity"] == identity and marker["tags"] == [out.tag(path) for path in written.files]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or a damaged one: its work is done again
        return None
    return written if as_left else None


def _spec(
    out: Store, manifest: Manifest, chosen: Format, shapes: Mapping[str, SourceShape], written: Sequence[_Written]
) -> dict[str, Any]:
    """Return the spec of the job that reads the export."""
    sources: dict[str, Any] = {}
    for source, shape in shapes.items():
        files = [path for shard in written if shard.source == source for path in shard.files]
        sources[source] = dict(chosen.settings(out.url, manifest.sources[source].task, shape, files))
    if chosen.reader == "index":
        return {"kind": "index", "out": "data", "split": manifest.split, "sources": sources}
    sources = {name: {**settings, "split": manifest.split} for name, settings in sources.items()}
    return {"kind": "ingest", "out": "data", "sources": sources}


def _publish(out: Store, report: ExportReport, spec: Mapping[str, Any]) -> None:
    """Make the report and the spec visible, then delete files that earlier exports of the split wrote."""
    text = f"# Reads this export back: rzen run {SPEC} --set out=FOLDER\n"
    text += yaml.safe_dump(dict(spec), sort_keys=False, allow_unicode=True, width=120)
    content = (json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n").encode()
    publish_files(out, {f"{report.split}/{REPORT}": content, f"{report.split}/{SPEC}": text.encode()}, KIND)
    for folder in (report.split, f"{IMAGES}/{report.split}"):
        for path in out.list(folder):
            if path not in report.files and _OURS.fullmatch(path):
                out.delete(path)
