"""Job of kind `ingest`: turns a folder of files into shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jobs.data.specs import IngestSpec
from jobs.runtime.cluster import ray_cluster
from jobs.runtime.lease import hold_output
from jobs.runtime.progress import Bars, duration, say
from pipelines.ingest.blocks import UNCAPTIONED
from pipelines.ingest.ingest import REPORT_PATH, IngestReport, ingest
from pipelines.samples import RawSample, Rejected
from pipelines.shards.manifest import DATASET
from pipelines.sources.folder import LIST_NAME, caption_line, read_folder
from pipelines.storage.location import open_store
from rzen.config import PromptConfig
from rzen.families import FAMILIES

LARGEST_PIXELS = PromptConfig().max_visual_tokens * max(family.token_px for family in FAMILIES.values()) ** 2
"""Pixels that any of the backbones takes in with the default budget."""


def run(spec: IngestSpec) -> dict[str, Any]:
    """Write the dataset and report what became of every sample."""
    raw = read_folder(spec.input, spec.media, follow_links=spec.follow_links, keep_uncaptioned=spec.keep_uncaptioned)
    uncaptioned: list[str] = []
    store = open_store(spec.out, spec.endpoint)
    say(f"  {spec.input} -> {store.url}, {spec.held_out_fraction:.0%} held out")
    with hold_output(store, DATASET, "ingests") as lease, ray_cluster(), Bars() as bars:
        report = ingest(
            _noting(raw, uncaptioned),
            store,
            # Stored pages must be large enough for every model that may read them.
            media=spec.media.for_model(LARGEST_PIXELS) if spec.materialized else spec.media,
            held_out_fraction=spec.held_out_fraction,
            seed=spec.seed,
            samples_per_shard=spec.samples_per_shard,
            materialized=spec.materialized,
            keep_uncaptioned=spec.keep_uncaptioned,
            on_progress=lambda done, total: bars.update("ingest", done, total),
            before_publish=lease.check,
        )
    _print_report(report)
    if kept := sum(report.accepted.get(UNCAPTIONED, {}).values()):
        say(
            f"  {kept:,} media and pages without a caption can be searched, but not trained on. To train on"
            f" them, write {Path(spec.input).absolute() / LIST_NAME} with lines such as {caption_line(uncaptioned[0])}"
        )
    return {"outputs": [spec.out], "samples": report.accepted, "rejected": report.rejected}


def _noting(raw: Iterable[RawSample | Rejected], uncaptioned: list[str]) -> Iterator[RawSample | Rejected]:
    """Yield the samples, and add the origin of the first uncaptioned one to an empty list."""
    for item in raw:
        if not uncaptioned and isinstance(item, RawSample) and item.split == UNCAPTIONED:
            uncaptioned.append(item.sample.origin)
        yield item


def fingerprint(spec: IngestSpec) -> dict[str, str]:
    """Return the tag of every raw file by its path."""
    return open_store(spec.input).tags()


def _print_report(report: IngestReport) -> None:
    for split, sources in report.accepted.items():
        if sources:
            say(f"  {split}: " + ", ".join(f"{name} {count:,}" for name, count in sorted(sources.items())))
    if report.rejected:
        say(f"  skipped: {report.num_rejected:,} of {report.seen:,} samples ({REPORT_PATH} lists them)", "yellow")
    for reason, count in sorted(report.rejected.items(), key=lambda item: -item[1]):
        say(f"    {reason} {count:,}, such as {report.examples[reason][0]}", "yellow")
    say(f"  {report.num_bytes / 1e6:.1f} MB in {duration(report.elapsed_s)}")
