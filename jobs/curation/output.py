"""The output of a curation: the table of drops that training reads, why each sample was dropped, and the reports."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NotRequired

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from jobs.curation.evaluation_sets import EvaluationSet
from jobs.curation.examples import cluster_examples, drop_examples
from jobs.curation.specs import CurateSpec
from jobs.runtime.progress import console, say
from jobs.runtime.records import as_json, leaves
from pipelines.candidates.table import read_table
from pipelines.candidates.types import NO_CLUSTER, CandidateManifest, PlanRows, TableData
from pipelines.candidates.write import publish_table
from pipelines.curate.features import FeatureSettings
from pipelines.curate.samples import Samples, Verdicts
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.storage.store import Store
from pipelines.stored_json import parse_json, stored_file
from rzen.report.curation import REASONS, CurationReport, SourceWeights, counts_table, render_curation

DROPS, REPORT, PAGE = "drops", "report.json", "report.html"
_OURS = re.compile(rf"{DROPS}/.+-[0-9a-f]{{12}}\.parquet")
_SCHEMA = pa.schema(
    [
        ("sample", pa.int64()),  # index in the source
        ("key", pa.string()),
        ("reason", pa.string()),
        ("other", pa.string()),  # what it resembles, or why its media cannot be decoded
        ("value", pa.float64()),  # what the rule measured
    ]
)


class WeightedSource(TypedDict):
    """How many samples of a source have a weight, and the sum of their weights."""

    samples: int
    total: float


@stored_file
class ReportFile(TypedDict):
    """`report.json`. `job` identifies all that decides the output."""

    job: str
    table: str
    samples: dict[str, int]
    kept: int
    dropped: dict[str, dict[str, int]]
    files: dict[str, str]
    """Source -> the file that says why its samples were dropped."""
    weighted: NotRequired[dict[str, WeightedSource]]


def publish_drops(
    spec: CurateSpec,
    samples: Samples,
    verdicts: Verdicts,
    sets: Sequence[EvaluationSet],
    settings: FeatureSettings,
    store: Store,
    job: str,
    made_from: Mapping[str, str],
    before_publish: Callable[[], None],
) -> dict[str, Any]:
    """Write everything, print the counts, and return the result of the job. `job` identifies it."""
    reader = Reader(spec.data)
    counts = verdicts.counts(samples)
    weighted = {source: some._asdict() for source, some in verdicts.weighted(samples).items()}
    kept = {"kept": int(verdicts.keep.sum())} | ({"weighted": weighted} if weighted else {})
    files = _write_drops(samples, verdicts, store)
    manifest = CandidateManifest(
        "curate",
        TableData(spec.data.root, spec.data.split, {name: reader.source(name).fingerprint for name in samples.sources}),
        settings=spec.rules.model_dump(mode="json"),
        made_from=dict(made_from),
        counts={"samples": len(samples), **kept, "dropped": counts},
    )
    table = publish_table(store, manifest, _plan(samples, verdicts), before_publish)
    sizes = dict(zip(samples.sources, np.diff(samples.starts).tolist(), strict=True))
    content = {
        "job": job,
        "table": table.fingerprint,
        "samples": sizes,
        **kept,
        "dropped": counts,
        "compared_with": {some.name: some.num_inputs for some in sets},
        "rules": spec.rules.model_dump(mode="json"),
        "files": files,
    }
    report = CurationReport(
        title=f"Curation of {spec.data.root} {spec.data.split}",
        samples=sizes,
        dropped=counts,
        compared_with={some.name: some.num_inputs for some in sets},
        examples=drop_examples(spec, samples, verdicts, settings),
        facts={key: str(value) for key, value in leaves(spec.rules.model_dump(mode="json")).items()},
        weights={
            source: SourceWeights(some, int(weighted[source]["total"]))
            for source, some in verdicts.weights(samples).items()
        },
        num_clusters=len(verdicts.full_clusters),
        clusters=cluster_examples(spec, samples, verdicts, settings),
    )
    store.write(PAGE, render_curation(report))
    store.write(REPORT, as_json(content))  # last: it says that all is there
    for path in store.list(DROPS):
        if path not in files.values() and _OURS.fullmatch(path):
            store.delete(path)
    return result_of(spec, content, store)


def finished_report(store: Store, job: str) -> dict[str, Any] | None:
    """Return the report of a job, if all that it wrote is there."""
    try:
        report = parse_json(store.read(REPORT), f"{store.url}/{REPORT}", ReportFile)
        table = read_table(store)
    except (FileNotFoundError, UserError):  # none, or a damaged one, which is replaced
        return None
    if (report["job"], report["table"]) != (job, table.fingerprint):
        return None
    named = {PAGE, *report["files"].values(), *(info.path for info in table.manifest.plan.values())}
    return {**report} if all(map(store.exists, named)) else None


def result_of(spec: CurateSpec, report: Mapping[str, Any], store: Store) -> dict[str, Any]:
    """Print what a report says, and return the result of the job."""
    num_samples, num_kept = sum(report["samples"].values()), report["kept"]
    counts = {reason: report["dropped"][reason] for reason in REASONS if reason in report["dropped"]}
    if counts:
        console.print(counts_table(report["samples"], counts))
    share = 100 * (1 - num_kept / num_samples)
    say(f"  {num_kept:,} of {num_samples:,} samples are kept, {share:.1f}% are left out")
    for source, some in report.get("weighted", {}).items():
        say(f"  {source}: {some['samples']:,} samples have a weight; an epoch takes {int(some['total']):,} of them")
    say(f"  {store.url}/{PAGE} shows examples; use it in training with data.curation: [{store.url}]")
    dropped = {reason: sum(by_source.values()) for reason, by_source in counts.items()}
    kept = {name: report[name] for name in ("kept", "weighted") if name in report}
    return {"outputs": [spec.out], "samples": num_samples, **kept, "dropped": dropped}


def _write_drops(samples: Samples, verdicts: Verdicts, store: Store) -> dict[str, str]:
    """Write why each sample was dropped. Return source -> file."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for drop in sorted(verdicts.drops, key=lambda drop: drop.sample):
        source, index = samples.place(drop.sample)
        row = {"sample": index, "key": samples.key(drop.sample), "reason": drop.reason}
        rows.setdefault(source, []).append(row | {"other": drop.other, "value": drop.value})
    files = {}
    for source, some in rows.items():
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(some, schema=_SCHEMA), sink, compression="zstd")
        data = sink.getvalue()
        files[source] = f"{DROPS}/{source}-{hashlib.sha256(data).hexdigest()[:12]}.parquet"
        store.write(files[source], data)
    return files


def _plan(samples: Samples, verdicts: Verdicts) -> dict[str, PlanRows]:
    plan = {}
    for source, mine in samples.slices.items():
        keep = verdicts.keep[mine]
        plan[source] = PlanRows.of(keep, np.full(len(keep), NO_CLUSTER), weight=verdicts.weight[mine])
    return plan
