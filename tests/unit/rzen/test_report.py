from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from rzen.evaluation.figures import COLORS
from rzen.evaluation.results import (
    Result,
    markdown_table,
    plot_curves,
    plot_losses,
    plot_scores,
    terminal_table,
    write_results,
)


def result(model: str, task: str, metric: str, value: float) -> Result:
    return Result(model, task, metric, value, num_queries=400, num_candidates=400, chance=0.0025)


ROWS = [
    result("before", "text_image", "hit@1", 0.005),
    result("before", "text_page", "ndcg@5", 0.01),
    result("soup", "text_image", "hit@1", 0.2525),
    result("soup", "text_page", "ndcg@5", 0.314),
    result("single", "text_image", "hit@1", 0.2475),
]
CURVES = {"a": [(0, 4.2), (50, 2.0)], "b": [(0, 4.1), (50, 2.01)], "c": [(0, 4.3), (25, 3.0)]}


def printed(rows: list[Result]) -> str:
    console = Console(width=120, color_system=None, file=io.StringIO())
    console.print(terminal_table(rows))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_markdown_has_models_tasks_best_and_chance() -> None:
    assert markdown_table(ROWS) == (
        "| model | Text → image, hit@1 | Text → page, nDCG@5 |\n"
        "| --- | ---: | ---: |\n"
        "| before | 0.50 | 1.0 |\n"
        "| soup | **25.2** | **31.4** |\n"
        "| single | 24.8 | – |\n"
        "| chance | 0.25 | 0.25 |\n"
    )


def test_one_model_is_not_called_the_best_and_bars_are_escaped() -> None:
    table = markdown_table([result("a|b", "other_task", "mrr", 1.0)])
    assert table.splitlines()[2] == r"| a\|b | 100.0 |"
    assert table.splitlines()[0] == "| model | other_task, MRR |"


def test_terminal_table_shows_the_same_numbers() -> None:
    lines = [line.split() for line in printed(ROWS).splitlines()]
    assert lines[1:] == [
        ["before", "0.50", "1.0"],
        ["soup", "25.2", "31.4"],
        ["single", "24.8", "–"],
        ["chance", "0.25", "0.25"],
    ]


def test_model_names_are_not_markup() -> None:
    assert "run[bold]1" in printed([result("run[bold]1", "t", "mrr", 0.5)])


def test_two_results_for_one_cell_are_refused() -> None:
    with pytest.raises(ValueError, match="two results of soup on text_image hit@1"):
        markdown_table([*ROWS, ROWS[2]])


def test_results_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    write_results(path, ROWS, {"seed": 7, "template": "rzen_paper"})
    content = json.loads(path.read_text())
    assert content["settings"] == {"seed": 7, "template": "rzen_paper"}
    assert [Result(**row) for row in content["rows"]] == ROWS
    with pytest.raises(ValueError):
        write_results(path, [dataclasses.replace(ROWS[0], value=math.nan)], {})
    assert json.loads(path.read_text()) == content
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("draw", [lambda: plot_scores(ROWS), lambda: plot_losses(CURVES)], ids=["scores", "losses"])
def test_plots_are_svg_and_the_same_every_time(draw: object) -> None:
    text = draw()  # type: ignore[operator]
    assert text == draw()  # type: ignore[operator]
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "dc:date" not in text


def test_plots_differ_where_numbers_differ() -> None:
    assert plot_scores(ROWS) != plot_scores([*ROWS[:-1], result("single", "text_image", "hit@1", 0.5)])
    assert plot_losses(CURVES) != plot_losses({**CURVES, "c": [(0, 4.3), (25, 2.0)]})


def test_panels_wrap() -> None:
    rows = [result("m", f"task_{n}", "hit@1", n / 10) for n in range(6)]
    assert plot_scores(rows).count('<g id="axes_') == 6


@pytest.mark.filterwarnings("error")  # axes that have no room
@pytest.mark.parametrize("start", [-0.5, -0.2, 0.0, 0.3])
def test_curves_rise_where_their_values_do(start: float) -> None:
    curves = {name: [(step, start + (step + offset) / 100) for step in (1, 30)] for offset, name in enumerate("abc")}
    drawn = plot_curves(curves, "cosine", "a title")
    for color in COLORS[:3]:
        first, last = (float(y) for y in re.findall(rf'<use [^>]* y="([\d.]+)" style="fill: {color.lower()}', drawn))
        assert 0 < last < first - 20 < 230  # the origin is at the top
