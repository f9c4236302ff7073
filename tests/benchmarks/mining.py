"""What mined negatives and clusters change on a toy with planted hard negatives, and what they cost.

    python -m tests.benchmarks.mining --write            some three hours on two cores; writes mining.md
    python -m tests.benchmarks.mining --seeds 2 --steps 6 --size 0.25     a glance: ten minutes

Corpus, ingest, stage 1 and the runs are those of jobs/ablation.yaml. Nine of ten pictures differ from another one in
one attribute. A hundred scenes are drawn sixteen times under one caption, which no hash shows. The model of stage 1
mines. `select` takes candidates below 95% of the positive's score, and `cluster` joins samples that are such candidates
of each other. The runs of stage 2 differ in `data.candidates` and `data.negatives_per_sample` only. A repeated command
resumes.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from jobs.spec.load import read_document
from rzen.evaluation.ablation import Effect, difference_table, score_table
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.pipeline import run_pipeline
from tests.paths import ROOT

OUT = Path("runs/mining")
MINED, CHOSEN, CLUSTERED = "${store}/mined", "${store}/chosen", "${store}/clustered"
DEPTH, CANDIDATES, MOST = 60, 20, 4
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "mined_1": {"candidates": CHOSEN, "negatives_per_sample": 1},
    "mined_4": {"candidates": CHOSEN, "negatives_per_sample": MOST},
    "clusters": {"candidates": CLUSTERED},
    "both": {"candidates": CLUSTERED, "negatives_per_sample": MOST},
}
_SMALL = {"cpus_per_actor": 0.5, "cpus_per_task": 0.5, "gpus_per_actor": 0}
_FIRST_STEPS = 2  # not counted: they load what later ones have


def pipeline(out: Path, seeds: int, steps: int | None, size: float) -> dict[str, Any]:
    """Return a job: those of the ablation, with a mining of the stage-1 model before its runs."""
    document = read_document(ROOT / "jobs/ablation.yaml").data
    jobs = {name: document["jobs"][name] for name in ("corpus", "ingest", "stage1")}
    corpus = jobs["corpus"]["set"]["corpus"]
    kept = ("hard_fraction", "repeats")
    corpus |= {name: max(8, round(count * size)) for name, count in corpus.items() if name not in kept}
    stage1, runs = jobs["stage1"]["set"], document["jobs"]["ablation"]["set"]
    if steps is not None:
        stage1["steps"] = runs["set"]["steps"] = steps
    data = {"root": "${store}/data", "media": stage1["data"]["media"]}
    export = {"model": {"base": "${store}/runs/stage1/model", "adapter": None}, "dtype": "float32"}
    jobs["export"] = {"spec": "export.yaml", "set": export | {"out": "${store}/model"}}
    mine = {"model": "${store}/model", "data": data, "depth": DEPTH, "select": None, "out": MINED}
    jobs["mine"] = {"spec": "mine.yaml", "set": mine | _SMALL}
    # Every sample stays, so that the runs differ in nothing else.
    rules = {
        "positives": {"max_rank": None, "min_score": None},
        "negatives": {"margin": 0.05, "max_above_mean": None},
        "modality": "any",
        "negatives_per_sample": CANDIDATES,
    }
    select = {"table": MINED, "out": CHOSEN, "selection": rules, "sources": {}, "num_examples": 10}
    jobs["select"] = {"spec": "select.yaml", "set": select}
    # What `select` leaves out is no edge. A batch has four clusters.
    cluster = {"table": CHOSEN, "first_rank": 1, "num_ranks": CANDIDATES, "cluster_size": 16, "out": CLUSTERED}
    jobs["cluster"] = {"spec": "cluster.yaml", "set": cluster}
    runs |= {
        "variants": {"baseline": None, **dict.fromkeys(_names(document), None)}
        | {name: {"data": changes} for name, changes in VARIANTS.items()},
        "baseline": "none",
        "seeds": seeds,
        "max_parallel": 2,  # steps are timed, so that no more run than there are cores
        "notes": [],
        "out": "${out}/ablation",
    }
    jobs["ablation"] = {"spec": "variants.yaml", "set": runs}
    for job in jobs.values():
        job["spec"] = str(ROOT / "jobs" / job["spec"])
    places = {"out": str(out), "store": str(out / "store"), "seeds": seeds}
    return {"kind": "pipeline", "name": "mining", "vars": places, "state": "${store}/jobs", "jobs": jobs}


def _names(document: dict[str, Any]) -> list[str]:
    """Return the variants of jobs/variants.yaml and of the ablation, which are left out."""
    return [
        *read_document(ROOT / "jobs/variants.yaml").data["variants"],
        *document["jobs"]["ablation"]["set"]["variants"],
    ]


def step_seconds(out: Path, variant: str, seeds: int) -> tuple[float, float]:
    """Return the median seconds of a step without waiting, and of waiting for its batch, over the seeds."""
    computed, waited = [], []
    for seed in range(seeds):
        lines = (out / f"store/runs/{variant}-s{seed}/metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines][_FIRST_STEPS:]
        computed.append(statistics.median(row["step_s"] - row["feed_wait_s"] for row in rows))
        waited.append(statistics.median(row["feed_wait_s"] for row in rows))
    return statistics.median(computed), statistics.median(waited)


def costs(out: Path, seeds: int) -> str:
    """Return the table of the seconds of a step."""
    found = {variant: step_seconds(out, variant, seeds) for variant in VARIANTS}
    base = found["none"][0]
    lines = ["| variant | s | of none | (2 + K) / 2 | s waiting for the batch |", "|---|---:|---:|---:|---:|"]
    for variant, (computed, waited) in found.items():
        expected = (2 + VARIANTS[variant].get("negatives_per_sample", 0)) / 2
        lines.append(f"| {variant} | {computed:.3f} | {computed / base:.2f} | {expected:.1f} | {waited:.3f} |")
    return "\n".join(lines)


def tables(out: Path) -> str:
    """Return what mining chose and clustered."""
    lines = ["| source | samples | candidates | chosen | clusters | edges kept |", "|---|---:|---:|---:|---:|---:|"]
    chosen, clustered = (
        json.loads((out / f"store/{name}/candidates.json").read_text())["counts"] for name in ("chosen", "clustered")
    )
    for source, some in chosen.items():
        numbers = f"{some['samples']:,} | {some['candidates']:,} | {some['chosen']:,}"
        lines.append(
            f"| {source} | {numbers} | {clustered[source]['clusters']} | {clustered[source]['kept_weight']:.0%} |"
        )
    return "\n".join(lines)


def report(out: Path, seeds: int) -> str:
    """Return the report of the results that the jobs have left."""
    content = json.loads((out / "ablation/ablation.json").read_text())
    found = [Effect(**one) for one in content["effects"]]
    return f"""# Mined negatives and clusters, on a toy

{describe_machine()}. {seeds} seeds of each variant on one stage 1.
`python -m tests.benchmarks.mining --write`; `mining.py` says how.

A random backbone of 0.4 M parameters on drawn shapes: nothing here is shown for a real model.

## Difference to no mining, points

Mean over the seeds with its 95% interval (Student's t, paired by seed), bold where the interval excludes 0. `mined_1`
and `mined_4` have as many negatives of each sample. `clusters` has batches of clusters and no negatives. `both` has
four negatives and clusters.

{difference_table(found, "none")}
## Mean scores, %

{score_table(found)}
## What a step costs

Two runs at a time on two cores. Medians over steps, then over seeds.

{costs(out, seeds)}

## The tables

{tables(out)}
"""


if __name__ == "__main__":
    run_pipeline(__doc__, __file__, pipeline, report, out=OUT, seeds=6, original="jobs/ablation.yaml")
