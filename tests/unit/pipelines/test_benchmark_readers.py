"""Miniature copies of the benchmarks' layouts through their readers and the scoring, with planted vectors: what was
read, and scores that were computed by hand. At least one dataset of each meta-task.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.benchmarks.catalog import check_datasets, format_status, open_dataset
from pipelines.benchmarks.custom import read_custom
from pipelines.benchmarks.table import M_BEIR, M_BEIR_GLOBAL, MMEB_V2, SUITES
from pipelines.benchmarks.types import Dataset, check, read_pool, without_instructions
from pipelines.errors import UserError
from pipelines.items.frames import choose_frames
from rzen.evaluation.dataset_scores import DatasetScores, score_dataset
from rzen.evaluation.metrics import METRIC_NAMES
from tests.layouts import (
    grade,
    image_line,
    page,
    picture,
    planted,
    put,
    put_frames,
    put_images,
    put_lines,
    put_mbeir,
    put_pages,
    put_parquet,
    put_vidore,
)

SECOND = 1 / math.log2(3)  # what a hit on the second place is worth


def scored(dataset: Dataset, found: Mapping[str, Sequence[str]]) -> DatasetScores:
    return score_dataset(dataset, *planted(dataset, found))


def test_image_classification(tmp_path: Path) -> None:
    """Labels are listed with the right one first; three of four pictures find theirs at once, one second."""
    labels = {
        "0": ["cat", "dog", "owl"],
        "1": ["dog", "cat", "owl"],
        "2": ["owl", "cat", "dog"],
        "3": ["cat", "owl", "dog"],
    }
    lines = [
        image_line(
            qry_inst="<|image_1|>\nName the animal.\n",
            qry_img_path=f"VOC2007/{name}.jpg",
            tgt_inst="Represent the label:",
            tgt_text=mine,
            tgt_img_path=[""] * 3,
        )
        for name, mine in labels.items()
    ]
    put_images(tmp_path, "VOC2007", lines)
    dataset = open_dataset(MMEB_V2["VOC2007"], tmp_path)
    query = dataset.queries[0].item
    assert (query.instruction, query.input.text, query.modality) == ("Name the animal.", "", "image")
    assert query.files["q0.jpg"].path == str(tmp_path / "image-tasks/VOC2007/0.jpg")
    assert {item.name: (item.instruction, item.input.text) for item in dataset.candidates} == {
        name: ("", name) for name in ("cat", "dog", "owl")
    }
    result = scored(dataset, {"0": ["cat"], "1": ["dog"], "2": ["owl"], "3": ["owl", "cat"]})
    assert result.value == 3 / 4
    assert result.metrics["mrr@5"] == pytest.approx((3 + 1 / 2) / 4)
    assert result.metrics["precision@10"] == pytest.approx(1 / 10)


def test_image_question(tmp_path: Path) -> None:
    lines = [
        image_line(
            qry_inst="<|image_1|> Answer the question:",
            qry_text="What is it?",
            qry_img_path="OK-VQA/a.jpg",
            tgt_text=["a boat", "a car", "a boat"],
            tgt_img_path=[],
        )
    ]
    put_images(tmp_path, "OK-VQA", lines)
    dataset = open_dataset(MMEB_V2["OK-VQA"], tmp_path)
    assert dataset.queries[0].item.input.text == "What is it?"
    assert len(dataset.queries[0].pool or ()) == 2  # an answer that is listed twice is one
    assert scored(dataset, {"0": ["a car", "a boat"]}).metrics["ndcg_linear@5"] == pytest.approx(SECOND)


def test_image_retrieval_with_captions_of_one_picture(tmp_path: Path) -> None:
    """One picture with two captions is two candidates: keyed by the picture, the wrong one would count as right."""
    lines = [
        image_line(
            qry_inst="Find a picture.",
            qry_text="a red door",
            tgt_inst="<|image_1|>\nRepresent it with its caption:",
            tgt_text=["red", "blue"],
            tgt_img_path=["WebQA/door.jpg", "WebQA/door.jpg"],
        )
    ]
    put_images(tmp_path, "WebQA", lines)
    dataset = open_dataset(MMEB_V2["WebQA"], tmp_path)
    red, blue = dataset.candidates
    assert (red.modality, red.instruction) == ("image+text", "Represent it with its caption:")
    assert red.id != blue.id
    assert dataset.queries[0].relevance == {red.id: 1.0}
    assert dataset.queries[0].item.modality == "text"
    assert scored(dataset, {"0": ["WebQA/door.jpg:blue", "WebQA/door.jpg:red"]}).value == 0.0


def test_image_grounding(tmp_path: Path) -> None:
    lines = [
        image_line(
            qry_inst="<|image_1|> Find the object:",
            qry_text=f"object {number}",
            qry_img_path="coco/a.jpg",
            tgt_inst="<|image_1|> Show the object",
            tgt_text=[""] * 2,
            tgt_img_path=[f"coco/{number}.jpg", f"coco/{1 - number}.jpg"],
        )
        for number in range(2)
    ]
    put_images(tmp_path, "RefCOCO", lines)
    dataset = open_dataset(MMEB_V2["RefCOCO"], tmp_path)
    assert len(list(dataset.candidates)) == 2
    assert scored(dataset, {"0": ["coco/0.jpg"], "1": ["coco/0.jpg", "coco/1.jpg"]}).value == 1 / 2


def test_video_classification(tmp_path: Path) -> None:
    """All classes of the table must be known: from the list, or from a file beside it."""
    row = MMEB_V2["Breakfast"]
    put_parquet(
        tmp_path / "video-tasks/Breakfast/test-00000-of-00001.parquet",
        [{"video_id": "v1", "pos_text": "tea"}, {"video_id": "v2", "pos_text": "milk"}],
    )
    for name in ("v1", "v2"):
        put_frames(tmp_path / "video-tasks/frames/video_cls/Breakfast" / name)
    with pytest.raises(UserError, match=r"names 2 of 10 classes; write all of them into .*labels.txt"):
        open_dataset(row, tmp_path)
    classes = ["tea", "milk", *(f"dish {number}" for number in range(8))]
    put(tmp_path / "video-tasks/Breakfast/labels.txt", "\n".join(classes) + "\n")
    dataset = open_dataset(row, tmp_path)
    item = dataset.queries[0].item
    assert [(media.kind, media.member) for media in item.input.media] == [("video", "q0.frames")]
    assert [path.name for path in choose_frames(Path(item.files["q0.frames"].path), 2)] == [
        "frame_1.jpg",
        "frame_3.jpg",
    ]
    assert dataset.queries[0].pool is None
    assert {candidate.instruction for candidate in dataset.candidates} == {""}
    result = scored(dataset, {"0:v1": ["tea"], "1:v2": ["dish 3", "milk"]})
    assert (result.value, result.num_candidates) == (1 / 2, 10)


def test_video_choice(tmp_path: Path) -> None:
    put_lines(
        tmp_path / "video-tasks/SmthSmthV2/test.jsonl",
        [{"video_id": 7, "pos_text": "Pushing it", "neg_text": ["Pulling it", "Pushing it"]}],
    )
    put_frames(tmp_path / "video-tasks/frames/video_cls/SSv2/7")
    dataset = open_dataset(MMEB_V2["SmthSmthV2"], tmp_path)
    assert scored(dataset, {"0:7": ["Pushing it"]}).value == 1.0


QUESTIONS = {
    "Video-MME": (
        "",
        {"question": "Which?", "videoID": "v", "options": ["A. A dog.", "B. A cat."], "answer": "B"},
        ("v", "Which?\nA. A dog.\nB. A cat.", ["A dog", "A cat"]),
    ),
    "NExTQA": (
        "MC/",
        {"question": "why", "video": 9, "answer": 1, "a0": "a", "a1": "b", "a2": "c", "a3": "d", "a4": "e"},
        ("9", "why\nOptions:\n(A) a\n(B) b\n(C) c\n(D) d\n(E) e", ["a", "b", "c", "d", "e"]),
    ),
    "EgoSchema": (
        "Subset/",
        {"question": "What?", "video_idx": "x", "option": ["A. one", "B. two"], "answer": "1"},
        ("x", "What?A. one B. two", ["one", "two"]),
    ),
    "ActivityNetQA": (
        "",
        {"question": "is it", "video_name": "q", "answer": "no"},
        ("v_q", "is it? (A) yes; (B) no.", ["yes", "no"]),
    ),
    "MVBench": (
        "moving_count/",
        {"question": "How many?", "video": "m.mp4", "candidates": ["1", "2"], "answer": "2"},
        ("moving_count/m.mp4", "How many?\nOptions:\n(A) 1\n(B) 2", ["(A) 1", "(B) 2"]),
    ),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_video_question(name: str, tmp_path: Path) -> None:
    """The second option is right in all of them; found at once it scores 1, found second 0."""
    folder, line, (frames, question, options) = QUESTIONS[name]
    row = MMEB_V2[name]
    put_parquet(tmp_path / f"video-tasks/{name}/{folder}{row.split}-00000-of-00001.parquet", [line])
    put_frames(tmp_path / f"video-tasks/frames/video_qa/{name}/{frames}")
    dataset = open_dataset(row, tmp_path)
    item = dataset.queries[0].item
    assert item.input.text == question
    assert item.instruction.endswith("Return only the exact text of your chosen answer. Question:")
    assert [(one.input.text, one.instruction) for one in dataset.candidates] == [(option, "") for option in options]
    assert scored(dataset, {f"0:{frames}": [options[1]]}).value == 1.0
    assert scored(dataset, {f"0:{frames}": [options[0], options[1]]}).value == 0.0


def test_video_retrieval(tmp_path: Path) -> None:
    """Two captions of one video share it; every video of the set is a candidate."""
    lines = [
        {"video_id": name, "video": f"{name}.mp4", "caption": text}
        for name, text in (("a", "x"), ("b", "y"), ("a", "z"))
    ]
    put_parquet(tmp_path / "video-tasks/MSR-VTT/test_1k/test-00000-of-00001.parquet", lines)
    for name in "ab":
        put_frames(tmp_path / f"video-tasks/frames/video_ret/MSR-VTT/{name}")
    dataset = open_dataset(MMEB_V2["MSR-VTT"], tmp_path)
    assert [item.name for item in dataset.candidates] == ["a", "b"]
    assert {item.instruction for item in dataset.candidates} == {"Understand the content of the provided video."}
    assert scored(dataset, {"0": ["a"], "1": ["a", "b"], "2": ["a"]}).value == pytest.approx(2 / 3)


def test_video_retrieval_by_file_name_and_first_caption(tmp_path: Path) -> None:
    put_lines(tmp_path / "video-tasks/DiDeMo/test.jsonl", [{"video": "clips/a.b.avi", "caption": "x"}])
    put_frames(tmp_path / "video-tasks/frames/video_ret/DiDeMo/a.b")
    put_lines(tmp_path / "video-tasks/VATEX/test.jsonl", [{"videoID": "v_0", "enCap": ["first", "second"]}])
    put_frames(tmp_path / "video-tasks/frames/video_ret/VATEX/v_0")
    assert [item.name for item in open_dataset(MMEB_V2["DiDeMo"], tmp_path).candidates] == ["a.b"]
    assert open_dataset(MMEB_V2["VATEX"], tmp_path).queries[0].item.input.text == "first"


def test_moment_retrieval(tmp_path: Path) -> None:
    put_lines(tmp_path / "video-tasks/QVHighlight/test.jsonl", [{"query": "a man runs", "video_path": "videos/v1.mp4"}])
    for name in ("query", "positive_0", *(f"negative_{number}" for number in range(9))):
        put_frames(tmp_path / "video-tasks/frames/video_mret/QVHighlight/v1" / name)
    dataset = open_dataset(MMEB_V2["QVHighlight"], tmp_path)
    assert len(dataset.queries[0].pool or ()) == 10
    assert dataset.queries[0].item.modality == "video+text"
    result = scored(dataset, {"0:v1": ["v1/negative_3", "v1/positive_0"]})
    assert (result.value, result.metrics["hit@5"]) == (0.0, 1.0)


def test_moments_with_several_right_clips(tmp_path: Path) -> None:
    media = tmp_path / "video-tasks/frames/video_mret/MomentSeeker"
    lines = [
        {
            "query": f"query {number}",
            "input_frames": shown,
            "positive_frames": [{"output_path": "a/p1.mp4"}, {"output_path": "a/p2.mp4"}],
            "negative_frames": [{"output_path": "a/n1.mp4"}],
        }
        for number, shown in enumerate(("", "7.jpg", "b/q.mp4"))
    ]
    put_lines(tmp_path / "video-tasks/MomentSeeker/test.jsonl", lines)
    put(media / "query_7.jpg", "picture")
    for name in ("a_p1", "a_p2", "a_n1", "b_q"):
        put_frames(media / "video_frames" / name)
    dataset = open_dataset(MMEB_V2["MomentSeeker"], tmp_path)
    assert [query.item.modality for query in dataset.queries] == ["text", "image+text", "video+text"]
    assert len({query.item.instruction for query in dataset.queries}) == 3
    found = {
        "0": ["a/p1.mp4", "a/n1.mp4", "a/p2.mp4"],
        "1": ["a/n1.mp4", "a/p1.mp4", "a/p2.mp4"],
        "2": ["a/p2.mp4", "a/p1.mp4"],
    }
    result = scored(dataset, found)
    assert result.value == pytest.approx(2 / 3)
    assert result.metrics["recall@1"] == pytest.approx(1 / 3)
    assert result.metrics["map@5"] == pytest.approx(((1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2 + 1) / 3)


def test_visual_documents_with_grades(tmp_path: Path) -> None:
    put_vidore(tmp_path)
    dataset = open_dataset(MMEB_V2["ViDoRe_biomedical_lectures_v2_multilingual"], tmp_path)
    assert [query.item.name for query in dataset.queries] == ["1", "2"]
    assert sorted(dataset.queries[0].relevance.values()) == [1.0, 2.0]
    assert list(dataset.queries[1].relevance.values()) == [2.0]
    path = tmp_path / "visdoc-tasks/biomedical_lectures_v2_multilingual/3.png"
    assert path.read_bytes() == picture("3")
    result = scored(dataset, {"1": ["4", "0", "3"], "2": ["4"]})
    first = (1 + 2 / 2) / (2 + SECOND)
    assert result.value == pytest.approx((first + 1) / 2)
    assert result.metrics["ndcg_exponential@5"] == pytest.approx(((1 + 3 / 2) / (3 + SECOND) + 1) / 2)


def test_visual_documents_with_long_names(tmp_path: Path) -> None:
    """Pictures that are there already are not written anew; ids are the whole names."""
    long = "a" * 60
    corpus = [page(f"{long}-1.png"), page(f"{long}-2.png")]
    folder = tmp_path / "visdoc-tasks/VisRAG-Ret-Test-ChartQA"
    put_pages(folder, "train", {"q": "which?"}, corpus, [grade("q", f"{long}-2.png", 1)])
    dataset = open_dataset(MMEB_V2["VisRAG_ChartQA"], tmp_path)
    pictures = sorted((tmp_path / "visdoc-tasks/VisRAG_ChartQA").iterdir())
    assert [(path.name[:51], path.suffix) for path in pictures] == [("a" * 50 + "_", ".png")] * 2
    assert scored(dataset, {"q": [f"{long}-2.png"]}).value == 1.0
    put(pictures[0], "kept")
    open_dataset(MMEB_V2["VisRAG_ChartQA"], tmp_path)
    assert pictures[0].read_bytes() == b"kept"


def test_pages_of_one_name_that_show_different_things_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "visdoc-tasks/shiftproject_test_beir"
    corpus = [page("1"), page("2", "x"), page("2", "y")]
    put_pages(folder, "test", {"q": "which?"}, corpus, [grade("q", "2", 1)])
    with pytest.raises(UserError, match="two pages called '2', which show different things"):
        open_dataset(MMEB_V2["ViDoRe_shiftproject"], tmp_path)
    put_pages(folder, "test", {"q": "which?"}, [page("1"), page("2", "x"), page("2", "x")], [grade("q", "2", 1)])
    assert len(list(open_dataset(MMEB_V2["ViDoRe_shiftproject"], tmp_path).candidates)) == 2


def test_repaired_pages_do_not_take_pictures_of_the_set_before(tmp_path: Path) -> None:
    put(tmp_path / "visdoc-tasks/ViDoSeek-page/1.png", "of before")
    put_pages(tmp_path / "visdoc-tasks/ViDoSeek-page-fixed", "test", {"q": "?"}, [page("1")], [grade("q", "1", 1)])
    dataset = open_dataset(MMEB_V2["ViDoSeek-page"], tmp_path)
    (item,) = dataset.candidates
    assert Path(item.files["p0.png"].path).read_bytes() == picture("1")


def test_mbeir_with_a_pool_of_its_own(tmp_path: Path) -> None:
    put_mbeir(tmp_path)
    dataset = open_dataset(M_BEIR["mscoco_task0"], tmp_path)
    assert [item.name for item in dataset.candidates] == ["9:0", "9:1", "9:2"]
    assert {query.item.instruction for query in dataset.queries} == {"Find the image of this caption."}
    assert {item.instruction for item in dataset.candidates} == {""}
    result = scored(dataset, {"9:7": ["9:0"], "9:8": ["9:2", "9:1"]})
    assert (result.value, result.metrics["hit@1"], dataset.row.metric) == (1.0, 1 / 2, "hit@5")


def test_mbeir_with_the_union_of_pools(tmp_path: Path) -> None:
    """Five candidates of both tasks. A caption that finds texts first has the wrong modality in front."""
    put_mbeir(tmp_path)
    captions, questions = (open_dataset(M_BEIR_GLOBAL[name], tmp_path) for name in ("mscoco_task0", "oven_task6"))
    assert captions.corpus == questions.corpus == "M-BEIR union"
    assert [item.id for item in captions.candidates] == [item.id for item in questions.candidates]
    result = scored(captions, {"9:7": ["5:0", "5:1", "9:0"], "9:8": ["9:1"]})
    assert (result.num_candidates, result.metrics["hit@1"]) == (5, 1 / 2)
    assert result.metrics["mrr@5"] == pytest.approx((1 / 3 + 1) / 2)
    assert questions.queries[0].item.modality == "image+text"
    assert len(questions.queries[0].relevance) == 1  # the other one is in no pool
    assert scored(questions, {"5:1": ["5:1"]}).value == 1.0


def test_mbeir_without_any_right_candidate_in_the_pool_scores_nothing(tmp_path: Path) -> None:
    put_mbeir(tmp_path)
    put(tmp_path / "qrels/test/mbeir_mscoco_task0_test_qrels.txt", "9:7 0 9:0 1 0\n9:8 0 4:4 1 0\n")
    result = scored(open_dataset(M_BEIR["mscoco_task0"], tmp_path), {"9:7": ["9:0"], "9:8": ["9:1"]})
    assert (result.value, result.unanswerable) == (1 / 2, 1)


def own_folder(root: Path, qrels: str) -> Path:
    put(root / "cat.jpg", "cat")
    put_lines(
        root / "queries.jsonl",
        [{"_id": "q1", "text": "a cat"}, {"_id": "q2", "text": "two"}, {"_id": "q3", "text": "x"}],
    )
    corpus = [
        {"_id": "d1", "image": "cat.jpg"},
        {"_id": "d2", "title": "Two", "text": "dogs"},
        {"_id": "d3", "text": "x"},
    ]
    put_lines(root / "corpus.jsonl", corpus)
    put(root / "qrels/test.tsv", qrels)
    return root


@pytest.mark.parametrize(
    "qrels",
    ["query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t1\nq2\td2\t1\nq2\td1\t0\n", "q1 0 d1 2\nq1 0 d2 1\nq2 0 d2 1\n"],
    ids=["beir", "trec"],
)
def test_own_folder(qrels: str, tmp_path: Path) -> None:
    """q1 finds d2 (grade 1) before d1 (grade 2); q2 finds d2; q3 has no grades."""
    dataset = read_custom(own_folder(tmp_path, qrels), "mine")
    assert [item.modality for item in dataset.candidates] == ["image", "text", "text"]
    assert [item.input.text for item in dataset.candidates] == ["", "Two dogs", "x"]
    result = scored(dataset, {"q1": ["d2", "d1"], "q2": ["d2"]})
    assert dataset.row.metric == "ndcg_linear@10"
    assert result.value == pytest.approx(((1 + 2 * SECOND) / (2 + SECOND) + 1) / 2)


def test_own_pages(tmp_path: Path) -> None:
    """As ViDoRe has them; their pictures are written beside."""
    put_pages(tmp_path, "test", {"q": "which?"}, [page("1"), page("2")], [grade("q", "2", 1)])
    put(tmp_path / "dataset.json", '{"metric": "ndcg_linear@5", "modality": "visdoc"}')
    dataset = read_custom(tmp_path, "mine")
    assert scored(dataset, {"q": ["2"]}).value == 1.0
    assert (tmp_path / "pictures/2.png").read_bytes() == picture("2")


def test_own_lists(tmp_path: Path) -> None:
    put(tmp_path / "dataset.json", '{"metric": "hit@1", "instruction": "Answer:"}')
    cat = put(tmp_path / "cat.jpg", "cat").name
    line = {"query": {"text": "?"}, "candidates": [{"image": cat}, {"text": "dog"}], "relevance": [0, 3]}
    path = put_lines(tmp_path / "lists.jsonl", [line, line])
    dataset = read_custom(path)
    assert (dataset.row.name, dataset.row.pool, dataset.queries[0].item.instruction) == ("lists", "local", "Answer:")
    assert scored(dataset, {"0": ["dog"], "1": ["cat.jpg", "dog"]}).value == 1 / 2


@pytest.mark.parametrize(
    ("qrels", "problem"),
    [
        ("q1\td9\t1\n", "lacks 'd9'"),
        ("q9\td1\t1\n", "lacks 'q9'"),
        ("q1\td1\t1\nq1\td1\t2\n", "twice"),
        ("q1\td1\tx\nq1\td1\ty\n", "is not: query, candidate, grade"),
        ("q\td\tscore\n", r"test\.tsv: has no grades"),
        ("", r"test\.tsv: has no grades"),
        ("q1\td1\t0\n", r"test\.tsv: has no grade above 0"),
        ("q1\td1\t1\nq2\td2\tnan\n", r"test\.tsv:2: has the grade 'nan'; write a finite number"),
        ("q1\td1\tinf\n", r"test\.tsv:1: has the grade 'inf'"),
        ("q1\td1\t1\nq1\td1\t0\n", r"test\.tsv:2: grades 'd1' for 'q1' twice, as 1 and as 0; keep one"),
        ("q1\td1\t0\nq1\td1\t1\n", r"test\.tsv:2: grades 'd1' for 'q1' twice, as 0 and as 1; keep one"),
        ("q1\td1\t1023.5\n", r"test\.tsv:1: has the grade 1023\.5, above 1023"),
    ],
)
def test_own_grades_that_fit_nothing_are_refused(qrels: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem):
        read_custom(own_folder(tmp_path, qrels))


def test_own_names_that_are_there_twice_and_paths_outside_are_refused(tmp_path: Path) -> None:
    root = own_folder(tmp_path / "data", "q1\td2\t1\n")
    put_lines(root / "corpus.jsonl", [{"_id": "d2", "text": "one"}, {"_id": "d2", "text": "another"}])
    with pytest.raises(UserError, match="d2: is there twice"):
        read_custom(root)
    put_lines(root / "corpus.jsonl", [{"_id": "d2", "image": "../secret.jpg"}])
    with pytest.raises(UserError, match="outside the folder"):
        read_custom(root)
    put(root / "dataset.json", '{"metrics": "hit@1"}')
    with pytest.raises(UserError, match=r"dataset\.json: metrics='hit@1': extra inputs are not permitted; correct it"):
        read_custom(root)


def test_names_of_queries_and_of_unjudged_candidates_are_unique(tmp_path: Path) -> None:
    root = own_folder(tmp_path, "q1\td2\t1\n")
    put_lines(root / "queries.jsonl", [{"_id": "q1", "text": "one"}, {"_id": "q1", "text": "another"}])
    with pytest.raises(UserError, match=r"queries\.jsonl q1: is there twice"):
        read_custom(root)
    own_folder(tmp_path, "q1\td2\t1\n")
    texts = [{"_id": name, "text": f"{number}"} for number, name in enumerate(["d2", "d3", "d3"])]
    put_lines(root / "corpus.jsonl", texts)
    with pytest.raises(UserError, match=r"corpus\.jsonl d3: is there twice"):
        read_custom(root)


def test_lines_that_are_left_out_are_told(tmp_path: Path) -> None:
    qrels = "q1\td1\t2\nq1\td1\t2.0\nq1\td2\t0\nq1\td3\t-1\nq2\td2\t0\n"
    dataset = read_custom(own_folder(tmp_path, qrels), "mine")
    assert dataset.notes == (
        "3 grades are 0 or less: not relevant",
        "1 lines repeat an earlier grade",
        "2 queries have no relevant candidate and are left out",
    )
    assert scored(dataset, {"q1": ["d1"]}).remarks == list(dataset.notes)


def put_duplicates(root: Path, config: str, qrels: str) -> Path:
    """Questions a1 and b1 are among the documents. So is q, but there the name means another text."""
    texts = {"a1": "a", "a2": "a again", "b1": "b", "b2": "b again", "q": "no question"}
    put_lines(root / "corpus.jsonl", [{"_id": name, "text": text} for name, text in texts.items()])
    asked = {"a1": "a", "b1": "b", "q": "question"}
    put_lines(root / "queries.jsonl", [{"_id": name, "text": text} for name, text in asked.items()])
    put(root / "dataset.json", config)
    put(root / "qrels/test.tsv", qrels)
    return root


GRADES = "a1\ta2\t1\nb1\tb2\t1\nq\tb1\t1\n"
FIRST = {"a1": ["a1", "a2"], "b1": ["b1", "b2"], "q": ["q", "b1"]}  # every query finds itself


@pytest.mark.parametrize(
    ("exclude", "mrr", "excluded"),
    [("same_input", (1 + 1 + 1 / 2) / 3, 2), ("same_id", 1.0, 3), ("nothing", 1 / 2, 0)],
)
def test_queries_that_are_documents_are_not_compared_with_themselves(
    exclude: str, mrr: float, excluded: int, tmp_path: Path
) -> None:
    config = f'{{"metric": "mrr@10", "exclude": "{exclude}"}}'
    dataset = read_custom(put_duplicates(tmp_path, config, GRADES), "mine")
    result = scored(dataset, FIRST)
    assert result.value == pytest.approx(mrr)
    assert sum(len(query.excluded) for query in dataset.queries) == excluded
    told = [f"{excluded} queries are not compared with the candidate that they are themselves"] if excluded else []
    assert result.remarks == told
    found = {result.names.get(int(row), "") for row in result.ranked.rows[0]}
    assert ("a1" in found) == (exclude == "nothing")


def test_excluded_candidates_equal_trec_eval(tmp_path: Path) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    result = scored(read_custom(put_duplicates(tmp_path, '{"exclude": "same_id"}', GRADES), "mine"), FIRST)
    qrel = {name: {relevant: 1} for name, relevant in (line.split("\t")[:2] for line in GRADES.splitlines())}
    run = {}
    for name, found in FIRST.items():
        run[name] = {other: 1.0 / (1 + place) for place, other in enumerate(found) if other != name}
    theirs = pytrec_eval.RelevanceEvaluator(qrel, {"ndcg_cut.10"}).evaluate(run)
    ours = result.by_query["ndcg_linear@10"].tolist()
    assert ours == pytest.approx([theirs[query.item.name]["ndcg_cut_10"] for query in result.dataset.queries])


def test_a_query_that_is_its_own_answer(tmp_path: Path) -> None:
    """`same_input` finds it, because the grades ask for it. `same_id` leaves it out, and a query that has no other."""
    qrels = "a1\ta1\t1\na1\ta2\t1\nb1\tb1\t1\nq\tb1\t1\n"
    kept = read_custom(put_duplicates(tmp_path, "{}", qrels), "mine")
    assert [len(query.relevance) for query in kept.queries] == [2, 1, 1]
    assert kept.notes == ()
    left = read_custom(put_duplicates(tmp_path, '{"exclude": "same_id"}', qrels), "mine")
    assert [(query.item.name, len(query.relevance)) for query in left.queries] == [("a1", 1), ("q", 1)]
    assert left.notes == (
        "3 queries are not compared with the candidate that they are themselves",
        "2 queries have themselves for a relevant candidate, which exclude: same_id leaves out",
        "1 queries have no other relevant candidate and are left out",
    )
    check(left, read_pool(left))


def test_lists_exclude_by_id_and_check_their_grades(tmp_path: Path) -> None:
    put(tmp_path / "dataset.json", '{"metric": "hit@1", "exclude": "same_id"}')
    documents = [{"_id": "a", "text": "a"}, {"_id": "b", "text": "b"}, {"_id": "c", "text": "c"}]
    line = {"query": {"_id": "a", "text": "?"}, "candidates": documents, "relevance": [0, 1, 0]}
    dataset = read_custom(put_lines(tmp_path / "lists.jsonl", [line]))
    result = scored(dataset, {"a": ["a", "b"]})
    assert (result.value, dataset.pool_size(dataset.queries[0])) == (1.0, 2)
    for relevance, problem in (
        ([float("nan"), 1, 0], "has the grade nan"),
        ([0, "much", 1], "has the grade 'much'"),
        ([0, 2000, 1], "above 1023"),
    ):
        put_lines(tmp_path / "lists.jsonl", [line | {"relevance": relevance}])
        with pytest.raises(UserError, match=rf"lists\.jsonl:1: .*{problem}"):
            read_custom(tmp_path / "lists.jsonl")
    twice = line | {"candidates": [*documents, documents[1]], "relevance": [0, 1, 0, 0]}
    put_lines(tmp_path / "lists.jsonl", [twice])
    with pytest.raises(UserError, match=r"twice, as 1 and as 0"):
        read_custom(tmp_path / "lists.jsonl")


def test_pages_with_scores_that_contradict_or_are_no_numbers(tmp_path: Path) -> None:
    pages = [page("1"), page("2")]
    put_pages(
        tmp_path, "test", {"q": "which?", "r": "?"}, pages, [grade("q", "2", 1), grade("q", "2", 2), grade("q", "1", 0)]
    )
    assert read_custom(tmp_path, "mine").notes == (
        "1 grades are 0 or less: not relevant",
        "1 lines give a pair a second grade: the higher counts",
        "1 queries have no relevant page and are left out",
    )
    put_pages(tmp_path / "nan", "test", {"q": "which?"}, pages, [grade("q", "2", float("nan")), grade("q", "1", 1)])
    with pytest.raises(UserError, match="has the grade nan"):
        read_custom(tmp_path / "nan", "mine")


def test_cut_offs_are_of_the_row(tmp_path: Path) -> None:
    root = own_folder(tmp_path, "q1\td1\t1\nq2\td2\t1\n")
    put(root / "dataset.json", '{"metric": "recall@2", "cutoffs": [3]}')
    result = scored(read_custom(root, "mine"), {"q1": ["d2", "d1"], "q2": ["d1", "d3"]})
    assert result.value == 1 / 2
    assert {"recall@2", "hit@3", "ndcg_linear@10"} <= result.metrics.keys()
    put(root / "dataset.json", '{"metric": "recal@2"}')
    with pytest.raises(UserError, match=r"'recal@2': is not known; use one of hit@1, hit@2, hit@5"):
        scored(read_custom(root, "mine"), {"q1": [], "q2": []})


def test_a_file_that_was_replaced_by_one_of_its_size_is_another_item(tmp_path: Path) -> None:
    """Vectors are kept by the ids of items: those of the old picture are not taken for the new one."""

    def ids() -> list[str]:
        line = {"image": "cat.jpg"}, {"video": "clip"}
        put_lines(tmp_path / "corpus.jsonl", [{"_id": f"d{number}", **one} for number, one in enumerate(line)])
        return [item.id for item in read_custom(tmp_path).candidates]

    put(tmp_path / "qrels/test.tsv", "q\td0\t1\n")
    put_lines(tmp_path / "queries.jsonl", [{"_id": "q", "text": "x"}])
    cat, frame = put(tmp_path / "cat.jpg", "cat"), put(tmp_path / "clip/0.jpg", "one")
    before = ids()
    assert ids() == before
    for path in (cat, frame):
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert not set(before) & set(ids())


def test_equal_names_with_different_content_do_not_collapse(tmp_path: Path) -> None:
    """Two lists speak of `a`, and mean different texts."""
    lines = [
        {
            "query": {"text": str(n)},
            "candidates": [{"_id": "a", "text": f"text {n}"}, {"_id": "b", "text": "b"}],
            "relevance": [1, 0],
        }
        for n in range(2)
    ]
    dataset = read_custom(put_lines(tmp_path / "lists.jsonl", lines))
    assert [item.name for item in dataset.candidates] == ["a", "b", "a"]
    assert len({item.id for item in dataset.candidates}) == 3
    assert dataset.queries[0].relevance != dataset.queries[1].relevance


def test_a_file_of_another_size_is_another_candidate(tmp_path: Path) -> None:
    root = own_folder(tmp_path, "q1\td1\t1\n")
    before = read_custom(root).queries[0].relevance
    put(root / "cat.jpg", "another cat")
    assert read_custom(root).queries[0].relevance != before


def test_instructions_of_queries_on_candidates_are_refused(tmp_path: Path) -> None:
    """The fault that costs points and raises no error: planted on pages, and on answers, which carry none."""
    put_vidore(tmp_path)
    put_images(tmp_path, "OK-VQA", [image_line(qry_inst="Answer:", qry_text="?", tgt_text=["a", "b"], tgt_img_path=[])])
    for name in ("ViDoRe_biomedical_lectures_v2_multilingual", "OK-VQA"):
        dataset = open_dataset(MMEB_V2[name], tmp_path)
        check(dataset, read_pool(dataset))
        instruction = dataset.queries[0].item.instruction
        wrong = replace(dataset, candidates=[replace(item, instruction=instruction) for item in dataset.candidates])
        with pytest.raises(UserError, match=f"has candidates with the instruction '{instruction}', not '"):
            check(wrong, read_pool(wrong))


def test_without_instructions_only_queries_change(tmp_path: Path) -> None:
    put_vidore(tmp_path)
    dataset = open_dataset(MMEB_V2["ViDoRe_biomedical_lectures_v2_multilingual"], tmp_path)
    bare = without_instructions(dataset)
    assert {query.item.instruction for query in bare.queries} == {""}
    assert {query.item.id for query in bare.queries}.isdisjoint(query.item.id for query in dataset.queries)
    assert bare.candidates is dataset.candidates


def test_candidates_that_are_there_twice_and_stray_pools_are_refused(tmp_path: Path) -> None:
    dataset = read_custom(own_folder(tmp_path, "q1\td1\t1\n"), "mine")
    items, pool = list(dataset.candidates), read_pool(dataset)
    check(dataset, pool)
    with pytest.raises(UserError, match="mine d2: is among the candidates twice"):
        read_pool(replace(dataset, candidates=[*items, items[1]]))
    query, first = dataset.queries[0], items[0].id
    for queries, problem in (
        ([query, query], "among the queries twice"),
        ([replace(query, pool=(items[1].id,))], "relevant candidate outside its pool"),
        ([replace(query, pool=(first, first))], "a pool with a candidate twice"),
        ([replace(query, pool=(first, "0"))], "names a candidate 0 that it has not"),
        ([replace(query, relevance={"1": 1.0})], "names a candidate 1 that it has not"),
        ([replace(query, relevance={first: float("nan")})], "of grade 0 or less"),
        ([replace(query, relevance={})], "no relevant candidate for any query"),
        ([], "has 0 queries, 3 candidates"),
    ):
        with pytest.raises(UserError, match=problem):
            check(replace(dataset, queries=queries), pool)


def test_a_corpus_with_a_part_missing_is_refused(tmp_path: Path) -> None:
    put_vidore(tmp_path)
    corpus = tmp_path / "visdoc-tasks/biomedical_lectures_v2/corpus"
    (corpus / "test-00000-of-00001.parquet").rename(corpus / "test-00000-of-00002.parquet")
    with pytest.raises(UserError, match=r"has 1 of 2 parts of test; fetch https://huggingface\.co/datasets/vidore"):
        open_dataset(MMEB_V2["ViDoRe_biomedical_lectures_v2_multilingual"], tmp_path)


def test_other_columns_are_named(tmp_path: Path) -> None:
    put_lines(tmp_path / "video-tasks/MSVD/test.jsonl", [{"id": "a", "text": "x"}])
    with pytest.raises(UserError, match="has no video_id, caption, but id, text"):
        open_dataset(MMEB_V2["MSVD"], tmp_path)


def test_missing_frames_and_pictures_are_named(tmp_path: Path) -> None:
    put_lines(tmp_path / "video-tasks/MSVD/test.jsonl", [{"video_id": "a", "caption": ["x"]}])
    with pytest.raises(UserError, match="video_ret/MSVD/a: No such file"):
        open_dataset(MMEB_V2["MSVD"], tmp_path)
    (tmp_path / "video-tasks/frames/video_ret/MSVD/a").mkdir(parents=True)
    with pytest.raises(UserError, match="has no frames"):
        open_dataset(MMEB_V2["MSVD"], tmp_path)


@pytest.mark.parametrize("num_kept", [1, 2, 7, 8, 9, 30, 64])
def test_frames_are_chosen_as_the_protocol_does(num_kept: int, tmp_path: Path) -> None:
    """Frames are numbered without zeros in front: 10 comes after 9."""
    put_frames(tmp_path, num_kept)
    chosen = [int(path.stem.removeprefix("frame_")) - 1 for path in choose_frames(tmp_path, 8)]
    expected = np.linspace(0, num_kept - 1, 8).astype(int).tolist() if num_kept >= 8 else list(range(num_kept))
    assert chosen == expected


@pytest.mark.parametrize("suite", SUITES)
def test_every_row_of_the_table_can_be_opened_but_for_its_files(suite: str, tmp_path: Path) -> None:
    for row in SUITES[suite].values():
        with pytest.raises(UserError):
            open_dataset(row, tmp_path)
        assert row.metric in METRIC_NAMES


def test_a_corpus_without_pictures_is_refused(tmp_path: Path) -> None:
    corpus = [{"corpus-id": "1", "image": {"bytes": None, "path": "1.png"}}]
    put_pages(tmp_path / "visdoc-tasks/shiftproject_test_beir", "test", {"q": "?"}, corpus, [grade("q", "1", 1)])
    with pytest.raises(UserError, match="corpus 1: has no bytes of a picture"):
        open_dataset(MMEB_V2["ViDoRe_shiftproject"], tmp_path)


def test_what_is_missing_is_told_in_one_line_with_what_to_fetch(tmp_path: Path) -> None:
    put_vidore(tmp_path)
    put_lines(tmp_path / "video-tasks/MSVD/test.jsonl", [])
    put_mbeir(tmp_path / "mbeir")
    found = check_datasets({"MMEB-V2": tmp_path, "M-BEIR": tmp_path / "mbeir", "M-BEIR global": tmp_path / "mbeir"})
    assert len(found) == 78 + 16 + 16
    there = [(one.row.suite, one.row.name) for one in found if not one.missing]
    assert there == [
        ("MMEB-V2", "ViDoRe_biomedical_lectures_v2_multilingual"),
        *(("M-BEIR", name) for name in ("mscoco_task0", "oven_task6")),
        *(("M-BEIR global", name) for name in ("mscoco_task0", "oven_task6")),
    ]
    missing = {one.row.name: one.missing for one in found}
    assert missing["MSVD"].endswith(
        "fetch https://huggingface.co/datasets/TIGER-Lab/MMEB-V2 and unpack its archives there"
    )
    assert missing["GQA"].endswith(f"MMEB_Test_Instruct/tree/main/GQA into {tmp_path}/image-tasks/GQA")
    text = format_status(found)
    assert "MMEB-V2: 1 of 78 datasets are there" in text
    assert "GQA" in text
    assert all(line.count("\n") == 0 for line in missing.values())
