"""The command of benchmarks that run a pipeline of jobs, and report what the jobs left."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from jobs.cli import main as rzen
from tests.benchmarks.turns import show

Pipeline = Callable[[Path, int, int | None, float], dict[str, Any]]
"""(folder, seeds, steps or None for those of the spec, size of the corpora) -> spec of kind `pipeline`."""


def run_pipeline(
    description: str | None,
    script: str,
    pipeline: Pipeline,
    report: Callable[[Path, int], str],
    *,
    out: Path,
    seeds: int,
    original: str,
) -> None:
    """Run the command line of a benchmark: its jobs, then `report(folder, seeds)`.

    `out` and `seeds` are defaults. `original` names the shipped spec whose steps and corpora are used.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--steps", type=int, help=f"of each training run, instead of those of {original}")
    parser.add_argument("--size", type=float, default=1.0, help=f"of the corpora, as a share of those of {original}")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--write", action="store_true", help=f"keep the report as {Path(script).stem}.md")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    job = options.out / "job.yaml"
    job.write_text(
        yaml.safe_dump(pipeline(options.out.resolve(), options.seeds, options.steps, options.size), sort_keys=False)
    )
    if status := rzen(["run", str(job)]):
        raise SystemExit(status)
    show(report(options.out, options.seeds), script, write=options.write)
