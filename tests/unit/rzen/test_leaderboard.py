"""The tables of a benchmark, what counts 0 in the official mean, and the file for the leaderboard."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from pipelines.benchmarks.catalog import open_dataset
from pipelines.benchmarks.table import M_BEIR, M_BEIR_GLOBAL, META_TASKS, MMEB_V2, submitted_name
from pipelines.benchmarks.types import Row
from pipelines.errors import UserError
from rzen.config import ModelCard
from rzen.evaluation.dataset_scores import score_dataset
from rzen.evaluation.files import write_files
from rzen.evaluation.leaderboard import (
    Scores,
    build_leaderboard,
    coverage,
    markdown,
    means,
    plot_means,
    side_by_side,
    terminal,
    write_leaderboard,
)
from rzen.evaluation.metrics import METRIC_NAMES
from rzen.evaluation.submission import Submission, make_submission, write_submission
from tests.layouts import grade, page, planted, put_pages

CARD = ModelCard(
    model_name="toy",
    model_backbone="Qwen2-VL",
    model_size="2B parameters",
    embedding_dimension=1536,
    max_length_tokens=4096,
    model_release_date="2026-11-21",
    url="https://example.org",
)


def scores(value: float, count: int) -> Scores:
    return {**dict.fromkeys(METRIC_NAMES, value), "num_pred": count, "num_data": count}


def whole(row: Row, value: float) -> Scores:
    return scores(value, row.num_queries or 0)


def test_table_of_mmeb_v2() -> None:
    """Counts of datasets, pools, metrics and queries are those of the protocol."""
    rows = MMEB_V2.values()
    assert tuple(dict.fromkeys(row.meta_task for row in rows)) == META_TASKS
    counts = [sum(row.meta_task == name for row in rows) for name in META_TASKS]
    assert counts == [10, 10, 12, 4, 5, 5, 5, 3, 24]
    assert {(row.modality, row.metric) for row in rows} == {
        ("image", "hit@1"),
        ("video", "hit@1"),
        ("visdoc", "ndcg_linear@5"),
    }
    pools = {row.name: row.pool for row in rows}
    shared = {"HMDB51", "UCF101", "K700", "Breakfast", "MSR-VTT", "MSVD", "DiDeMo", "YouCook2", "VATEX"}
    assert {name for name in pools if MMEB_V2[name].modality != "visdoc" and pools[name] == "global"} == shared
    assert {pools[row.name] for row in rows if row.modality == "visdoc"} == {"global"}
    unlike_1000 = {row.name: row.num_queries for row in rows if row.num_queries != 1000 and row.modality == "video"}
    assert unlike_1000 == {
        **{"Breakfast": 433, "MVBench": 4000, "Video-MME": 2700, "NExTQA": 8564, "EgoSchema": 500},
        **{"DiDeMo": 1004, "MSVD": 670, "VATEX": 4478, "YouCook2": 3179},
        **{"QVHighlight": 1083, "Charades-STA": 727, "MomentSeeker": 1602},
    }
    assert sum(row.num_queries or 0 for row in rows if row.modality == "visdoc") == 12_590
    assert [submitted_name(MMEB_V2[name]) for name in ("ViDoSeek-page", "ViDoSeek-doc", "GQA")] == [
        "ViDoSeek-page-fixed",
        "ViDoSeek-doc",
        "GQA",
    ]


def test_candidates_of_classification_and_questions_have_no_instruction() -> None:
    bare = {row.meta_task for row in MMEB_V2.values() if row.modality == "video" and not row.target_instruction}
    assert bare == {"video classification", "video QA"}
    assert not any(row.target_instruction == row.instruction != "" for row in MMEB_V2.values())


def test_table_of_mbeir() -> None:
    assert len(M_BEIR) == len(M_BEIR_GLOBAL) == 16
    assert {name for name, row in M_BEIR.items() if row.metric == "hit@10"} == {
        *("fashion200k_task0", "fashion200k_task3", "fashioniq_task7")
    }
    assert {row.metric for row in M_BEIR.values()} == {"hit@5", "hit@10"}
    assert sum(row.num_queries or 0 for row in M_BEIR.values()) == 190_573
    assert {row.subset for row in M_BEIR_GLOBAL.values()} == {"union"}


def test_what_is_missing_or_incomplete_counts_zero_and_is_named() -> None:
    """One dataset of 78 at 0.78, one with a query missing, one that failed: the mean is 1 point."""
    found = {"GQA": whole(MMEB_V2["GQA"], 0.78), "MSVD": scores(0.9, 669)}
    lines = build_leaderboard(MMEB_V2.values(), found, {"VOC2007": "image-tasks/VOC2007: has no test-*.parquet"})
    overall = {mean.name: mean for mean in means(lines)}
    assert overall["all"].official == pytest.approx(0.01)
    assert (overall["all"].of_counted, overall["all"].num_counted) == (0.78, 1)
    assert overall["image QA"].official == pytest.approx(0.078)
    assert overall["video"].of_counted is None
    assert overall["image"].num_datasets == 36
    text = coverage(lines)
    assert text.startswith("1 of 78 datasets count; the others count 0 in the official mean\n")
    assert "  MSVD: 669 of 670 queries\n" in text
    assert "  VOC2007: image-tasks/VOC2007: has no test-*.parquet\n" in text
    assert "  EDIS: was not scored\n" in text


def test_official_mean_is_over_datasets_not_over_meta_tasks() -> None:
    found = {name: whole(row, 1.0 if row.modality == "image" else 0.0) for name, row in MMEB_V2.items()}
    assert means(build_leaderboard(MMEB_V2.values(), found, {}))[-1].official == pytest.approx(36 / 78)


def test_each_dataset_counts_by_its_own_metric() -> None:
    values = {**scores(0.5, 670), "hit@1": 0.25}
    assert build_leaderboard([MMEB_V2["MSVD"]], {"MSVD": values}, {})[0].value == 0.25
    values = {**scores(0.5, 1142), "ndcg_linear@5": 0.75}
    assert build_leaderboard([MMEB_V2["ViDoSeek-doc"]], {"ViDoSeek-doc": values}, {})[0].value == 0.75


def test_tables_as_markdown_json_and_on_a_terminal(tmp_path: Path) -> None:
    rows = [MMEB_V2["MSVD"], MMEB_V2["GQA"]]
    lines = build_leaderboard(rows, {"MSVD": whole(rows[0], 0.5)}, {"GQA": "a|b"})
    text = markdown(lines)
    assert text.startswith(
        "|  | official mean | mean of those that count | datasets |\n"
        "| --- | --- | --- | --- |\n"
        "| video retrieval | 50.0 | 50.0 | 1 of 1 |\n"
        "| image QA | 0.0 | – | 0 of 1 |\n"
        "| video | 50.0 | 50.0 | 1 of 1 |\n"
        "| image | 0.0 | – | 0 of 1 |\n"
        "| all | 25.0 | 50.0 | 1 of 2 |\n"
    )
    assert "| MSVD | video retrieval | hit@1 | 50.0 | 670 |  |\n" in text
    assert "| GQA | image QA | hit@1 | – | 0 | a\\|b |\n" in text
    console = Console(width=100, color_system=None, file=io.StringIO())
    console.print(terminal(lines))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert printed.splitlines()[-1].split() == ["all", "25.0", "50.0", "1", "of", "2"]
    write_leaderboard(tmp_path / "report.json", lines, {"frames": 8})
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["settings"] == {"frames": 8}
    assert content["means"][-1] == {
        **{"name": "all", "official": 0.25, "of_counted": 0.5, "num_counted": 1, "num_datasets": 2}
    }
    assert [(one["name"], one["score"], one["problem"]) for one in content["datasets"]] == [
        ("MSVD", 0.5, ""),
        ("GQA", None, "a|b"),
    ]
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == text


def test_submission_of_all_datasets(tmp_path: Path) -> None:
    """In the form of the leaderboard, under its names, and valid against the JSON schema."""
    jsonschema = pytest.importorskip("jsonschema")
    rng = random.Random(0)
    found = {name: whole(row, rng.random()) for name, row in MMEB_V2.items()}
    path = tmp_path / "toy.json"
    write_submission(path, make_submission(CARD, found))
    content = json.loads(path.read_text())
    assert list(content) == ["metadata", "metrics"]
    assert list(content["metadata"]) == [
        *("model_name", "model_backbone", "model_size", "embedding_dimension", "max_length_tokens"),
        *("model_release_date", "data_source", "url", "report_generated_date"),
    ]
    assert content["metadata"]["data_source"] == "Self-Reported"
    assert [len(content["metrics"][modality]) for modality in ("image", "video", "visdoc")] == [36, 18, 24]
    assert {"ViDoSeek-page-fixed", "MMLongBench-page-fixed"} <= content["metrics"]["visdoc"].keys()
    assert "ViDoSeek-page" not in content["metrics"]["visdoc"]
    assert content["metrics"]["image"]["GQA"] == found["GQA"]
    schema = Submission.model_json_schema(by_alias=True)
    jsonschema.validate(content, schema)
    Submission.model_validate_json(path.read_text())
    del content["metrics"]["video"]["MSVD"]["hit@1"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("MSVD", scores(0.5, 669), "MSVD has 669 queries, not 670"),
        ("MSVD", scores(1.5, 670), "less than or equal to 1"),
        ("MSVD", {"hit@1": 0.5, "num_pred": 670, "num_data": 670}, "Field required"),
        ("MSVD", {**scores(0.5, 670), "extra": 1}, "Extra inputs"),
        ("mine", scores(0.5, 670), "is no dataset of MMEB-V2"),
    ],
)
def test_submission_that_the_leaderboard_would_misread_is_refused(name: str, values: Scores, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        make_submission(CARD, {name: values})


@pytest.mark.parametrize("field", ["model_name", "model_release_date", "url"])
def test_model_card_is_checked(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        ModelCard.model_validate({**CARD.model_dump(), field: ""})
    with pytest.raises(ValueError, match="day"):
        ModelCard.model_validate({**CARD.model_dump(), "model_release_date": "2026-02-30"})


def test_from_files_on_disk_to_the_submission(tmp_path: Path) -> None:
    """A whole small set of the benchmark, 52 queries for 3 pages: read, scored, written, told and submitted."""
    row = MMEB_V2["ViDoRe_esg_reports_human_labeled_v2"]
    queries = {str(number): f"query {number}" for number in range(52)}
    qrels = [grade(name, str(int(name) % 3), 1 + int(name) % 2) for name in queries]
    put_pages(tmp_path / row.data, "test", queries, [page(str(number)) for number in range(3)], qrels)
    dataset = open_dataset(row, tmp_path)
    found = {name: [str(int(name) % 3 if int(name) >= 13 else (int(name) + 1) % 3)] for name in queries}
    result = score_dataset(dataset, *planted(dataset, found))
    # 13 queries find another page first; their own then ties with the third, which goes against it.
    assert result.value == pytest.approx((39 + 13 / 2) / 52)
    assert result.remarks == ["13 of 52 queries would have another rank if ties went the other way"]
    write_files(result, tmp_path / "scores")
    values = json.loads((tmp_path / f"scores/{row.name}_score.json").read_text())
    lines = build_leaderboard(MMEB_V2.values(), {row.name: values}, {})
    assert means(lines)[-1].official == pytest.approx(result.value / 78)
    submission = make_submission(CARD, {row.name: values})
    assert list(submission.metrics.visdoc) == [row.name]


def test_models_input_by_input() -> None:
    rows = [MMEB_V2["MSVD"], MMEB_V2["GQA"]]
    leaderboards = {
        "old": build_leaderboard(rows, {"MSVD": whole(rows[0], 0.5), "GQA": whole(rows[1], 0.25)}, {}),
        "new": build_leaderboard(rows, {"MSVD": whole(rows[0], 0.75)}, {}),
    }
    assert side_by_side(leaderboards) == (
        "| model | video retrieval | image QA | video | image | all | datasets |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| old | 50.0 | 25.0 | 50.0 | 25.0 | 37.5 | 2 of 2 |\n"
        "| new | 75.0 | 0.0 | 75.0 | 0.0 | 37.5 | 1 of 2 |\n"
    )
    picture = plot_means(leaderboards)
    assert picture == plot_means(leaderboards)
    assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
    assert picture != plot_means({**leaderboards, "new": leaderboards["old"]})
    with pytest.raises(ValueError, match="new was not measured on the datasets of old"):
        side_by_side({**leaderboards, "new": leaderboards["new"][:1]})
