"""What each step of the second half of the recipe adds on a toy, and what a small model learns from a large one.

    python -m tests.benchmarks.chain --write           about 17 CPU minutes; writes chain.md
    python -m tests.benchmarks.chain --most 3          three models, then stop: a repeated command goes on
    python -m tests.benchmarks.chain --report          the report of what is there

The setting, the models, the contrasts and the seeds below were fixed before the first run of a test seed. The setting
was chosen on seeds from 100 on, which draw other scenes. Each model is a line of runs.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from rzen.evaluation.ablation import paired_interval
from tests.benchmarks.chain_cells import SETTING, TRAINED, Chain, Setting, cell_of, run
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.runs import Run, RunFile, percent, points, table
from tests.benchmarks.turns import say, show

OUT = Path("runs/chain")
SEEDS = 5


@dataclass(frozen=True)
class Contrast:
    """The difference of two scores of a seed."""

    title: str
    first: str
    second: str


CONTRASTS = (
    Contrast("stored vectors next to the pairs", "vectors", "small"),
    Contrast("stored vectors only", "vectors_only", "small"),
    Contrast("large model over small", "large", "small"),
    Contrast("large model over small, 600 steps", "large_long", "small_long"),
    Contrast("stored vectors only, 600 steps", "vectors_long", "small_long"),
    Contrast("small model, 600 steps, over large", "small_long", "large"),
    Contrast("more steps", "more", "small"),
    Contrast("mined negatives, one stage", "hard", "more"),
    Contrast("mined negatives, two stages", "hard_2", "more_2"),
    Contrast("mined negatives without the 95% rule", "any", "more"),
    Contrast("the 95% rule", "hard", "any"),
    Contrast("order of the re-ranker", "reranked", "hard"),
    Contrast("order of the teacher", "teacher", "hard"),
    Contrast("judged lists over the first loss", "distilled", "more_2"),
    Contrast("judged lists over mined negatives", "distilled", "hard_2"),
    Contrast("true lists over mined negatives", "truth", "hard_2"),
    Contrast("judge instead of truth", "distilled", "truth"),
)
GAPS = (
    ("stored vectors", "vectors", "small", "large"),
    ("stored vectors only", "vectors_only", "small", "large"),
    ("re-ranker's order", "reranked", "hard", "ceiling"),
    ("judged lists", "distilled", "hard", "teacher"),
    ("true lists", "truth", "hard", "ceiling"),
)
"""What, which model, from which one, towards which one or which order: the share of that lead that the model has."""
PARTS = (
    ("large", "small", "vectors", "vectors_only"),
    ("more", "hard", "more_2", "hard_2", "any"),
    ("reranker", "distilled", "truth"),
    ("large_long", "small_long", "vectors_long"),
)
"""Models that are trained one after the other, of all seeds before the next part."""
ORDERS = {"reranked": "hit", "teacher": "teacher", "ceiling": "ceiling"}
"""Orders of the candidates of `hard` -> the field of the re-ranker's run."""

NOTES = """## Seen while the setting was chosen

One seed (100), so that none of this is shown.

* **The 95% rule.** After 150 steps of `small`, positives had a median cosine of 0.89, and the first 50 candidates 0.87.
  The rule left 16 of 50 candidates, and none for 33% of the samples. Of 16 candidates, it left 0.9, and none for 86%.
  So the re-ranker's candidates are not chosen by it.
* **Lists only.** With true lists of 8, `hard` fell from 24.6 to 6.4 at a rate of 1e-3, and to 18.4 at 3e-4. With the
  loss of the pairs next to it at 1e-3, it fell to 19.0. With lists of 16 at 1e-4, it was 26.2. A list has the hardest
  candidates only, and nothing keeps the others away.
* **More steps.** In 600 steps, the small model had 59.8 and the large one 49.0. So three models of 600 steps were added
  after the others were known.
* **Re-ranker.** It started from a wide model of 500 steps, whose hit@1 was 51.7 on 120 queries. In 400 steps of 32
  lists of four, the share of lists with the answer first rose from 33% at step 50 to 75%, until the end. The order of
  the first 20 candidates had 26.7. Twice the rate, with random negatives in the first 100 of 300 steps, was no faster.
  A step has 96 comparisons in 128 sequences of 86 tokens. A contrastive step has 4,032 in 128 sequences of 20.

## What is not shown

* Random backbones, without a vision-language model's ability to compare. A pretrained model may differ.
* A teacher that is better than its students after as many steps: the toy has none. With 8,000 scenes instead of 2,000,
  the large model had 55.0 in 600 steps on seed 100. Students of the 2,000 had 51.0 alone, and 47.0 to 51.8 with its
  vectors.
"""


