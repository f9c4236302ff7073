"""An ordinary folder: which samples come out, and by which name everything else is refused."""

import json
import os
from itertools import islice
from pathlib import Path

import pymupdf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import MediaConfig
from pipelines.errors import UserError
from pipelines.instructions import INSTRUCTIONS
from pipelines.samples import FileRef, Input, Media, RawSample, Rejected
from pipelines.sources.folder import KINDS, caption_line, read_folder
from pipelines.sources.passages import choose_passages

CONFIG = MediaConfig()


def write(root: Path, files: dict[str, bytes | str]) -> str:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(root)


def lines(*entries) -> str:
    return "".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries)


def read(root: Path, files: dict[str, bytes | str]) -> tuple[list[RawSample], list[tuple[str, str]]]:
    """Samples, and (origin, reason) of what was refused."""
    rows = list(read_folder(write(root, files), CONFIG))
    samples = [row for row in rows if isinstance(row, RawSample)]
    return samples, [(row.origin, row.reason) for row in rows if isinstance(row, Rejected)]


def pdf(*pages: str) -> bytes:
    document = pymupdf.open()
    for text in pages:
        document.new_page().insert_textbox(pymupdf.Rect(50, 50, 500, 700), text)
    return document.tobytes()


def test_each_line_next_to_a_medium_is_a_sample(tmp_path):
    samples, refused = read(tmp_path, {"b/Cat.JPG": b"x", "b/Cat.txt": "\ufeffa cat\n\n  a tabby cat \n"})
    assert refused == []
    assert [raw.sample.query for raw in samples] == [Input("a cat"), Input("a tabby cat")]
    first = samples[0]
    assert first.sample.positive == Input("", (Media("image", "p0.jpg"),))
    assert first.files == {"p0.jpg": FileRef(str(tmp_path / "b/Cat.JPG"))}
    assert first.sample.origin == "b/Cat.JPG"
    assert first.sample.source == first.sample.task == "text_image"
    assert first.sample.instruction == "Find an image that matches the given caption:"
    assert first.sample.target_instruction == "Understand the content of the provided image."


@pytest.mark.parametrize("extension", sorted(KINDS))
def test_every_extension_is_recognized_in_any_case(tmp_path, extension):
    name = f"a{extension.upper()}"
    samples, refused = read(tmp_path, {name: b"x", "a.txt": "caption"})
    assert refused == []
    task = {"image": "text_image", "document": "text_page", "video": "text_video"}[KINDS[extension]]
    assert samples[0].sample.task == task
    assert samples[0].sample.instruction == INSTRUCTIONS[task][0]
    assert list(samples[0].files) == [f"p0{extension}"]


def test_a_list_names_media_relative_to_its_own_folder(tmp_path):
    entries = lines(
        {"file": "a.jpg", "caption": "one"},
        "",
        {"file": "../top.mp4", "caption": "two", "source": "mine", "task": "t", "instruction": "Look:"},
        {"file": "./deep/../deep/d.pdf", "page": 3, "caption": "three", "instruction": ["Look:", "See:", "Look:"]},
        {"file": "deep/d.pdf", "caption": "four"},
    )
    media = {"s/a.jpg": b"x", "top.mp4": b"x", "s/deep/d.pdf": b"x"}
    samples, refused = read(tmp_path, {"s/captions.jsonl": entries, **media})
    assert refused == []
    assert [raw.sample.origin for raw in samples] == [
        "s/a.jpg",
        "top.mp4",
        "s/deep/d.pdf#page=3",
        "s/deep/d.pdf#page=0",
    ]
    assert samples[2].files == {"p0.pdf": FileRef(str(tmp_path / "s/deep/d.pdf"), 3)}
    mine = samples[1].sample
    assert (mine.source, mine.task, mine.instructions) == ("mine", "t", ("Look:",))
    assert samples[2].sample.instructions == ("Look:", "See:")
    assert mine.target_instruction == "Understand the content of the provided video clip."


