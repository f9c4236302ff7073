"""Job of kind `ingest`: turns a folder of files, or tables, into shards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jobs.data.specs import IngestSpec
from jobs.runtime.cluster import ray_cluster
from jobs.runtime.lease import hold_output
from jobs.runtime.progress import Bars, duration, say
from pipelines.ingest.blocks import UNCAPTIONED
from pipelines.ingest.groups import ListedTable, list_table
from pipelines.ingest.ingest import ingest
from pipelines.ingest.report import REPORT_PATH, IngestReport
from pipelines.samples import RawSample, Rejected
from pipelines.shards.manifest import DATASET
from pipelines.sources.archives import is_archive
from pipelines.sources.folder import LIST_NAME, caption_line, read_folder
from pipelines.sources.table import LARGE_UNIT_BYTES, TableReader, open_table
from pipelines.sources.table_config import TableSource
from pipelines.sources.table_files import find_table
from pipelines.storage.location import open_object, open_store, resolve_endpoint
from rzen.config import PromptConfig
from rzen.families import FAMILIES

LARGEST_PIXELS = PromptConfig().max_visual_tokens * max(family.token_px for family in FAMILIES.values()) ** 2
"""Pixels that any of the backbones takes in with the default budget."""


def run(spec: IngestSpec) -> dict[str, Any]:
    """Write the dataset and report what became of every sample."""
    raw: Iterable[RawSample | Rejected] = ()
    if spec.input is not None:
        follow_links, keep = spec.follow_links, spec.keep_uncaptioned
        raw = read_folder(spec.input, spec.media, follow_links=follow_links, keep_uncaptioned=keep)
    tables = _open_tables(spec)
    uncaptioned: list[str] = []
    store = open_store(spec.out, spec.endpoint)
    inputs = [*([spec.input] if spec.input else []), *(_described(table) for table in tables)]
    say(f"  {', '.join(inputs)} -> {store.url}, {spec.held_out_fraction:.0%} held out")
    with hold_output(store, DATASET, "ingests") as lease, ray_cluster(), Bars() as bars:
        report = ingest(
            _noting(raw, uncaptioned),
            store,
            tables=tables,
            # Stored pages must be large enough for every model that may read them.
            media=spec.media.for_model(LARGEST_PIXELS) if spec.materialized else spec.media,
            held_out_fraction=spec.held_out_fraction,
            seed=spec.seed,
            samples_per_shard=spec.samples_per_shard,
            materialized=spec.materialized,
            keep_uncaptioned=spec.keep_uncaptioned,
            reuse=spec.reuse,
            endpoint=resolve_endpoint(spec.endpoint),
            licenses={name: source.license for name, source in spec.sources.items() if source.license},
            on_progress=lambda done, total, note: bars.update("ingest", done, total, note=note),
            before_publish=lease.check,
        )
    _print_report(report)
    kept = sum(report.accepted.get(UNCAPTIONED, {}).values())
    if uncaptioned:  # tables without a query need no advice
        say(
            f"  {kept:,} media and pages without a caption can be searched, but not trained on. To train on them, write"
            f" {Path(spec.input or '').absolute() / LIST_NAME} with lines such as {caption_line(uncaptioned[0])}"
        )
    return {"outputs": [spec.out], "samples": report.accepted, "rejected": report.rejected}


def _open_tables(spec: IngestSpec) -> list[ListedTable]:
    """Return all tables. Everything that can be wrong with their settings is reported before a task starts."""
    tables = [list_table(_open_table(name, source, spec)) for name, source in spec.sources.items()]
    for table in tables:
        if table.reader.suggested:
            shown = json.dumps(table.reader.suggested, ensure_ascii=False)
            say(f"  {table.reader.name} is read with {shown}: see `rzen look {table.reader.files[0].url}`")
        largest = max((unit.num_bytes for unit in table.units if unit.file.format == "parquet"), default=0)
        if largest > LARGE_UNIT_BYTES:
            size = f"{largest / 1e6:,.0f} MB"
            text = f"{table.reader.name} has row groups of up to {size}, each read as a whole: write smaller ones"
            say(f"  {text} to save memory", "yellow")
    return tables


def _open_table(name: str, source: TableSource, spec: IngestSpec) -> TableReader:
    return open_table(
        name,
        source,
        seed=spec.seed,
        endpoint=resolve_endpoint(spec.endpoint),
        follow_links=spec.follow_links,
        keep_uncaptioned=spec.keep_uncaptioned,
    )


def _described(table: ListedTable) -> str:
    reader = table.reader
    files = f"{len(reader.files)} files" if len(reader.files) > 1 else reader.files[0].url
    return f"{reader.name} ({files}{f', preset {reader.preset}' if reader.preset else ''})"


def _noting(raw: Iterable[RawSample | Rejected], uncaptioned: list[str]) -> Iterator[RawSample | Rejected]:
    """Yield the samples, and add the origin of the first uncaptioned one to an empty list."""
    for item in raw:
        if not uncaptioned and isinstance(item, RawSample) and item.split == UNCAPTIONED:
            uncaptioned.append(item.sample.origin)
        yield item


def fingerprint(spec: IngestSpec) -> dict[str, str]:
    """Return the tag of each file of the folder by its path, and of each table and archive by its URL.

    Media in other folders are not among them: a folder may hold millions, and what the job writes.
    """
    found = {} if spec.input is None else open_store(spec.input).tags()
    endpoint = resolve_endpoint(spec.endpoint)
    for name, source in spec.sources.items():
        reader = _open_table(name, source, spec)
        pool = reader.mapper.config.pool
        targets = find_table(pool.table, endpoint, f"sources.{name}.pool.table") if pool and pool.table else []
        found |= {file.url: file.tag for file in (*reader.files, *targets)}
        for url in filter(is_archive, reader.mapper.roots.urls):
            store, path = open_object(url, endpoint)
            found[url] = store.tag(path) if store.exists(path) else ""
    return found


def _print_report(report: IngestReport) -> None:
    if report.num_reused:
        say(f"  {report.num_reused:,} of {report.num_groups:,} groups were stored before")
    for split, sources in report.accepted.items():
        if sources:
            say(f"  {split}: " + ", ".join(f"{name} {count:,}" for name, count in sorted(sources.items())))
    if report.rejected:
        say(f"  skipped: {report.num_rejected:,} of {report.seen:,} samples ({REPORT_PATH} lists them)", "yellow")
    for reason, count in sorted(report.rejected.items(), key=lambda item: -item[1]):
        say(f"    {reason} {count:,}, such as {report.examples[reason][0]}", "yellow")
    say(f"  {report.num_bytes / 1e6:.1f} MB in {duration(report.elapsed_s)}")
