"""The report of a corpus of the evidence, and its plot."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.axes import Axes

from rzen.evaluation.figures import COLORS, FAINT, INK, plot_panels
from tests.benchmarks.evidence_bed import TUNING
from tests.benchmarks.evidence_cells import (
    ALPHA,
    EMOJI,
    PUBLISHED,
    SEEDS,
    TEMPERATURES,
    Corpus,
    Results,
)
from tests.benchmarks.evidence_comparison import compare
from tests.benchmarks.evidence_runs import interval
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.runs import percent, points, table

FURTHER = [
    "[evidence_stamps.md](evidence_stamps.md) has the same on a second corpus, and what carries over."
    " [evidence_training.md](evidence_training.md) has mined negatives, batches of look-alikes and soups.",
    "",
]


def report(results: Results, name: str) -> str:
    """Return the report in Markdown. `name` is that of its plot."""
    tuned = bool(results.corpus.tuning_seeds)
    title = "what hardness weights and false-negative elimination do"
    if results.corpus is not EMOJI:
        title += f", on {name.rpartition('_')[2]}"
    lines = [
        f"# Evidence: {title}",
        "",
        *_head(results),
        *(FURTHER if results.corpus is EMOJI else compare(results)),
        *_contrasts(results, name),
        *_temperatures(results),
        *_scores(results),
        *(_extras(results) if results.corpus.extra_data else []),
        "## What is not shown",
        "",
        "* One corpus and one small learner from random weights. A pretrained model may differ.",
        "* Bold marks one contrast at a time: of 100 contrasts without an effect, five are bold by chance.",
        *(["* The best temperatures come from two seeds, and from a grid of four values."] if tuned else []),
        "",
    ]
    return "\n".join(lines)


def _head(results: Results) -> list[str]:
    corpus = results.corpus
    widths = [
        (high - low) / 2
        for data in corpus.contents
        for contrast in corpus.contrasts()[:3]
        if (found := results.contrast(contrast, data, tuned=False))
        for _, low, high in [found]
    ]
    used = [run for (_, seed), run in results.runs.items() if seed < results.seeds or seed >= TUNING]
    cpu_s = sum(run["cpu_s"] for run in used)
    further = f" {len(corpus.extras())} further cells;" if corpus.extras() else ""
    return [
        "**Question.** Does each of the recipe's two headline terms help, alone and together, and what is the reason?",
        "",
        f"**Design.** {corpus.design}",
        "",
        f"**Registered before the first run of a test seed:** {len(corpus.core())} cells at temperature {PUBLISHED} and"
        f" at {_choice(corpus)}; {len(corpus.contrasts())} contrasts;{further} seeds 0 to {SEEDS - 1}. This report has"
        f" {results.seeds} of these seeds. A seed draws the held-out {corpus.variants}, the {corpus.queries}, the"
        " weights and the order.",
        "",
        f"**Power.** With {results.seeds} seeds of {corpus.num_items} queries, the 95% intervals of the first three"
        f" contrasts reach {100 * min(widths):.1f} to {100 * max(widths):.1f} points to each side. Smaller effects are"
        " not seen.",
        "",
        f"{describe_machine()}. {len(used):,} runs, {cpu_s / 60:.0f} CPU minutes.",
        "",
        "| data | content |",
        "|---|---|",
        *(f"| {data} | {text} |" for data, text in corpus.contents.items()),
        "",
        "| arm | what the objective knows |",
        "|---|---|",
        "| nothing | nothing: InfoNCE |",
        "| ids | ids of contents: equal contents and other answers of equal queries are no negatives |",
        "| rule | negatives with a cosine above .95 to the positive are dropped, after 100 steps, at most half |",
        "| oracle | which negatives are false |",
        "",
    ]


def _choice(corpus: Corpus) -> str:
    if not corpus.tuning_seeds:
        return f"{corpus.second}, which was the best for most cells of the first corpus"
    best = f"the best of {', '.join(map(str, TEMPERATURES))}"
    seeds = " and ".join(map(str, corpus.tuning_seeds))
    return f"{best} on seeds {seeds}, which ask for other {corpus.variants} than the tests"


def _second(corpus: Corpus) -> str:
    return "each arm at its own best temperature" if corpus.tuning_seeds else f"temperature {corpus.second}"


def _contrasts(results: Results, name: str) -> list[str]:
    lines = []
    for tuned in (False, True):
        where = _second(results.corpus) if tuned else f"temperature {PUBLISHED}, as published"
        rows = [
            [contrast.title, *(points(results.contrast(contrast, data, tuned)) for data in results.corpus.contents)]
            for contrast in results.corpus.contrasts()
        ]
        lines += [
            f"## Contrasts: {where}",
            "",
            "Points of hit@1 with 95% intervals, paired, over seeds and queries (bootstrap). Bold: 0 is outside.",
            "",
            *table(["contrast", *results.corpus.contents], rows),
        ]
    return [*lines, f"![contrasts at the published temperature]({name}.svg)", ""]


def _temperature_rows(results: Results) -> Iterator[list[str]]:
    for alpha in (0.0, ALPHA):
        for temperature in results.corpus.higher:
            found = [points(results.temperature(data, alpha, temperature)) for data in results.corpus.contents]
            yield [f"{temperature} instead of {PUBLISHED}, alpha {alpha:g}", *found]


def _temperatures(results: Results) -> list[str]:
    head = ["without ids and rule", *results.corpus.contents]
    return ["## Temperature", "", *table(head, list(_temperature_rows(results)))]


def _scores(results: Results) -> list[str]:
    rows = []
    for (data, arm, alpha), cell in results.corpus.core().items():
        place = (data, arm, alpha)
        tuned = results.cell(*place, tuned=True)
        main = "classes" if data == "duplicates" else "spec"
        rows.append(
            [
                f"{data}: {arm}, alpha {alpha:g}",
                percent(results.score(cell, main)),
                percent(results.score(tuned, main))
                + (f" ({results.best[place]})" if results.corpus.tuning_seeds else ""),
                *(percent(results.score(cell, name)) for name in ("map", "ndcg")),
                *(percent(results.mean(cell, name)) for name in ("found", "lost")),
            ]
        )
    second = "at the best" if results.corpus.tuning_seeds else f"at {results.corpus.second:g}"
    head = ["cell", "hit@1 at .02", second, "mAP", "nDCG@10", "false negatives found", "hard negatives lost"]
    text = f"In percent. {results.corpus.graded} The last two: what the rule dropped in the last 50 steps."
    return ["## Scores", "", text, "", *table(head, rows)]


def _extras(results: Results) -> list[str]:
    corpus, rows = results.corpus, []
    for name in dict.fromkeys(name for _, name in corpus.extras()):
        row = [name]
        for data in corpus.extra_data:
            cell, full = corpus.extras()[data, name], corpus.core()[data, "ids + rule", ALPHA]
            row.append(points(interval(results.hits(cell) - results.hits(full))))
            row.append(f"{results.mean(cell, 'temperature'):.3f}")
        rows.append(row)
    return [
        "## Further settings",
        "",
        f"Changes to ids + rule with alpha {ALPHA:g} at temperature {PUBLISHED}; batches see as many pairs.",
        "",
        *table(["change", *(text for data in corpus.extra_data for text in (data, "last temperature"))], rows),
    ]


def plot(results: Results) -> str:
    """Return a forest plot of the contrasts at the published temperature, as SVG."""

    def draw(axes: Axes, data: str) -> None:
        axes.axvline(0, color=FAINT)
        for height, contrast in enumerate(results.corpus.contrasts()):
            if found := results.contrast(contrast, data, tuned=False):
                mean, low, high = (100 * value for value in found)
                axes.plot([low, high], [height, height], color=COLORS[0])
                axes.plot([mean], [height], "o", color=COLORS[0], markersize=4)
        axes.set_title(data, loc="left", fontsize=9, color=INK)

    titles = [contrast.title for contrast in results.corpus.contrasts()]
    label = "points of hit@1, with 95% intervals"
    title = f"Contrasts at temperature {PUBLISHED} in {label}"
    return plot_panels(list(results.corpus.contents), titles, draw, title, label)