def test_composed_retrieval_has_a_medium_in_query_and_target(tmp_path):
    entry = {"query_file": "a.PNG", "query": "make it blue", "file": "b.jpg"}
    samples, refused = read(tmp_path, {"captions.jsonl": lines(entry), "a.PNG": b"x", "b.jpg": b"x"})
    assert refused == []
    (raw,) = samples
    assert raw.sample.query == Input("make it blue", (Media("image", "q0.png"),))
    assert raw.sample.positive == Input("", (Media("image", "p0.jpg"),))
    assert raw.files == {"q0.png": FileRef(str(tmp_path / "a.PNG")), "p0.jpg": FileRef(str(tmp_path / "b.jpg"))}
    assert raw.sample.source == "image_text_image"


def test_a_line_may_grade_its_pair(tmp_path):
    pair = {"query": "q?", "positive": "p."}
    listed = [pair | {"relevance": 3.8}, pair | {"relevance": 0}, pair, pair | {"relevance": "high"}]
    broken = '{"query": "q?", "positive": "p.", "relevance": NaN}'
    samples, refused = read(tmp_path, {"captions.jsonl": lines(*listed, broken)})
    assert [raw.sample.relevance for raw in samples] == [3.8, 0.0, None]
    assert refused == [("captions.jsonl:4", "bad_json"), ("captions.jsonl:5", "bad_json")]


def test_a_line_may_name_a_class_and_its_split(tmp_path):
    line = {"query_file": "a.jpg", "positive": "ring"}
    listed = [line, line | {"source": "shapes", "split": "held_out"}, line | {"split": "test"}]
    samples, rejected = read(tmp_path, {"captions.jsonl": lines(*listed), "a.jpg": b"1"})
    first, second = (raw.sample for raw in samples)
    assert (first.query, first.positive) == (Input(media=(Media("image", "q0.jpg"),)), Input("ring"))
    assert (first.source, first.task, first.instruction) == (
        "image_class",
        "image_class",
        "Represent the given image for classification.",
    )
    assert samples[0].files == {"q0.jpg": FileRef(str(tmp_path / "a.jpg"))}
    assert (second.source, second.task) == ("shapes", "image_class")
    assert [raw.split for raw in samples] == [None, "held_out"]
    assert rejected == [("captions.jsonl:3", "bad_json")]


def test_text_pairs_need_no_media(tmp_path):
    samples, refused = read(tmp_path, {"captions.jsonl": lines({"query": "q?", "positive": "p."})})
    assert refused == []
    assert samples[0].sample.query == Input("q?")
    assert samples[0].sample.positive == Input("p.")
    assert samples[0].files == {}
    assert samples[0].sample.origin == "captions.jsonl:1"
    assert samples[0].sample.source == "text_text"


def test_a_pdf_without_captions_asks_with_its_own_words(tmp_path):
    head = "Annual report of the company. "
    pages = (
        head + "Revenue from harbour cranes grew by eleven percent in the northern region.",
        "",
        head + "The board proposes a dividend of two euros for every ordinary share.",
    )
    samples, refused = read(tmp_path, {"d/r.pdf": pdf(*pages)})
    assert refused == [("d/r.pdf#page=1", "no_text_layer")]
    assert [raw.sample.origin for raw in samples] == ["d/r.pdf#page=0", "d/r.pdf#page=2"]
    assert [raw.files["p0.pdf"].page for raw in samples] == [0, 2]
    assert [raw.sample.query.text for raw in samples] == [pages[0], pages[2]]
    assert samples[0].sample.target_instruction == "Understand the content of the provided document image."


PLANTED = {
    "captions.jsonl": lines(
        {"file": "good.jpg", "caption": "fine"},
        "{broken",
        {"file": "gone.jpg", "caption": "c"},
        {"file": "../secret.jpg", "caption": "c"},
        {"file": "/etc/passwd", "caption": "c"},
        {"file": "quiet.png", "caption": "  "},
        {"file": "notes.md", "caption": "c"},
        {"file": "good.jpg", "caption": "c", "page": 1},
        {"file": "good.jpg"},
        {"file": "good.jpg", "caption": "c", "colour": "red"},
        {"file": "zero.gif", "caption": "c"},
        {"file": "good.jpg", "caption": 7},
        ["good.jpg", "c"],
        {"query": "q", "positive": ""},
        {"query_file": "good.jpg", "query": "q", "file": "gone.jpg"},
        {"file": "good.jpg", "caption": "c", "page": -1},
    ),
    "good.jpg": b"x",
    "quiet.png": b"x",
    "zero.gif": b"",
    "notes.md": "notes",
    "alone.mp4": b"x",
    "blank.webp": b"x",
    "blank.txt": " \n\n",
    "empty.jpeg": b"",
    "latin.bmp": b"x",
    "latin.txt": "caf\u00e9".encode("latin-1"),
    "orphan.txt": "a caption of nothing",
    "fake.pdf": b"<html>",
    "cut.pdf": pdf("some words on a page that was cut")[:300],
    ".hidden.jpg": b"x",
    ".cache/a.jpg": b"x",
    "more/captions.jsonl": b"",
}


