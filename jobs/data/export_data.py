"""Job of kind `export_data`: writes a dataset in the format of another library."""

from __future__ import annotations

from typing import Any

from jobs.data.specs import ExportDataSpec
from jobs.runtime.cluster import ray_cluster
from jobs.runtime.lease import hold_output
from jobs.runtime.progress import Bars, say
from pipelines.formats.export import KIND, REPORT, SPEC, ExportReport, export_data
from pipelines.storage.location import open_store, resolve_endpoint


def run(spec: ExportDataSpec) -> dict[str, Any]:
    """Write the split and report what became of every sample."""
    data, out = (open_store(url, spec.endpoint) for url in (spec.data, spec.out))
    say(f"  {data.url}/{spec.split} -> {out.url}, {spec.format}")
    with hold_output(out, KIND, "exports data") as lease, ray_cluster(), Bars() as bars:
        report = export_data(
            data,
            out,
            spec.format,
            spec.split,
            sources=spec.sources,
            endpoint=resolve_endpoint(spec.endpoint),
            on_progress=lambda done, total: bars.update("export", done, total, unit="tasks"),
            before_publish=lease.check,
        )
    _print_report(report, f"{out.url}/{spec.split}")
    return {"outputs": [f"{out.url}/{spec.split}"], "samples": report.accepted, "rejected": report.rejected}


def _print_report(report: ExportReport, place: str) -> None:
    say("  " + ", ".join(f"{name} {count:,}" for name, count in sorted(report.accepted.items())))
    for reason, count in sorted(report.rejected.items(), key=lambda item: -item[1]):
        say(f"    skipped: {reason} {count:,}, such as {report.examples[reason][0]}", "yellow")
    say(f"  {len(report.files):,} files in {place}; {REPORT} lists them, `rzen run {place}/{SPEC}` reads them back")
