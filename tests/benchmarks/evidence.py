"""What hardness weights and false-negative elimination do, apart and together, where the truth is known.

    python -m tests.benchmarks.evidence --write      about 30 CPU minutes; writes evidence.md and .svg
    python -m tests.benchmarks.evidence --corpus stamps --write      10 more; writes evidence_stamps.md and .svg
    python -m tests.benchmarks.evidence --seeds 2 --report      the report of what is there

The cells, the seeds and the contrasts of `evidence_cells` were fixed before the first run of a test seed, and are
printed with the result. Each run is a line of runs.jsonl: a repeated command does what is missing, and gives the same
numbers.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tests.benchmarks.evidence_bed import train
from tests.benchmarks.evidence_cells import (
    CONTRASTS,
    CORPORA,
    EMOJI,
    SEEDS,
    Results,
    best_temperatures,
    to_test,
    to_tune,
)
from tests.benchmarks.evidence_report import plot, report
from tests.benchmarks.evidence_runs import Work, do
from tests.benchmarks.turns import say, show

OUT = Path("runs/evidence")


def main() -> None:
    """Do what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", choices=CORPORA, default="emoji", help="data of the runs (emoji)")
    parser.add_argument("--out", type=Path, help=f"folder of the runs and of the packages ({OUT}, {OUT}/stamps)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"test seeds, from 0 on; {SEEDS} are registered")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at a time (all cores)")
    parser.add_argument("--report", action="store_true", help="do no runs")
    parser.add_argument("--write", action="store_true", help="write the report and the plot next to this file")
    arguments = parser.parse_args()
    say("registered: " + "; ".join(contrast.title for contrast in CONTRASTS))
    corpus = CORPORA[arguments.corpus]
    name = "evidence" if corpus is EMOJI else f"evidence_{arguments.corpus}"
    out = arguments.out or (OUT if corpus is EMOJI else OUT / arguments.corpus)
    work = Work(corpus.read, out / "packages", train)
    settings = {"processes": arguments.processes, "only_read": arguments.report}
    best = best_temperatures(corpus, do(out, to_tune(corpus), work, **settings))
    results = Results(corpus, do(out, to_test(corpus, best, arguments.seeds), work, **settings), best, arguments.seeds)
    script = Path(__file__).with_stem(name)
    show(report(results, script.stem), str(script), write=arguments.write)
    if arguments.write:
        script.with_suffix(".svg").write_text(plot(results), encoding="utf-8")


if __name__ == "__main__":
    main()
