"""Presets on miniatures in the real layouts: each is recognized, and every row is a sample or counted."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from pipelines.errors import UserError
from pipelines.samples import Input
from pipelines.sources.presets import PRESETS, recognize
from pipelines.sources.selectors import Row
from tests.tables import Rows, opened, picture, read, split, write_pictures, write_table

Side = tuple[str, int]
"""Text, and number of media."""


class Case(NamedTuple):
    """A layout: a file, its rows, query, positive and negatives of each sample, the reasons of the rest, the task."""

    file: str
    rows: Rows
    samples: list[tuple[Side, Side, list[Side]]]
    rejected: list[str]
    task: str
    settings: Mapping[str, Any] = MappingProxyType({})
    recognized: bool = True


CELL = {"bytes": picture(1, "JPEG"), "path": "1.png"}
TURNS = [{"from": "human", "value": "<video>\nWhy?"}, {"from": "gpt", "value": "Because."}]
CAPTION = [{"from": "human", "value": "Describe the video.\n<video>"}, {"from": "gpt", "value": "A dog runs."}]
MMEB = {"qry": "<|image_1|>\nWhat is it?", "qry_image_path": "images/a.jpg", "pos_text": "a cat", "pos_image_path": ""}


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


CASES = {
    "mmeb": Case(
        "ChartQA/original-00000-of-00001.parquet",
        [
            MMEB | {"neg_text": "a dog", "neg_image_path": ""},
            MMEB | {"qry_image_path": "", "neg_text": "", "neg_image_path": ""},
            {"qry": "Find it.", "qry_image_path": "", "pos_text": "<|image_1|>\nIt.", "pos_image_path": "images/b.jpg"},
            MMEB | {"qry_image_path": "images/gone.jpg"},
        ],
        [(("What is it?", 1), ("a cat", 0), [("a dog", 0)]), (("Find it.", 0), ("It.", 1), [])],
        ["placeholder_mismatch", "missing_file"],
        "image_text_text",
    ),
    "mme5": Case(
        "hardneg.parquet",
        [
            MMEB | {"neg_text": "['a dog', \"a cow's\"]", "neg_image_path": "['', '']"},
            MMEB | {"neg_text": "['', '']", "neg_image_path": "['images/a.jpg', 'images/b.jpg']"},
        ],
        [
            (("What is it?", 1), ("a cat", 0), [("a dog", 0), ("a cow's", 0)]),
            (("What is it?", 1), ("a cat", 0), [("", 1), ("", 1)]),
        ],
        [],
        "image_text_text",
    ),
    "megapairs": Case(
        "megapairs.jsonl",
        [
            {
                "q_img": "images/a.jpg",
                "q_text": ["darker"],
                "t_img": "images/b.jpg",
                "hns": ["images/a.jpg", "images/c.jpg"],
            }
        ],
        [(("darker", 1), ("", 1), [("", 1), ("", 1)])],
        [],
        "image_text_image",
    ),
    "mbeir": Case(
        "query/train/mbeir_cirr_train.jsonl",
        [
            {"qid": "7:1", "query_txt": "greener", "query_img_path": "images/a.jpg", "query_modality": "image,text"}
            | {"pos_cand_list": ["7:9", "7:6", "7:5"], "neg_cand_list": [{"did": "7:8"}, {"did": "7:5"}]},
            {"qid": "7:2", "query_txt": None, "query_img_path": "images/a.jpg", "query_modality": "image"}
            | {"pos_cand_list": ["7:7"], "neg_cand_list": []},
        ],
        [(("greener", 1), ("", 1), [("words", 0)])] * 2,  # the second positive is not in the pool
        ["missing_id"] * 2,
        "image_text_image",
        {"pool": {"table": "pool.jsonl"}, "instruction": {"mbeir": "prompts.tsv"}},
    ),
    "vdr": Case(
        "en/train.parquet",
        [
            {"id": "1", "query": "How much?", "image": CELL, "negatives": ["2", "3"], "language": "en"},
            {"id": "2", "query": None, "image": CELL, "negatives": None, "language": "en"},
            {"id": "3", "query": None, "image": {"bytes": picture(3), "path": ""}, "negatives": [], "language": "en"},
        ],
        [(("How much?", 0), ("", 1), [("", 1), ("", 1)])],
        ["empty_text", "empty_text"],
        "text_page",
    ),
    "colpali": Case(
        "colpali.parquet",
        [{"image": CELL, "image_filename": "x", "query": "How?", "answer": "So.", "source": "pdf", "options": None}],
        [(("How?", 0), ("", 1), [])],
        [],
        "text_page",
    ),
    "colpali_answer": Case(
        "colpali.parquet",
        [{"image": CELL, "image_filename": "x", "query": "How?", "answer": "So.", "source": "pdf", "options": None}],
        [(("How?", 1), ("So.", 0), [])],
        [],
        "page_text_text",
        recognized=False,
    ),
    "visrag": Case(
        "visrag.parquet",
        [{"query": f"q {n}", "image": CELL, "source": source} for n, source in enumerate(["ArxivQA", "PlotQA"])],
        [((f"q {n}", 0), ("", 1), []) for n in range(2)],
        [],
        "text_page",
    ),
    "llava_hound_caption": Case(
        "caption.jsonl",
        [{"id": "v1", "video": "frames/v1", "conversations": CAPTION}],
        [(("A dog runs.", 0), ("", 1), [])],
        [],
        "text_video",
    ),
    "llava_hound_back": Case(
        "caption.jsonl",
        [{"id": "v1", "video": "frames/v1", "conversations": CAPTION}],
        [(("", 1), ("A dog runs.", 0), [])],
        [],
        "video_text",
        recognized=False,
    ),
    "llava_hound_qa": Case(
        "qa.jsonl",
        [{"id": f"{name}_0", "video": f"frames/{name}", "conversations": TURNS} for name in ("v1", "gone")],
        [(("Why?", 1), ("Because.", 0), [])],
        ["missing_file"],
        "video_text_text",
    ),
    "cc3m": Case(
        "cc3m.json",
        {  # type: ignore[arg-type]
            "k1": {"h5v": "/data/cc3m/images/a.jpg", "instruct_ans": ["a cat", "other"]},
            "k2": {"h5v": "/data/cc3m/images/b.jpg", "instruct_ans": []},
        },
        [(("a cat", 0), ("", 1), [])],
        ["empty_text"],
        "text_image",
        {"rebase": {"/data/cc3m/": ""}},
    ),
    "sharegpt4v": Case(
        "sharegpt4v.json",
        [{"image": "/data/images/a.jpg", "txt": "a cat"}],
        [(("a cat", 0), ("", 1), [])],
        [],
        "text_image",
        {"rebase": {"/data/": ""}},
    ),
    "pixelprose": Case(
        "pixelprose.parquet",
        [{"text": "a cat", "images": [picture(1)]}, {"text": "none", "images": []}],
        [(("a cat", 0), ("", 1), [])],
        ["no_media"],
        "text_image",
    ),
    "nli": Case(
        "nli.csv",
        [{"sent0": "A man runs.", "sent1": "He moves.", "hard_neg": "He sits."}],
        [(("A man runs.", 0), ("He moves.", 0), [("He sits.", 0)])],
        [],
        "text_text",
    ),
    "flag_embedding": Case(
        "flag.jsonl",
        [
            {"query": "q", "pos": ["p", "o"], "neg": ["n1", "o", "n2"], "pos_scores": [1.0, 0.9], "prompt": "Find:"}
            | {"type": "normal"},
            {"query": "q", "pos": [], "neg": []},
        ],
        [(("q", 0), ("p", 0), [("n1", 0), ("n2", 0)]), (("q", 0), ("o", 0), [("n1", 0), ("n2", 0)])],
        ["empty_text"],
        "text_text",
    ),
    "ms_swift": Case(
        "swift.jsonl",
        [
            {
                "messages": said(("system", "Match:"), ("user", "<image>A cat")),
                "images": ["images/a.jpg"],
                "positive_messages": [said(("user", "<image>Same cat")), said(("user", "Its name"))],
                "positive_images": [["images/b.jpg"], []],
                "negative_messages": [said(("user", "<image>A dog")), said(("user", "<image>A cow"))],
                "negative_images": [["images/c.jpg"], ["images/a.jpg"]],
            },
            {"messages": said(("user", "x")), "positive_messages": [said(("user", "y"))], "label": 0.0},
        ],
        [(("A cat", 1), found, [("A dog", 1), ("A cow", 1)]) for found in (("Same cat", 1), ("Its name", 0))],
        ["not_selected"],
        "image_text_image_text",
    ),
    "tevatron": Case(
        "tevatron.jsonl",
        [
            {"query_id": "1", "query_text": "q", "query_image": None, "positive_document_ids": ["d1", "d3"]}
            | {"negative_document_ids": ["d2"]}
        ],
        [(("q", 0), ("words", 0), [("", 1)]), (("q", 0), ("more words", 0), [("", 1)])],
        [],
        "text_text",
        {"pool": {"table": "corpus.jsonl"}},
    ),
    "sentence_pairs": Case(
        "sts.jsonl",
        [{"sentence1": "a", "sentence2": "b", "score": 0.5}],
        [(("a", 0), ("b", 0), [])],
        [],
        "text_text",
    ),
    "anchor": Case(
        "triplets.jsonl",
        [{"anchor": "a", "positive": "p", "negative_1": "n1", "negative_2": "n2"}],
        [(("a", 0), ("p", 0), [("n1", 0), ("n2", 0)])],
        [],
        "text_text",
    ),
    "sentence_transformers": Case(
        "any.csv",
        [{"frage": "f", "antwort": "a", "falsch": "x"}, {"frage": "g", "antwort": "b", "falsch": ""}],
        [(("f", 0), ("a", 0), [("x", 0)]), (("g", 0), ("b", 0), [])],
        [],
        "text_text",
        recognized=False,
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path, "images/a.jpg", "images/b.jpg", "images/c.jpg", "frames/v1/1.jpg", "frames/v1/2.jpg")
    pool = [
        {"did": "7:9", "txt": None, "img_path": "images/b.jpg", "modality": "image"},
        {"did": "7:8", "txt": "words", "img_path": None, "modality": "text"},
        {"did": "7:5", "txt": None, "img_path": "images/c.jpg", "modality": "image"},
    ]
    write_table(tmp_path / "pool.jsonl", pool)
    corpus = [{"docid": "d1", "text": "words"}, {"docid": "d2", "image": "images/c.jpg"}]
    write_table(tmp_path / "corpus.jsonl", [*corpus, {"docid": "d3", "text": "more words"}])
    header = "query_modality\tcand_modality\tdataset\tdataset_id\tprompt_1\tprompt_2\tprompt_3\n"
    prompts = "\t".join(["Find a picture.", "", "Search."])
    (tmp_path / "prompts.tsv").write_text(f"{header}image,text\timage\tCIRR\t7\t{prompts}\n")
    return tmp_path


def settings_of(case: Case, folder: Path) -> dict[str, Any]:
    """The settings, with the files that they name in the folder."""
    text = json.dumps(dict(case.settings))
    for name in ("pool.jsonl", "corpus.jsonl", "prompts.tsv"):
        text = text.replace(f'"{name}"', json.dumps(str(folder / name)))
    return {"media_root": str(folder), **json.loads(text)}


def shown(part: Input) -> Side:
    return part.text, len(part.media)


@pytest.mark.parametrize("name", [preset.name for preset in PRESETS])
def test_every_row_of_a_published_layout_is_accounted_for(name: str, folder: Path) -> None:
    case = CASES[name]
    table = write_table(folder / case.file, case.rows)
    reader = opened(table, preset="auto" if case.recognized else name, **settings_of(case, folder))
    assert reader.preset == name
    samples, refused = split(reader.read_all())
    parts = [(raw.sample.query, raw.sample.positive, raw.sample.negatives) for raw in samples]
    assert [
        (shown(query), shown(positive), [shown(negative) for negative in negatives])
        for query, positive, negatives in parts
    ] == case.samples
    assert [reason for _, reason in refused] == case.rejected
    assert len({raw.sample.origin for raw in samples} | {origin for origin, _ in refused}) == len(case.rows)
    assert {raw.sample.task for raw in samples} == {case.task}
    for raw in samples:
        assert set(raw.files) == {media.member for part in raw.sample.inputs() for media in part.media}


def test_every_preset_says_what_it_is_and_has_a_name_of_its_own() -> None:
    assert len({preset.name for preset in PRESETS}) == len(PRESETS) == len(CASES)
    assert all(len(preset.about) > 10 for preset in PRESETS)


def test_the_instruction_comes_from_where_the_layout_has_it(folder: Path) -> None:
    def instructions(name: str) -> set[tuple[str, str]]:
        case = CASES[name]
        samples, _ = read(write_table(folder / case.file, case.rows), **settings_of(case, folder))
        return {(raw.sample.instruction, raw.sample.target_instruction) for raw in samples}

    assert instructions("mmeb") == {("", "")}  # inside of `qry`
    assert instructions("mbeir") < {("Find a picture.", ""), ("Search.", "")}
    assert instructions("flag_embedding") == {("Find:", "")}
    assert instructions("ms_swift") == {("Match:", "")}
    assert instructions("pixelprose") == {
        ("Find an image that matches the given caption:", "Understand the content of the provided image.")
    }


def test_prompts_of_mbeir_are_wordings_of_one_instruction(folder: Path) -> None:
    case = CASES["mbeir"]
    rows = [case.rows[0] | {"qid": f"7:{number}"} for number in range(40)]
    samples, _ = read(write_table(folder / case.file, rows), **settings_of(case, folder))
    found = Counter(raw.sample.instructions for raw in samples)
    assert set(found) == {("Find a picture.", "Search."), ("Search.", "Find a picture.")}
    assert min(found.values()) > 8


def test_sources_of_visrag_are_named_by_their_values(folder: Path) -> None:
    case = CASES["visrag"]
    samples, _ = read(write_table(folder / case.file, case.rows))
    assert [raw.sample.source for raw in samples] == ["mine-ArxivQA", "mine-PlotQA"]


def test_relevance_comes_from_the_score(folder: Path) -> None:
    case = CASES["sentence_pairs"]
    (raw,), _ = read(write_table(folder / case.file, case.rows))
    assert raw.sample.relevance == 0.5


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "names targets by id"),
        ({"pool": {"table": "{folder}/gone.jsonl"}}, r"sources\.mine\.pool\.table=.*gone\.jsonl: there is no such"),
        ({"pool": {"table": "{folder}/pool.jsonl", "id": "dod"}}, r"pool\.id='dod': .* did you mean 'did'\?"),
        ({"pool": {"table": "{folder}/pool.jsonl"}, "instruction": {"mbeir": "{folder}/gone.tsv"}}, "no such file"),
    ],
)
def test_a_pool_or_prompts_that_are_missing_are_errors(folder: Path, settings: dict[str, Any], problem: str) -> None:
    case = CASES["mbeir"]
    table = write_table(folder / case.file, case.rows)
    given = json.loads(json.dumps(settings).replace("{folder}", str(folder)))
    if not given:
        given = {"query": {"text": "query_txt?"}, "positive": {"id": "pos_cand_list"}}
    with pytest.raises(UserError, match=problem):
        opened(table, media_root=str(folder), **given)


def test_a_row_of_any_other_table_is_of_no_layout() -> None:
    row = Row({"title": "a", "text": "b"}, ("title", "text"), "t:1")
    assert recognize(("title", "text"), [row]) is None
    assert recognize((), []) is None


def test_settings_of_the_user_replace_those_of_the_preset(folder: Path) -> None:
    case = CASES["nli"]
    table = write_table(folder / case.file, case.rows)
    (raw,), _ = read(table, preset="nli", negatives=[], task="entailment", instruction="Read:")
    assert (raw.sample.negatives, raw.sample.task, raw.sample.instruction) == ((), "entailment", "Read:")
