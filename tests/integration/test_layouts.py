"""Miniatures of all published layouts: each is looked at, ingested, trained on and scored. Every row is counted."""

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from jobs.cli import main
from pipelines.sources.presets import PRESETS
from pipelines.storage.location import open_store
from tests.specs import BACKBONE, stage
from tests.tables import picture, write_pictures, write_table

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.usefixtures("ray_cluster")]
ROWS = 12
Line = dict[str, Any]


class Layout(NamedTuple):
    """A file, its good row of a number, bad rows with their reasons, what is added to the spec of `rzen look`, and how
    many positives a good row has."""

    file: str
    row: Callable[[int], Line]
    bad: list[tuple[Line, str]]
    added: Line = {}  # noqa: RUF012, never changed
    positives: int = 1


def _mmeb(n: int, **more: Any) -> Line:
    start = {"qry": f"<|image_1|>\nWhat is number {n}?", "qry_image_path": f"images/{n}.jpg"}
    return start | {"pos_text": f"a thing of {n}", "pos_image_path": ""} | more


def _page(n: int, **more: Any) -> Line:
    return {"query": f"Which page has {n}?", "image": {"bytes": picture(n, "JPEG"), "path": "1.png"}} | more


def _turns(asked: str, said: str) -> list[Line]:
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]


def _caption(n: int) -> Line:
    turns = _turns("Describe the video.\n<video>", f"Dog {n} runs.")
    return {"id": f"v{n}", "video": f"frames/{n}", "conversations": turns}


def _qa(n: int) -> Line:
    return {"id": f"v{n}", "video": f"frames/{n}", "conversations": _turns(f"<video>\nWhy {n}?", f"Because of {n}.")}


def _said(role: str, content: str) -> Line:
    return {"role": role, "content": content}


def _swift(n: int) -> Line:
    return {
        "messages": [_said("system", "Match:"), _said("user", f"<image>Cat {n}")],
        "images": [f"images/{n}.jpg"],
        "positive_messages": [[_said("user", f"<image>Same cat {n}")]],
        "positive_images": [[f"images/{(n + 1) % ROWS}.jpg"]],
        "negative_messages": [[_said("user", f"<image>Dog {n}")]],
        "negative_images": [[f"images/{(n + 2) % ROWS}.jpg"]],
    }


def _tevatron(n: int) -> Line:
    ids = {"positive_document_ids": [f"d{n}"], "negative_document_ids": [f"d{(n + 1) % ROWS}"]}
    return {"query_id": str(n), "query_text": f"question {n}", "query_image": None} | ids


def _mbeir(n: int) -> Line:
    start = {"qid": f"7:{n}", "query_txt": f"greener than {n}", "query_img_path": f"images/{n}.jpg"}
    lists = {"pos_cand_list": [f"7:{n}"], "neg_cand_list": [{"did": f"7:{(n + 1) % ROWS}"}]}
    return start | {"query_modality": "image,text"} | lists


