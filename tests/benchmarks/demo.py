"""The demo with several seeds of training: its scores, and what it costs.

    python -m tests.benchmarks.demo --out runs/demo-seeds [--write]

Each seed is one run of `jobs/demo.yaml`, from the corpus to the report, by the command that `make demo` runs. The seed
is that of weights, batches and LoRA. The corpus and its split are the same. A run that is there is not repeated.

CPU seconds are those of all processes that the run started, sampled once a second by process and added up. Peak memory
is the largest sum of their resident sets, which counts pages that processes share once for each of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.machine import describe_machine
from tests.paths import ROOT

TABLE = Path(__file__).with_suffix(".md")
MEASURED = "measured.json"
TASKS = {
    "text_image": "text → image",
    "text_page": "text → page",
    "text_video": "text → video",
    "image_text_image": "image + text → image",
}
_MODELS = {"stage1": "stage 1", "soup": "soup"}
_EVERY_S = 1.0
_SEEDS = ("jobs.stage1.set.seed", "jobs.stage1.set.model.backbone.seed")
_RUNS = ("first", "second", "third")


@dataclass(frozen=True)
class Cost:
    """What a run took: `minutes` by the clock, CPU seconds, and the most memory at any time."""

    minutes: float
    cpu_s: float
    peak_rss_gb: float


def run_demo(out: Path, seed: int) -> Cost:
    """Run the demo, and return what it cost. Raises `CalledProcessError` if it fails."""
    changes = {"vars.out": out, "vars.store": out / "store"} | dict.fromkeys(_SEEDS, seed)
    changes |= {f"jobs.finetunes.set.runs.{run}.seed": len(_RUNS) * seed + number for number, run in enumerate(_RUNS)}
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    began_s = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "jobs.run", str(ROOT / "jobs/demo.yaml"), *sets], cwd=ROOT)
    cpu_s, peak = watch(process)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return Cost((time.monotonic() - began_s) / 60, cpu_s, peak / 1e9)


def watch(process: subprocess.Popen[Any]) -> tuple[float, int]:
    """Return CPU seconds and peak bytes of a process and all below it, until it ends.

    What a process uses between its last sample and its end is missing, at most `_EVERY_S` of it.
    """
    spent_s: dict[tuple[int, float], float] = {}
    peak = 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        resident = 0
        for one in _tree(root):
            try:
                with one.oneshot():
                    resident += one.memory_info().rss
                    times = one.cpu_times()
                    spent_s[one.pid, one.create_time()] = times.user + times.system
            except psutil.Error:  # it has ended
                continue
        peak = max(peak, resident)
        time.sleep(_EVERY_S)
    return sum(spent_s.values()), peak


def _tree(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def measured(out: Path, seed: int) -> tuple[Cost, list[dict[str, Any]]]:
    """Return cost and rows of a seed; the run is made unless it is there."""
    file = out / MEASURED
    if not file.is_file():
        cost = run_demo(out, seed)
        file.write_text(json.dumps(asdict(cost)))
    results = json.loads((out / "evaluation/results.json").read_text())
    return Cost(**json.loads(file.read_text())), results["rows"]


def table(found: dict[int, tuple[Cost, list[dict[str, Any]]]]) -> str:
    """Return the tables of all seeds as Markdown."""
    scores = [
        _line("seed", "model", *TASKS.values(), "mean", "one pool", "asked modality", "routed"),
        _line(*["---:", "---", *["---:"] * 8]),
    ]
    means: dict[str, list[float]] = {model: [] for model in _MODELS}
    for seed, (_, rows) in found.items():
        for model, name in _MODELS.items():
            own = [_value(rows, model, task, "task", "hit@1") for task in TASKS]
            means[model].append(statistics.fmean(own))
            mixed = [
                statistics.fmean(_value(rows, model, task, "mixed", metric) for task in TASKS)
                for metric in ("hit@1", "asked_modality@1", "routed_hit@1")
            ]
            scores.append(_line(seed, name, *(f"{100 * value:.1f}" for value in (*own, means[model][-1], *mixed))))
    costs = [
        _line("seed", "minutes", "CPU s", "peak memory, GB"),
        _line(*["---:"] * 4),
        *(
            _line(seed, f"{cost.minutes:.1f}", f"{cost.cpu_s:.0f}", f"{cost.peak_rss_gb:.1f}")
            for seed, (cost, _) in found.items()
        ),
    ]
    spread = [
        f"The mean of the {name} is {100 * min(values):.1f} to {100 * max(values):.1f} over the seeds."
        for name, values in zip(_MODELS.values(), means.values(), strict=True)
        if len(values) > 1
    ]
    return "\n".join([*scores, "", *([" ".join(spread), ""] if spread else []), *costs]) + "\n"


def _value(rows: list[dict[str, Any]], model: str, task: str, pool: str, metric: str) -> float:
    (row,) = [
        row for row in rows if (row["model"], row["task"], row["pool"], row["metric"]) == (model, task, pool, metric)
    ]
    return float(row["value"])


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Run or read all seeds, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder with a folder for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--note", default="", help="a sentence about the machine, such as what else ran")
    given = parser.parse_args()
    found = {seed: measured(given.out / f"seed-{seed}", seed) for seed in given.seeds}
    text = "\n".join(
        [
            "# The demo, seed by seed",
            "",
            *([given.note, ""] if given.note else []),
            f"{describe_machine()}. `python -m tests.benchmarks.demo --out FOLDER --write`; `demo.py` tells how.",
            "",
            "hit@1 in percent on held-out samples. The last three columns are means over the same tasks in one pool of",
            "all candidates: hit@1, the share of queries whose first hit has the asked modality, hit@1 within it.",
            "",
            table(found).rstrip("\n"),
            "",
        ]
    )
    if given.write:
        TABLE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