def test_media_without_a_caption_are_kept_if_asked_for(tmp_path):
    names = {"a/1 [x].jpg": b"x", "b.mp4": b"x", "c.jpg": b"x", "c.txt": " \n", "d.jpg": b"x", "d.txt": "a dog"}
    root = write(tmp_path, names | {"e.pdf": pdf("", "a page with words"), "empty.png": b"", "x.psd": b"x"})
    kept = list(read_folder(root, CONFIG, keep_uncaptioned=True))
    found = {row.sample.origin: (row.split, row.sample.query) for row in kept if isinstance(row, RawSample)}
    assert found == {
        "d.jpg": (None, Input("a dog")),
        "e.pdf#page=1": (None, Input("a page with words")),
        **{name: ("uncaptioned", Input()) for name in ("a/1 [x].jpg", "b.mp4", "c.jpg", "e.pdf#page=0")},
    }
    assert [(row.origin, row.reason) for row in kept if isinstance(row, Rejected)] == [
        ("empty.png", "empty_file"),
        ("x.psd", "unsupported_format"),
    ]
    reasons = {row.origin: row.reason for row in read_folder(root, CONFIG) if isinstance(row, Rejected)}
    assert (reasons["a/1 [x].jpg"], reasons["c.jpg"]) == ("no_caption", "empty_caption")
    assert reasons["e.pdf#page=0"] == "no_text_layer"


@pytest.mark.parametrize("origin", ["a/1 [x].jpg", 'it\'s a "rose".png', "report.pdf#page=2"])
def test_the_line_that_captions_a_medium_does_so(tmp_path, origin):
    name = origin.partition("#")[0]
    samples, refused = read(tmp_path, {name: b"x", "captions.jsonl": caption_line(origin)})
    assert refused == []
    assert [(raw.sample.origin, raw.sample.query.text) for raw in samples] == [(origin, "what it shows")]


def test_every_planted_fault_is_named_once(tmp_path):
    samples, refused = read(tmp_path, PLANTED)
    assert [raw.sample.query.text for raw in samples] == ["fine"]
    assert refused == [
        ("captions.jsonl:2", "bad_json"),
        ("captions.jsonl:3", "missing_file"),
        ("captions.jsonl:4", "outside_folder"),
        ("captions.jsonl:5", "outside_folder"),
        ("captions.jsonl:6", "empty_caption"),
        ("captions.jsonl:7", "unsupported_format"),
        ("captions.jsonl:8", "bad_json"),
        ("captions.jsonl:9", "bad_json"),
        ("captions.jsonl:10", "bad_json"),
        ("captions.jsonl:11", "empty_file"),
        ("captions.jsonl:12", "bad_json"),
        ("captions.jsonl:13", "bad_json"),
        ("captions.jsonl:14", "empty_caption"),
        ("captions.jsonl:15", "missing_file"),
        ("captions.jsonl:16", "bad_json"),
        ("more/captions.jsonl", "empty_file"),
        ("alone.mp4", "no_caption"),
        ("blank.webp", "empty_caption"),
        ("cut.pdf", "corrupt_pdf"),
        ("empty.jpeg", "empty_file"),
        ("fake.pdf", "not_a_pdf"),
        ("latin.bmp", "unreadable"),
        ("notes.md", "unsupported_format"),
        ("orphan.txt", "missing_file"),
    ]


def test_a_wrong_line_is_reported_with_the_field_and_the_rule(tmp_path):
    entries = lines({"file": "a.jpg", "caption": 7}, {"file": "a.jpg"})
    rows = list(read_folder(write(tmp_path, {"captions.jsonl": entries, "a.jpg": b"x"}), CONFIG))
    assert rows[0].detail == "caption: Input should be a valid string"
    assert rows[1].detail.startswith("has file, needs caption+file or ")