@dataclass(frozen=True)
class Results:
    """Scores of the models that are trained, by seed."""

    runs: Mapping[tuple[str, int], Run]
    setting: Setting

    def values(self, name: str, field: str) -> dict[int, float]:
        """Return a field of a model's run of each seed that has one."""
        cell = cell_of(self.setting, name)
        return {seed: run[field] for (place, seed), run in sorted(self.runs.items()) if place == cell}

    def hits(self, name: str) -> dict[int, float]:
        """Return hit@1 of a model, or of an order of candidates, by seed."""
        return self.values("reranker", ORDERS[name]) if name in ORDERS else self.values(name, "hit")

    def differences(self, first: str, second: str) -> list[float]:
        """Return the differences of seeds that have both."""
        one, other = self.hits(first), self.hits(second)
        return [one[seed] - other[seed] for seed in one.keys() & other.keys()]

    def difference(self, first: str, second: str) -> tuple[float, float, float] | None:
        """Return the mean difference with its 95% interval. None with fewer than two seeds."""
        found = self.differences(first, second)
        return paired_interval(found) if len(found) > 1 else None

    def share(self, name: str, start: str, goal: str) -> str:
        """Return the share of the mean lead of `goal` over `start` that a model has, in percent."""
        lead, gain = self.difference(goal, start), self.difference(name, start)
        if lead is None or gain is None or lead[1] <= 0:
            return "no lead is shown"
        return percent(gain[0] / lead[0])


def do(
    out: Path, setting: Setting, seeds: Sequence[int], most: int | None = None, *, only_read: bool = False
) -> Results:
    """Train what is missing, at most `most` models. Nothing is trained if `only_read`."""
    torch.set_num_threads(1)
    file = RunFile(out / "runs.jsonl")
    wanted = {(cell_of(setting, name), seed): (name, seed) for part in PARTS for seed in seeds for name in part}
    chain: Chain | None = None
    for name, seed in [] if only_read else file.missing(wanted)[:most]:
        if chain is None or chain.seed != seed:
            chain = Chain(setting, seed, out)
        found = run(chain, name)
        file.add(found)
        say(f"seed {seed}, {name}: hit@1 {percent(found['hit'])}, {found['cpu_s']} CPU s")
    return Results({place: file.runs[place] for place in wanted if place in file.runs}, setting)


