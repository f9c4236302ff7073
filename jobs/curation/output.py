"""The output of a curation: the table of drops that training reads, why each sample was dropped, and the reports."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.curation.evaluation_sets import EvaluationSet
from jobs.curation.examples import drop_examples
from jobs.curation.specs import CurateSpec
from jobs.runtime.progress import console, say
from jobs.runtime.records import as_json, leaves
from pipelines.candidates.types import NO_CLUSTER, CandidateManifest, PlanRows, TableData
from pipelines.candidates.write import publish_table
from pipelines.curate.features import FeatureSettings
from pipelines.curate.samples import Samples, Verdicts
from pipelines.feed.reader import Reader
from pipelines.storage.store import Store
from rzen.report.curation import CurationReport, counts_table, render_curation

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


def publish_drops(
    spec: CurateSpec,
    samples: Samples,
    verdicts: Verdicts,
    sets: Sequence[EvaluationSet],
    settings: FeatureSettings,
    store: Store,
    made_from: Mapping[str, str],
    before_publish: Callable[[], None],
) -> dict[str, Any]:
    """Write everything, print the counts, and return the result of the job."""
    reader = Reader(spec.data)
    counts = verdicts.counts(samples)
    num_kept = int(verdicts.keep.sum())
    weighted = {source: some._asdict() for source, some in verdicts.weighted(samples).items()}
    kept = {"kept": num_kept} | ({"weighted": weighted} if weighted else {})
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
        "table": table.fingerprint,
        "samples": sizes,
        **kept,
        "dropped": counts,
        "compared_with": {some.name: some.num_inputs for some in sets},
        "rules": spec.rules.model_dump(mode="json"),
        "files": files,
    }
    store.write(REPORT, as_json(content))
    report = CurationReport(
        title=f"Curation of {spec.data.root} {spec.data.split}",
        samples=sizes,
        dropped=counts,
        compared_with={some.name: some.num_inputs for some in sets},
        examples=drop_examples(spec, samples, verdicts, settings),
        facts={key: str(value) for key, value in leaves(spec.rules.model_dump(mode="json")).items()},
    )
    store.write(PAGE, render_curation(report))
    for path in store.list(DROPS):
        if path not in files.values() and _OURS.fullmatch(path):
            store.delete(path)
    if counts:
        console.print(counts_table(report))
    share = 100 * (1 - num_kept / len(samples))
    say(f"  {num_kept:,} of {len(samples):,} samples are kept, {share:.1f}% are left out")
    for source, some in weighted.items():
        say(f"  {source}: {some['samples']:,} samples have a weight; an epoch takes {int(some['total']):,} of them")
    say(f"  {store.url}/{PAGE} shows examples; use it in training with data.curation: [{store.url}]")
    dropped = {reason: sum(by_source.values()) for reason, by_source in counts.items()}
    return {"outputs": [spec.out], "samples": len(samples), **kept, "dropped": dropped}


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
