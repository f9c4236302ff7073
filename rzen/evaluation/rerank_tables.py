"""Tables of re-ranking: a line for each dataset and metric, as Markdown, for the terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from pipelines.redaction import escape_markdown
from rzen.evaluation.comparison import Difference
from rzen.evaluation.reranking import Calibration, RerankedScores, WeightChoice, compare_stages

SHOWN = ("hit@1", "recall@5", "ndcg_linear@5")
"""Metrics of each dataset that tables show, after the one that counts. Files have all."""


@dataclass(frozen=True, slots=True)
class RerankLine:
    """One metric of a dataset at each stage, in [0, 1]. Gains are over `before`, with 95% intervals."""

    dataset: str
    metric: str
    num_queries: int
    top_k: int
    before: float
    reranked: float
    fused: float | None
    ceiling: float
    gain: Difference
    fused_gain: Difference | None
    weight: WeightChoice | None
    calibration: Calibration


def rerank_lines(scores: Mapping[str, RerankedScores]) -> list[RerankLine]:
    """Return the lines of all datasets of a model: of each the metric that counts first."""
    lines = []
    gains = {metric: compare_stages(scores, "reranked", metric) for metric in (None, *SHOWN)}
    fused = {metric: compare_stages(scores, "fused", metric) for metric in (None, *SHOWN)}
    for name, one in scores.items():
        means = one.means
        for metric in dict.fromkeys((one.metric, *SHOWN)):
            key = None if metric == one.metric else metric
            lines.append(
                RerankLine(
                    dataset=name,
                    metric=metric,
                    num_queries=one.num_queries,
                    top_k=one.top_k,
                    before=means["before"][metric],
                    reranked=means["reranked"][metric],
                    fused=means.get("fused", {}).get(metric),
                    ceiling=means["ceiling"][metric],
                    gain=gains[key][name],
                    fused_gain=fused[key].get(name),
                    weight=one.weight,
                    calibration=one.calibration,
                )
            )
    return lines


def reranked_json(scores: Mapping[str, RerankedScores]) -> dict[str, Any]:
    """Return dataset -> all metrics of all stages, gains, weight and calibration."""
    gains = {stage: compare_stages(scores, stage) for stage in ("reranked", "fused")}
    return {
        name: {
            **one.as_json(),
            "gain": {
                stage: [some[name].mean, some[name].low, some[name].high]
                for stage, some in gains.items()
                if name in some
            },
        }
        for name, one in scores.items()
    }


def rerank_table(lines: Sequence[RerankLine], title: str) -> str:
    """Return Markdown in percent. `title` heads the column of the datasets."""
    head, rows = _cells(lines)
    table = [[escape_markdown(title), *head[1:]], ["---", "---", *["---:"] * (len(head) - 2)]]
    table += [[escape_markdown(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in table) + "\n"


def terminal_rerank(lines: Sequence[RerankLine]) -> Table:
    """Return the same table for `rich.console.Console.print`."""
    head, rows = _cells(lines)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, title in enumerate(head):
        table.add_column(title, justify="left" if number < 2 else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _cells(lines: Sequence[RerankLine]) -> tuple[list[str], list[list[str]]]:
    top_k = max((line.top_k for line in lines), default=0)
    head = [
        "dataset",
        "metric",
        "queries",
        "before",
        f"re-ranked, top {top_k}",
        "fused",
        "w",
        "ceiling",
        "ECE",
        "Brier",
    ]
    rows = [
        [
            line.dataset,
            line.metric,
            f"{line.num_queries:,}",
            f"{100 * line.before:.1f}",
            _with_gain(line.reranked, line.gain),
            _with_gain(line.fused, line.fused_gain),
            "–" if line.weight is None else f"{line.weight.weight:g} {line.weight.source}",
            f"{100 * line.ceiling:.1f}",
            f"{line.calibration.ece:.3f}",
            f"{line.calibration.brier:.3f}",
        ]
        for line in lines
    ]
    return head, rows


def _with_gain(value: float | None, gain: Difference | None) -> str:
    if value is None or gain is None:
        return "–"
    return f"{100 * value:.1f} ({100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}])"