def report(results: Results) -> str:
    """Return the report in Markdown."""
    setting, shape = results.setting, results.setting.shape
    cpu_s = sum(one["cpu_s"] for one in results.runs.values())
    num_train, num_test = shape.train_groups * shape.group, shape.test_groups * shape.group
    contrasts = {one: results.difference(one.first, one.second) for one in CONTRASTS}
    known = [found for found in contrasts.values() if found]
    missing = SEEDS * len(TRAINED) - len(results.runs)
    widths = [100 * (high - low) / 2 for _, low, high in known]
    lines = [
        "# Chain: mining, re-ranker, distillation on a toy",
        "",
        "**Question.** What does each step of the second half of the recipe add over the loss of the first half for as"
        " many steps? What does a small model learn from the stored vectors of a large one?",
        "",
        f"**Design.** Captions and pictures of two things. Scenes come in groups of {shape.group}: one, and others that"
        f" differ from it in one attribute. {num_train:,} are trained on and {num_test:,} other ones tested. Random"
        f" backbones of Qwen2-VL's classes, every weight trained, batches of {setting.batch}. The score is hit@1: the"
        f" picture of a caption among the {num_test:,} pictures of the test.",
        "",
        f"**Registered before the first run of a test seed:** the setting below, {len(TRAINED)} models,"
        f" {len(CONTRASTS)} contrasts, seeds 0 to {SEEDS - 1}. A seed draws scenes, captions, weights and"
        f" order. This report has {len(results.runs)} of {SEEDS * len(TRAINED)} models.",
        "",
        f"**Power.** The 95% intervals reach {min(widths):.1f} to {max(widths):.1f} points to each"
        " side. Smaller effects are not seen.",
        "",
        f"{describe_machine()}. {len(results.runs)} models, {cpu_s / 60:.0f} CPU minutes.",
        "",
        "## Contrasts",
        "",
        "Points of hit@1 with 95% intervals (Student's t, paired by seed). Bold: 0 is outside.",
        "",
        *table(
            ["contrast", "models", "seeds", "difference"],
            [
                [
                    one.title,
                    f"{one.first} - {one.second}",
                    str(len(results.differences(one.first, one.second))),
                    points(found),
                ]
                for one, found in contrasts.items()
            ],
        ),
        "## Shares of a lead",
        "",
        f"`teacher` and `reranked` are orders of the first {setting.shortlist} candidates of `hard`: by the mean of"
        " cosine and probability, and by the re-ranker only. `ceiling` is the best order. Shares are in percent, of"
        " means.",
        "",
        *table(
            ["what", "from", "to", "lead, points", "share"],
            [
                [title, start, goal, points(results.difference(goal, start)), share]
                for title, name, start, goal in GAPS
                for share in [results.share(name, start, goal)]
            ],
        ),
        "## Scores",
        "",
        f"In percent: hit@1 as mean and by seed, and the answers among the first {setting.shortlist}.",
        "",
    ]
    rows = []
    for name in [*TRAINED, *ORDERS]:
        hits = results.hits(name)
        if name == "reranker" or not hits:
            continue
        first, cost = "", ""
        if name not in ORDERS:
            first = percent(statistics.fmean(results.values(name, "found").values()))
            cost = f"{statistics.fmean(results.values(name, 'cpu_s').values()):.0f}"
        rows.append(
            [name, percent(statistics.fmean(hits.values())), " ".join(map(percent, hits.values())), first, cost]
        )
    lines += table(["model", "hit@1", "by seed", f"hit@{setting.shortlist}", "CPU s"], rows)
    if losses := list(results.values("reranker", "losses").values()):
        lines += [
            f"The re-ranker's loss in fifths of its {setting.rerank_steps} steps: "
            + ", ".join(f"{loss:.2f}" for loss in np.mean(losses, axis=0))
            + f". Guessing has {math.log(1 + setting.rerank_negatives):.2f}.",
            "",
        ]
    lines += [
        *NOTES.splitlines(),
        *([f"* {missing} of the registered models were not trained. The command trains them."] if missing else []),
        "",
        "## Setting",
        "",
        "```json",
        json.dumps(asdict(setting), indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Do what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the runs and weights")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"test seeds, from 0 on; {SEEDS} are registered")
    parser.add_argument("--most", type=int, help="train at most this many models")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--write", action="store_true", help="write chain.md next to this file")
    arguments = parser.parse_args()
    say("registered: " + "; ".join(contrast.title for contrast in CONTRASTS))
    results = do(arguments.out, SETTING, range(arguments.seeds), arguments.most, only_read=arguments.report)
    show(report(results), __file__, write=arguments.write)


if __name__ == "__main__":
    main()
