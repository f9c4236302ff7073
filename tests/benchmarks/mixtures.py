"""What a soup of three fine-tunes on three mixtures scores, on a toy: the paper's table 4, with seeds.

    python -m tests.benchmarks.mixtures --write            about half an hour on two cores; writes mixtures.md
    python -m tests.benchmarks.mixtures --seeds 2 --steps 4 --size 0.05     a glance

The corpus, stage 1 and the fine-tunes are those of jobs/demo.yaml; every seed is a job of kind `finetunes` on the same
stage 1. Soups: the exact mean, greedy, and searched in twelve evaluations. The latter two choose by a probe, another
corpus of which nothing was trained on; all are scored on the demo's held-out part. A repeated command goes on.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from jobs.spec.load import read_document
from rzen.evaluation.ablation import difference_table, effects, score_table
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.pipeline import run_pipeline
from tests.paths import ROOT

OUT = Path("runs/mixtures")
PROBE = {"num_images": 240, "num_composed": 200, "num_documents": 26, "num_clips": 180, "num_texts": 0}
SOUPS = {"uniform": {"method": "mean"}, "greedy": {"method": "greedy"}, "searched": {"method": "searched"}}
SINGLE = "one mixture, on average"


def pipeline(out: Path, seeds: int, steps: int | None, size: float) -> dict[str, Any]:
    """A job: the first jobs of the demo, a probe, and a set of fine-tunes for each seed."""
    demo = read_document(ROOT / "jobs/demo.yaml").data
    jobs = {name: demo["jobs"][name] for name in ("corpus", "ingest", "stage1")}
    tune = demo["jobs"]["finetunes"]
    media = tune["set"]["set"]["data"]["media"]
    if steps is not None:
        jobs["stage1"]["set"]["steps"] = tune["set"]["set"]["steps"] = steps
    for corpus in (jobs["corpus"]["set"]["corpus"], PROBE):
        corpus |= {name: max(8, round(count * size)) for name, count in corpus.items() if count}
    probe = {"out": "${out}/probe", "corpus": PROBE | {"seed": 1}}
    jobs["probe_corpus"] = {"spec": "corpus.yaml", "set": probe}
    ingest = {"input": "${out}/probe", "out": "${store}/probe", "held_out_fraction": 0.0}
    jobs["probe"] = {"spec": "ingest.yaml", "set": ingest}
    for seed in range(seeds):
        jobs[f"seed{seed}"] = {
            "spec": tune["spec"],
            "set": tune["set"]
            | {
                "grid": {"seed": [seed]},
                "min_survivors": None,
                "soups": SOUPS | {"searched": {"method": "searched", "evaluations": 12, "at_once": 2}},
                "evaluate": _evaluate("${store}/data", "held_out", media),
                "probe": _evaluate("${store}/probe", "train", media),
                "out": f"${{store}}/soups-{seed}",
            },
        }
    for job in jobs.values():
        job["spec"] = str(ROOT / "jobs" / job["spec"])
    places = {"out": str(out), "store": str(out / "store")}
    return {"kind": "pipeline", "name": "mixtures", "vars": places, "state": "${store}/jobs", "jobs": jobs}


def _evaluate(root: str, split: str, media: Any) -> dict[str, Any]:
    changes = {"data": {"root": root, "split": split, "media": media}, "metrics": None, "dtype": "float32"}
    return {"spec": str(ROOT / "jobs/evaluate.yaml"), "set": changes}


def report(out: Path, seeds: int) -> str:
    """Of the summaries that the jobs have left."""
    scores: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    weights: dict[str, list[str]] = defaultdict(list)
    for seed in range(seeds):
        summary = json.loads((out / f"store/soups-{seed}/summary.json").read_text())
        for row in summary["rows"]:
            variant = row["model"].removesuffix(f"-seed-{seed}")
            scores[variant].setdefault(seed, {}).setdefault(row["task"], row["value"])
        singles = [some[seed] for variant, some in scores.items() if variant not in (*SOUPS, SINGLE)]
        scores[SINGLE][seed] = {task: statistics.fmean(some[task] for some in singles) for task in singles[0]}
        for name in ("greedy", "searched"):
            parents = summary["soups"][name]["parents"]
            told = ", ".join(f"{one['coefficient']:.2f} {one['name'].removesuffix(f'-seed-{seed}')}" for one in parents)
            weights[name].append(f"seed {seed}: {told}")
    ordered = {
        variant: scores[variant]
        for variant in sorted(scores, key=lambda variant: (variant in SOUPS, variant == SINGLE))
    }
    found = effects(ordered, SINGLE)
    chosen = "\n".join(f"* {name}: {'; '.join(told)}" for name, told in weights.items())
    return f"""# Soups of three mixtures, on the demo's toy

{describe_machine()}. {seeds} seeds of fine-tuning on one stage 1.
`python -m tests.benchmarks.mixtures --write`; `mixtures.py` tells how.

Mean scores, % (hit@1; pages nDCG@5):

{score_table(found)}
Difference to the mean score of the single mixtures, points, with its 95% interval over the seeds (Student's t, paired),
bold where it leaves 0 out. The intervals cover the seeds of the fine-tunes, not the choice of the held-out samples:

{difference_table(found, SINGLE)}
Weights that were chosen on the probe:

{chosen}
"""


if __name__ == "__main__":
    run_pipeline(__doc__, __file__, pipeline, report, out=OUT, seeds=3, original="jobs/demo.yaml")