GONE = "images/gone.jpg"
LAYOUTS: dict[str, Layout] = {
    "mmeb": Layout(
        "ChartQA/original-00000-of-00001.parquet",
        partial(_mmeb, neg_text="a cow", neg_image_path=""),
        [
            (_mmeb(90, qry_image_path=GONE, neg_text="", neg_image_path=""), "missing_file"),
            (_mmeb(91, qry_image_path="", neg_text="", neg_image_path=""), "placeholder_mismatch"),
        ],
    ),
    "mme5": Layout(
        "hardneg/hardneg.parquet",
        partial(_mmeb, neg_text="['a dog', \"a cow's\"]", neg_image_path="['', '']"),
        [(_mmeb(0, neg_text="['a dog'", neg_image_path="['']"), "bad_list")],
    ),
    "megapairs": Layout(
        "megapairs.jsonl",
        lambda n: {
            "q_img": f"images/{n}.jpg",
            "q_text": [f"darker {n}", f"less light {n}"],
            "t_img": f"images/{(n + 1) % ROWS}.jpg",
            "hns": [f"images/{n}.jpg", f"images/{(n + 2) % ROWS}.jpg"],
        },
        [({"q_img": "images/0.jpg", "q_text": ["x"], "t_img": GONE, "hns": []}, "missing_file")],
    ),
    "mbeir": Layout(
        "query/train/mbeir_cirr_train.jsonl",
        _mbeir,
        [(_mbeir(0) | {"qid": "7:90", "pos_cand_list": ["7:99"]}, "missing_id")],
        {"pool": {"table": "pool.jsonl"}, "instruction": {"mbeir": "prompts.tsv"}},
    ),
    "vdr": Layout(
        "vdr/train.parquet",
        lambda n: _page(n, id=str(n), negatives=[str((n + 1) % ROWS)], language="en"),
        [(_page(90, id="90", negatives=[], language="en") | {"query": None}, "empty_text")],
    ),
    "colpali": Layout(
        "colpali.parquet",
        lambda n: _page(n, answer=f"So {n}.", source="pdf"),
        [
            (
                _page(90, answer="", source="pdf") | {"image": {"bytes": picture(90, "JPEG")[:300], "path": ""}},
                "corrupt_image",
            )
        ],
    ),
    "colpali_answer": Layout(
        "colpali_again.parquet",
        lambda n: _page(n, answer=f"So {n}.", source="pdf"),
        [(_page(90, answer="", source="pdf"), "empty_text")],
    ),
    "visrag": Layout(
        "visrag.parquet",
        lambda n: _page(n, source=("ArxivQA", "PlotQA")[n % 2]),
        [(_page(90, source=""), "empty_text")],
    ),
    "llava_hound_caption": Layout(
        "caption.jsonl", _caption, [(_caption(0) | {"video": "frames/gone"}, "missing_file")]
    ),
    "llava_hound_back": Layout("caption_back.jsonl", _caption, [(_caption(0), "duplicate")]),
    "llava_hound_qa": Layout(
        "qa.jsonl", _qa, [(_qa(0) | {"conversations": _turns("<image> <image>?", "x")}, "placeholder_mismatch")]
    ),
    "cc3m": Layout(
        "cc3m.json",
        lambda n: {"h5v": f"/data/cc3m/images/{n}.jpg", "instruct_ans": [f"a cat of {n}", "other"]},
        [({"h5v": "/data/cc3m/images/0.jpg", "instruct_ans": []}, "empty_text")],
    ),
    "sharegpt4v": Layout(
        "sharegpt4v.json",
        lambda n: {"image": f"/data/images/{n}.jpg", "txt": f"a lamp of {n}"},
        [({"image": "/elsewhere/a.jpg", "txt": "a"}, "outside_folder")],
    ),
    "pixelprose": Layout(
        "pixelprose.parquet",
        lambda n: {"text": f"a tree of {n}", "images": [picture(n)]},
        [({"text": "none", "images": []}, "no_media")],
    ),
    "nli": Layout(
        "nli.csv",
        lambda n: {"sent0": f"Man {n} runs.", "sent1": f"He moves {n}.", "hard_neg": f"He sits {n}."},
        [({"sent0": "", "sent1": "He moves.", "hard_neg": ""}, "empty_text")],
    ),
    "flag_embedding": Layout(
        "flag.jsonl",
        lambda n: {"query": f"q{n}", "pos": [f"p{n}", f"pp{n}"], "neg": [f"n{n}"], "prompt": "Find:", "type": "normal"},
        [({"query": "q", "pos": [], "neg": []}, "empty_text")],
        positives=2,
    ),
    "ms_swift": Layout("swift.jsonl", _swift, [(_swift(0) | {"label": 0.0}, "not_selected")]),
    "tevatron": Layout(
        "tevatron.jsonl",
        _tevatron,
        [(_tevatron(0) | {"positive_document_ids": ["gone"]}, "missing_id")],
        {"pool": {"table": "corpus.jsonl"}},
    ),
    "sentence_pairs": Layout(
        "sts.jsonl",
        lambda n: {"sentence1": f"a {n}", "sentence2": f"b {n}", "score": n / 4},
        [({"sentence1": "a", "sentence2": "b", "score": "high"}, "not_a_number")],
    ),
    "anchor": Layout(
        "triplets.jsonl",
        lambda n: {"anchor": f"a{n}", "positive": f"p{n}", "negative_1": f"n{n}", "negative_2": f"m{n}"},
        [({"anchor": "a", "positive": ["p"], "negative_1": 1}, "not_text")],
    ),
    "sentence_transformers": Layout(
        "any.csv",
        lambda n: {"frage": f"f{n}", "antwort": f"a{n}", "falsch": f"x{n}"},
        [({"frage": "g", "antwort": "", "falsch": ""}, "empty_text")],
    ),
}
BY_NAME = {preset.name for preset in PRESETS if preset.by_name}
"""Layouts that a user has to name."""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tables, their pictures and frames, and the pools of two of them."""
    folder = tmp_path_factory.mktemp("raw")
    frames = [f"frames/{n}/{number}.jpg" for n in range(ROWS) for number in (1, 2)]
    write_pictures(folder, *(f"images/{n}.jpg" for n in range(ROWS)), *frames)
    for layout in LAYOUTS.values():
        lines: Any = [*map(layout.row, range(ROWS)), *(line for line, _ in layout.bad)]
        if layout.file == "cc3m.json":
            lines = {f"k{number}": line for number, line in enumerate(lines)}
        write_table(folder / layout.file, lines)
    pictures = [
        {"did": f"7:{n}", "txt": None, "img_path": f"images/{(n + 1) % ROWS}.jpg", "modality": "image"}
        for n in range(ROWS)
    ]
    write_table(folder / "pool.jsonl", pictures)
    write_table(folder / "corpus.jsonl", [{"docid": f"d{n}", "text": f"document {n}"} for n in range(ROWS)])
    header = "query_modality\tcand_modality\tdataset\tdataset_id\tprompt_1\tprompt_2\n"
    (folder / "prompts.tsv").write_text(f"{header}image,text\timage\tCIRR\t7\tFind a picture.\t\n")
    return folder


def looked_at(name: str, raw: Path, capsys: pytest.CaptureFixture[str]) -> Line:
    """The settings that `rzen look` writes for a table, with what its user has to add."""
    layout = LAYOUTS[name]
    named = ["--preset", name] if name in BY_NAME else []
    status = main(["look", str(raw / layout.file), "--name", name, "--samples", "1", "--json", *named])
    found = json.loads(capsys.readouterr().out)
    settings: Line = found["spec"]["sources"][name]
    assert (found["preset"], settings["preset"]) == (name, name)
    if "pool" in layout.added:  # its targets are in a table that no row names
        assert status == 1
        assert "add pool: {table: FILE}, the table of the targets" in found["problems"][0]
    else:
        assert status == 0
        told = Counter(found["rejected"]) + Counter(reason for _, reason in layout.bad if reason == "corrupt_image")
        assert told == Counter(reason for _, reason in layout.bad if reason != "duplicate")
    text = json.dumps(layout.added)
    for file in ("pool.jsonl", "corpus.jsonl", "prompts.tsv"):
        text = text.replace(f'"{file}"', json.dumps(str(raw / file)))
    return settings | json.loads(text) | ({"media_root": str(raw)} if layout.added else {})


@pytest.mark.timeout(900)
def test_every_layout_is_looked_at_ingested_trained_on_and_evaluated(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert LAYOUTS.keys() == {preset.name for preset in PRESETS}
    sources = {name: looked_at(name, raw, capsys) for name in LAYOUTS}
    data = tmp_path / "data"
    spec = {"kind": "ingest", "out": str(data), "sources": sources, "held_out_fraction": 0.25}
    (tmp_path / "ingest.yaml").write_text(yaml.safe_dump(spec))
    assert main(["run", str(tmp_path / "ingest.yaml")]) == 0

    report = json.loads((data / "report.json").read_text())
    assert report["rejected"] == Counter(reason for layout in LAYOUTS.values() for _, reason in layout.bad)
    assert report["seen"] == sum(ROWS * layout.positives + len(layout.bad) for layout in LAYOUTS.values())
    stored: Counter[str] = Counter()
    for split in ("train", "held_out"):
        stored.update(report["accepted"][split])
    names = {*LAYOUTS, "visrag-ArxivQA", "visrag-PlotQA"} - {"visrag"}
    halves = dict.fromkeys(("visrag-ArxivQA", "visrag-PlotQA"), ROWS // 2)
    positives = {name: ROWS * layout.positives for name, layout in LAYOUTS.items() if name != "visrag"}
    assert stored == positives | halves
    assert open_store(str(data)).exists("DATA.md")

    steps = 20 * (1 + sum(layout.positives for layout in LAYOUTS.values()))
    model = {"backbone": BACKBONE, "tune": "full", "prompt": {"max_visual_tokens": 4}, "dtype": "float32"}
    one = {"workers": 1, "cpus_per_worker": 0.5}
    training = stage(str(tmp_path), steps=steps, cluster=one, model=model | {"gradient_checkpointing": False})
    (tmp_path / "stage.yaml").write_text(training)
    assert main(["run", str(tmp_path / "stage.yaml")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "runs/stage/metrics.jsonl").read_text().splitlines()]
    trained = Counter(row["source"] for row in rows)
    assert trained.keys() == names
    assert min(sum(trained[source] for source in names if source.startswith(layout)) for layout in LAYOUTS) >= 20
    assert sum(trained.values()) == steps

    scored = {
        "kind": "evaluate",
        "models": {"trained": {"base": str(tmp_path / "runs/stage/model")}},
        "data": {"root": str(data), "split": "held_out"},
        "dtype": "float32",
        "cache": str(tmp_path / "cache"),
        "out": str(tmp_path / "scores"),
    }
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(scored))
    assert main(["run", str(tmp_path / "evaluate.yaml")]) == 0
    scores = json.loads((tmp_path / "scores/results.json").read_text())["rows"]
    tasks = {"text_image", "text_page", "text_video", "image_text_image", "text_text", "image_text_text"}
    tasks |= {"page_text_text", "video_text", "video_text_text", "image_text_image_text"}
    assert {row["task"] for row in scores} == tasks
    assert all(0 <= row["value"] <= 1 and row["num_queries"] >= 3 for row in scores)
    # The run itself scores each source, those with other tasks, too. Graded pairs have no right answer.
    last = json.loads((tmp_path / "runs/stage/held_out.jsonl").read_text().splitlines()[-1])
    assert last["step"] == steps
    assert last["sources"].keys() == {*report["accepted"]["held_out"]} - {"sentence_pairs"}