def test_links_out_of_reach_and_special_files_are_unreadable(tmp_path):
    root = tmp_path / "data"
    write(root, {"a.jpg": b"x", "a.txt": "c", "good.jpg": b"x"})
    (root / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(root / "pipe.mp4")
    os.mkfifo(root / "good.txt")
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.png")).write_bytes(b"x")
    rows = list(read_folder(str(root), CONFIG))
    assert [(row.origin, row.reason) for row in rows[1:]] == [
        ("caf\ufffd.png", "unreadable"),
        ("dangling.jpg", "unreadable"),
        ("good.jpg", "unreadable"),
        ("pipe.mp4", "unreadable"),
    ]


def test_a_link_to_a_file_elsewhere_is_followed_if_asked_for(tmp_path):
    (tmp_path / "blob").write_bytes(b"x")
    root = tmp_path / "data"
    write(root, {"a.txt": "c"})
    (root / "a.jpg").symlink_to(tmp_path / "blob")
    (raw,) = read_folder(str(root), CONFIG, follow_links=True)
    assert raw.files["p0.jpg"].path == str(root / "a.jpg")


def test_the_order_depends_on_names_alone(tmp_path):
    files = {f"{folder}/{name}.jpg": b"x" for folder in ("b", "a", "c/d") for name in ("2", "10", "1")}
    captions = {name.replace(".jpg", ".txt"): "c" for name in files}
    one, _ = read(tmp_path / "one", {**files, **captions})
    other, _ = read(tmp_path / "other", dict(reversed({**captions, **files}.items())))
    origins = [raw.sample.origin for raw in one]
    assert origins == sorted(files)
    assert origins == [raw.sample.origin for raw in other]


def test_reading_is_lazy(tmp_path):
    write(tmp_path, {f"{i:03}.{extension}": "c" for i in range(50) for extension in ("jpg", "txt")})
    rows = read_folder(str(tmp_path), CONFIG)
    assert [row.sample.origin for row in islice(rows, 2)] == ["000.jpg", "001.jpg"]
    (tmp_path / "002.txt").write_text("changed after the first two")
    assert next(rows).sample.query.text == "changed after the first two"


@pytest.mark.parametrize(
    ("name", "problem"), [("nowhere", "does not exist"), ("a.md", "is not a folder"), (".", "holds no usable file")]
)
def test_a_place_without_data_is_a_mistake_of_the_user(tmp_path, name, problem):
    write(tmp_path, {"a.md": "text", ".hidden.jpg": b"x", "lonely.txt": "caption"})
    with pytest.raises(UserError) as caught:
        read_folder(str(tmp_path / name), CONFIG)  # at once, before the first row is asked for
    assert caught.value.place == str(tmp_path / name)
    assert problem in caught.value.problem
    assert caught.value.fix


# --- passages -------------------------------------------------------------------------------------------------------


def test_a_passage_avoids_running_heads_and_numbers():
    head = "Confidential draft of the yearly harbour report for all members of the committee."
    pages = [
        f"{head} Whales were counted from three wooden boats near the southern cape. 1 2 3 4 5 6 7 8 9 10 11 12.",
        f"{head} Seventeen lighthouses received new lenses before the autumn storms arrived.",
    ]
    assert choose_passages(pages) == [
        "Whales were counted from three wooden boats near the southern cape.",
        "Seventeen lighthouses received new lenses before the autumn storms arrived.",
    ]


def test_short_pages_are_their_own_passage_and_hyphens_are_undone():
    assert choose_passages(["Chapter Three: Win-\nter Storms", "17", "", "12 13 14"]) == [
        "Chapter Three: Winter Storms",
        "",
        "",
        "",
    ]


@given(
    st.lists(st.lists(st.sampled_from(["Alpha", "beta.", "gam-\nma", "42", "日本。", "x!"]), max_size=150), max_size=5)
)
def test_passages_are_bounded_and_come_from_their_page(pages):
    passages = choose_passages([" ".join(page) for page in pages])
    assert len(passages) == len(pages)
    for passage, page in zip(passages, pages, strict=True):
        assert len(passage.split()) <= 40
        assert "".join(passage.split()) in "".join(page).replace("-\n", "")
