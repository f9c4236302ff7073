"""Job of kind `index`: makes a dataset of external shards where they are."""

from __future__ import annotations

from typing import Any

from jobs.data.specs import IndexSpec
from jobs.runtime.cluster import ray_cluster
from jobs.runtime.lease import hold_output
from jobs.runtime.progress import Bars, duration, say
from pipelines.config import MixtureConfig
from pipelines.ingest.indexing import IndexReport, index
from pipelines.shards.manifest import DATASET, report_path
from pipelines.shards.shuffle_check import warning
from pipelines.storage.location import open_store
from pipelines.storage.shard_urls import find_shards

_EXAMPLE_BATCH = 256  # for the warning: the batch size of a later training run is not known


def run(spec: IndexSpec) -> dict[str, Any]:
    """Index the shards and report what became of every sample."""
    for source in spec.sources.values():  # refuses missing shards before anything is made
        find_shards(source.urls, spec.endpoint)
    store = open_store(spec.out, spec.endpoint)
    say(f"  {', '.join(url for source in spec.sources.values() for url in source.urls)} -> {store.url}/{spec.split}")
    with hold_output(store, DATASET, "indexes") as lease, ray_cluster(), Bars() as bars:
        report = index(
            {name: (source, source.urls) for name, source in spec.sources.items()},
            store,
            spec.split,
            endpoint=spec.endpoint,
            media=spec.media if spec.decode else None,
            on_progress=lambda done, total: bars.update("index", done, total, unit="shards"),
            before_publish=lease.check,
        )
    _print_report(report, report_path(spec.split))
    return {"outputs": [f"{store.url}/{spec.split}"], "samples": report.accepted, "rejected": report.rejected}


def fingerprint(spec: IndexSpec) -> dict[str, str]:
    """Return the tag of every shard by its URL."""
    found = (shard for source in spec.sources.values() for shard in find_shards(source.urls, spec.endpoint))
    return {shard.url: shard.tag for shard in found}


def _print_report(report: IndexReport, place: str) -> None:
    say("  " + ", ".join(f"{name} {count:,}" for name, count in sorted(report.accepted.items())))
    if num_rejected := sum(report.rejected.values()):
        say(f"  skipped: {num_rejected:,} of {report.seen:,} samples ({place} lists them)", "yellow")
    for reason, count in sorted(report.rejected.items(), key=lambda item: -item[1]):
        say(f"    {reason} {count:,}, such as {report.examples[reason][0]}", "yellow")
    for reason, found in sorted(report.findings.items()):
        where = f", such as {report.examples[reason][0]}" if reason in report.examples else ""
        say(f"  {reason}: {found['bytes']:,} bytes in {found['places']:,} place(s){where}", "yellow")
    for source, similarity in report.neighbors.items():
        if text := warning(source, similarity, MixtureConfig().run_length, _EXAMPLE_BATCH):
            say(f"  {text}", "yellow")
        else:
            say(f"  {source} is shuffled: {similarity.describe()}", "dim")
    reused = f", {report.num_reused:,} of them indexed before" if report.num_reused else ""
    size = f"{report.num_bytes / 1e6:,.1f} MB"
    say(f"  {report.num_shards:,} shards of {size}{reused}, in {duration(report.elapsed_s)}")
