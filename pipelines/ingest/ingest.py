"""The job from raw files and tables to a dataset: every sample ends in a shard or in the report.

    folder: raw samples  ----------------------------> blocks \\
    tables: units -> groups -> one task each: rows  -> blocks  > one task each: shard + index + marker
    all blocks stored -> manifests, groups and report, at the same moment -> what they do not use is deleted

The job holds the samples of a folder, and of a table only its units, the sizes of blocks and the names of shards.
Order, split and keys depend only on the raw samples and the seed, so that a rerun gives the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from pipelines.config import MediaConfig
from pipelines.errors import UserError
from pipelines.ingest.blocks import HELD_OUT, TRAIN, UNCAPTIONED
from pipelines.ingest.card import CARD_PATH, data_card, license_of
from pipelines.ingest.groups import ListedTable
from pipelines.ingest.job import IngestJob, OnProgress
from pipelines.ingest.markers import GROUPS_PATH, delete_markers, groups_file
from pipelines.ingest.report import REPORT_PATH, IngestReport
from pipelines.ingest.settings import IngestSettings
from pipelines.media.libraries import library_versions
from pipelines.samples import RawSample, Rejected
from pipelines.shards.duplicates import with_duplicates
from pipelines.shards.manifest import DATASET, is_stored, publish_manifest
from pipelines.sources.folder import LIST_NAME, caption_line
from pipelines.storage.publish import claim
from pipelines.storage.store import Store


def ingest(
    raw: Iterable[RawSample | Rejected],
    out: Store,
    *,
    tables: Sequence[ListedTable] = (),
    media: MediaConfig,
    held_out_fraction: float,
    seed: int,
    samples_per_shard: int,
    materialized: bool = False,
    keep_uncaptioned: bool = False,
    reuse: bool = True,
    endpoint: str | None = None,
    licenses: Mapping[str, str] = MappingProxyType({}),
    on_progress: OnProgress = lambda done, total, note: None,
    before_publish: Callable[[], None] = lambda: None,
) -> IngestReport:
    """Write the splits `train` and `held_out`, `report.json` and `DATA.md` below `out`, of `raw` samples and tables.

    `before_publish` is called when all shards are stored, and may raise. `endpoint` is that of raw media at s3:// URLs,
    and `licenses` are those of sources, by name.

    What an earlier job has stored of the same samples with the same settings is kept, whether that job was killed or
    has ended. Without `reuse`, everything is made again.

    With `keep_uncaptioned`, there is the split `uncaptioned`, too, and `train` may be empty. Otherwise an earlier
    split of that name becomes empty. `train` may also be empty where all samples say that they are held out.

    Videos and pages are stored as they are, or with `materialized` as the frames and images that `media` decodes. An
    existing dataset stays as it is until the new one is whole. A block without a usable sample leaves a gap in the
    numbers of the shards. Raises `UserError` if nothing is usable, for a folder that holds files of others, or for a
    fault that only the user can fix (full disk, unreachable store).
    """
    started_s = time.monotonic()
    settings = IngestSettings(out, media, held_out_fraction, seed, samples_per_shard, materialized, endpoint)
    splits = [TRAIN, HELD_OUT, *([UNCAPTIONED] if keep_uncaptioned else [])]
    job = IngestJob(settings, IngestReport(libraries=library_versions(media)), on_progress)
    job.plan_folder(raw)
    claim(out, DATASET)
    if not reuse:
        delete_markers(out)
    job.form_groups(tables, reuse)
    if not keep_uncaptioned and is_stored(out, UNCAPTIONED):
        splits.append(UNCAPTIONED)
    job.run()
    report = job.report
    manifests = job.manifests(splits)
    assert report.num_accepted + report.num_rejected == report.seen
    report.elapsed_s = round(time.monotonic() - started_s, 3)
    to_evaluate = report.accepted[HELD_OUT] if job.names_all_splits else None
    if not (report.accepted[TRAIN] or report.accepted.get(UNCAPTIONED) or to_evaluate):
        out.write(REPORT_PATH, report.to_json())
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(report.rejected.items()))
        problem = f"none of {report.seen} samples can be used for training ({reasons or 'there are none'})"
        raise UserError(out.url, problem, _fix(report))
    manifests = [replace(with_duplicates(out, manifest), settings=settings.stored) for manifest in manifests]
    sources = sorted({source for counts in report.accepted.values() for source in counts})
    report.licenses = {source: found for source in sources if (found := license_of(source, licenses))}
    card = data_card(report.accepted, job.tasks(), report.rejected, licenses, job.examples())
    before_publish()
    reports = {REPORT_PATH: report.to_json(), CARD_PATH: card, GROUPS_PATH: groups_file(job.table_groups)}
    publish_manifest(out, *manifests, reports=reports)
    delete_markers(out, kept=[group.id for group in job.groups])
    return report


def _fix(report: IngestReport) -> str:
    """Return what to do when no sample can be used for training."""
    if uncaptioned := report.examples.get("no_caption"):
        line = caption_line(uncaptioned[0])
        return f"write {LIST_NAME} into the raw folder with lines such as {line}, or set keep_uncaptioned to search it"
    return f"see {REPORT_PATH} there, and check the paths of the raw data"
