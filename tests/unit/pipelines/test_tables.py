"""Tables in every format and layout: what becomes a sample, how the rest is counted, and errors before any task."""

import gzip
import io
import json
import pickle
import tarfile
import tracemalloc
import uuid
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.ingest import members
from pipelines.ingest.blocks import pair_identity
from pipelines.ingest.members import load_sample
from pipelines.samples import ArchiveRef, CellRef, FileRef, FramesRef, Input, Media, RawSample, Rejected
from pipelines.sources import textual
from pipelines.sources.mapper import RowMapper
from pipelines.sources.media_roots import media_roots
from pipelines.sources.references import ReferenceReader
from pipelines.sources.table_config import TableSource
from pipelines.sources.table_files import find_table
from pipelines.sources.units import Unit
from pipelines.storage.location import open_store
from tests.tables import opened, picture, read, split, write_pictures, write_table

CONFIG = MediaConfig(frames=2)
PAIR = {"query": {"text": "title"}, "positive": {"text": "answer"}}
SHOWN = {"query": {"text": "title"}, "positive": {"media": "photo"}}
ROWS = [{"title": f"title {n}", "answer": f"answer {n}"} for n in range(7)]
EXTENSIONS = ("parquet", "arrow", "feather", "jsonl", "json", "csv", "tsv")


def texts(samples: list[RawSample]) -> list[tuple[str, str]]:
    return [(raw.sample.query.text, raw.sample.positive.text) for raw in samples]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_format_gives_the_same_samples(tmp_path, extension):
    table = write_table(tmp_path / f"t.{extension}", ROWS)
    samples, refused = read(table, **PAIR)
    assert refused == []
    assert texts(samples) == [(row["title"], row["answer"]) for row in ROWS]
    assert {raw.sample.task for raw in samples} == {"text_text"}
    assert {raw.sample.source for raw in samples} == {"mine"}
    first = 2 if extension in ("csv", "tsv") else 1
    assert [raw.sample.origin for raw in samples] == [f"t.{extension}:{first + n}" for n in range(7)]


@pytest.mark.parametrize("extension", ["parquet", "arrow", "feather"])
def test_bytes_in_a_column_are_referred_to_and_read_when_needed(tmp_path, extension):
    """The name lies: `1.png` holds a JPEG. Kind and extension come from the bytes."""
    rows = [{"title": f"t {n}", "photo": {"bytes": picture(n, "JPEG"), "path": "1.png"}} for n in range(5)]
    options = {"row_group_size": 2} if extension == "parquet" else {"max_chunksize": 2}
    reader = opened(write_table(tmp_path / f"t.{extension}", rows, **options), **SHOWN)
    samples, refused = split(reader.read_all())
    assert refused == []
    refs = [raw.files["p0"] for raw in samples]
    assert all(isinstance(ref, CellRef) for ref in refs)
    assert [(ref.part, ref.row) for ref in refs] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert samples[0].sample.task == "text_image"
    with ReferenceReader(CONFIG) as files:
        files.prepare(samples)
        for number, raw in enumerate(samples):
            sample, members = load_sample(raw, CONFIG, reader=files)
            assert sample.positive == Input("", (Media("image", "p0.jpg"),))
            assert members == {"p0.jpg": picture(number, "JPEG")}
    sample, members = load_sample(samples[3], CONFIG)  # without preparation, too
    assert members == {"p0.jpg": picture(3, "JPEG")}


def test_bare_bytes_lists_of_bytes_and_empty_cells(tmp_path):
    rows = [
        {"title": "bare", "photo": picture(1), "more": [picture(2), picture(3)]},
        {"title": "null", "photo": None, "more": []},
        {"title": "empty", "photo": b"", "more": None},
    ]
    table = write_table(tmp_path / "t.parquet", rows)
    samples, refused = read(table, **SHOWN)
    assert len(samples) == 1
    assert refused == [("t.parquet:2", "no_media"), ("t.parquet:3", "empty_file")]
    both = {"media": ["photo", "more"]}
    (raw,), _ = read(table, query={"text": "title"}, positive=both)
    sample, members = load_sample(raw, CONFIG)
    assert [media.member for media in sample.positive.media] == ["p0.png", "p1.png", "p2.png"]
    assert list(members.values()) == [picture(1), picture(2), picture(3)]


def test_equal_bytes_in_two_cells_are_one_content(tmp_path):
    rows = [{"title": "same", "photo": picture(1)}] * 2 + [{"title": "same", "photo": picture(2)}]
    samples, _ = read(write_table(tmp_path / "t.parquet", rows), **SHOWN)
    first, second, third = (pair_identity(raw) for raw in samples)
    assert first == second != third


def test_media_are_found_in_folders_archives_and_by_rebased_paths(tmp_path):
    write_pictures(tmp_path / "raw", "images/a.jpg", "images/b.jpg")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("images/a.jpg", picture(0, "JPEG"), zipfile.ZIP_STORED)
        archive.writestr("images/b.jpg", picture(1, "JPEG") + bytes(5000), zipfile.ZIP_DEFLATED)
        archive.writestr("images/._b.jpg", b"AppleDouble")
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(tmp_path / "raw/images", "./images")
    rows = [{"title": name, "photo": f"/mnt/old/images/{name}.jpg"} for name in ("a", "b", "c")]
    table = write_table(tmp_path / "tables/t.jsonl", [*rows, {"title": "mac", "photo": "/mnt/old/images/._b.jpg"}])
    kinds = {"raw": FileRef, "z.zip": ArchiveRef, "t.tar": ArchiveRef}
    for root, kind in kinds.items():
        samples, refused = read(table, media_root=str(tmp_path / root), rebase={"/mnt/old/": ""}, **SHOWN)
        assert refused == [("t.jsonl:3", "missing_file"), ("t.jsonl:4", "missing_file")]
        assert all(isinstance(raw.files["p0"], kind) for raw in samples)
        loaded = [load_sample(raw, CONFIG)[1]["p0.jpg"] for raw in samples]
        assert loaded[0] == picture(0, "JPEG")
        assert loaded[1].startswith(picture(1, "JPEG"))
    several = [str(tmp_path / "z.zip"), str(tmp_path / "raw")]
    assert len(read(table, media_root=several, rebase={"/mnt/old/": ""}, **SHOWN)[0]) == 2


def test_a_folder_of_frames_is_a_video(tmp_path):
    names = [f"frames/v1/frame_{n}.jpg" for n in (10, 9, 1)]
    write_pictures(tmp_path, *names, "frames/v1/._frame_1.jpg")
    with tarfile.open(tmp_path / "frames.tar", "w") as archive:
        archive.add(tmp_path / "frames", "frames")
    rows = [{"title": "a clip", "photo": "frames/v1"}, {"title": "gone", "photo": "frames/v2"}]
    table = write_table(tmp_path / "t.jsonl", rows)
    for root in (tmp_path, tmp_path / "frames.tar"):
        (raw,), refused = read(table, media_root=str(root), **SHOWN)
        assert refused == [("t.jsonl:2", "missing_file")]
        ref = raw.files["p0"]
        assert isinstance(ref, FramesRef)
        shown = [getattr(one, "member", None) or one.path for one in ref.pictures]
        assert [name.rpartition("_")[2] for name in shown] == ["1.jpg", "9.jpg", "10.jpg"]
        assert raw.sample.task == "text_video"
        sample, members = load_sample(raw, CONFIG)
        assert sample.positive.media == (Media("video", "p0.avi"),)
        assert members["p0.avi"][:4] == b"RIFF"
    write_pictures(tmp_path, "frames/v1/frame_11.jpg")
    (tmp_path / "frames/v1/frame_11.jpg").write_bytes(large_picture())
    (raw,), _ = read(table, **SHOWN)
    with pytest.raises(BadMedia, match=r"unequal_frames: .*12 x 8, 40 x 30"):
        load_sample(raw, CONFIG)


def large_picture() -> bytes:
    from PIL import Image

    sink = io.BytesIO()
    Image.new("RGB", (40, 30)).save(sink, "JPEG")
    return sink.getvalue()


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "link.jpg", "inside/../../secret.jpg"])
def test_no_path_leaves_the_root(tmp_path, name):
    write_pictures(tmp_path, "secret.jpg", "root/good.jpg")
    (tmp_path / "root/link.jpg").symlink_to(tmp_path / "secret.jpg")
    rows = [{"title": "good", "photo": "good.jpg"}, {"title": "bad", "photo": name}]
    table = write_table(tmp_path / "t.jsonl", rows)
    samples, refused = read(table, media_root=str(tmp_path / "root"), **SHOWN)
    assert len(samples) == 1
    assert refused == [("t.jsonl:2", "outside_folder")]


def test_paths_that_name_no_file_are_counted(tmp_path):
    write_pictures(tmp_path, "a.jpg")
    paths = ["a.jpg", "https://example.org/b.jpg", f"{'long' * 100}.jpg", "a\0.jpg", "a.jpg/b.jpg", ".", "s3://b/a.jpg"]
    table = write_table(tmp_path / "t.jsonl", [{"title": "t", "photo": path} for path in paths])
    reasons = ["web_address", "unreadable_file", *["missing_file"] * 3, "outside_folder"]
    assert read(table, **SHOWN)[1] == [(f"t.jsonl:{n}", reason) for n, reason in enumerate(reasons, start=2)]


def test_tables_and_media_in_an_object_store(tmp_path, s3_endpoint):
    root = f"s3://b{uuid.uuid4().hex[:12]}/data"
    store = open_store(root, s3_endpoint)
    store.ensure_bucket()
    for number in range(3):
        store.write(f"images/{number}.jpg", picture(number, "JPEG"))
        store.write(f"frames/v/{number}.jpg", picture(number, "JPEG"))
    rows = [{"title": f"t {n}", "photo": f"images/{n}.jpg", "own": picture(n)} for n in range(3)]
    for extension in ("parquet", "arrow", "feather", "jsonl", "csv"):
        kept = rows if extension in ("parquet", "arrow", "feather") else [{**row, "own": ""} for row in rows]
        store.upload(Path(write_table(tmp_path / f"t.{extension}", kept)), f"tables/t.{extension}")
        samples, refused = read(f"{root}/tables/t.{extension}", media_root=root, endpoint=s3_endpoint, **SHOWN)
        assert refused == []
        assert samples[1].files == {"p0": FileRef(f"{root}/images/1.jpg")}
        with ReferenceReader(CONFIG, s3_endpoint) as reader:
            assert load_sample(samples[1], CONFIG, reader=reader)[1] == {"p0.jpg": picture(1, "JPEG")}
    own = {"query": {"text": "title"}, "positive": {"media": "own"}}
    for extension in ("parquet", "arrow", "feather"):
        samples, _ = read(f"{root}/tables/*.{extension}", endpoint=s3_endpoint, **own)
        with ReferenceReader(CONFIG, s3_endpoint) as reader:
            assert load_sample(samples[2], CONFIG, reader=reader)[1] == {"p0.png": picture(2)}
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("images/0.jpg", picture(0, "JPEG"), zipfile.ZIP_DEFLATED)
    store.upload(tmp_path / "z.zip", "z.zip")
    samples, refused = read(f"{root}/tables/t.csv", media_root=f"{root}/z.zip", endpoint=s3_endpoint, **SHOWN)
    assert [reason for _, reason in refused] == ["missing_file"] * 2
    with ReferenceReader(CONFIG, s3_endpoint) as reader:
        assert load_sample(samples[0], CONFIG, reader=reader)[1] == {"p0.jpg": picture(0, "JPEG")}
    clip = write_table(tmp_path / "clip.jsonl", [{"title": "clip", "photo": "frames/v"}])
    (raw,), _ = read(clip, media_root=root, endpoint=s3_endpoint, **SHOWN)
    with ReferenceReader(CONFIG, s3_endpoint) as reader:
        assert list(load_sample(raw, CONFIG, reader=reader)[1]) == ["p0.avi"]
    with pytest.raises(UserError, match=r"none of the first 3 media is there, such as s3://.*/wrong/images/0.jpg"):
        read(f"{root}/tables/t.csv", media_root=f"{root}/wrong", endpoint=s3_endpoint, **SHOWN)


def test_bad_lines_are_counted_and_never_the_end(tmp_path):
    lines = [
        json.dumps(ROWS[0]),
        "{not json",
        '["a list"]',
        "",
        json.dumps({"title": "x" * (1 << 20), "answer": "too long"}),
        json.dumps({"title": ["a list"], "answer": "a"}),
        json.dumps({"title": {"a": "struct"}, "answer": "a"}),
        json.dumps({"title": "half \ud800", "answer": "a"}),
        json.dumps(ROWS[1]),
    ]
    (tmp_path / "t.jsonl").write_text("\ufeff" + "\n".join(lines))
    samples, refused = read(str(tmp_path / "t.jsonl"), **PAIR)
    assert texts(samples) == [("title 0", "answer 0"), ("a list", "a"), ("title 1", "answer 1")]
    assert refused == [
        ("t.jsonl:2", "bad_json"),
        ("t.jsonl:3", "bad_json"),
        ("t.jsonl:5", "too_long_text"),
        ("t.jsonl:7", "not_text"),
        ("t.jsonl:8", "not_utf8"),
    ]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40), min_size=1, max_size=20),
    st.integers(1, 60),
)
def test_units_of_lines_give_each_line_once(tmp_path_factory, words, unit_bytes):
    path = tmp_path_factory.mktemp("lines") / "t.jsonl"
    path.write_text("".join(json.dumps({"n": n, "word": word}) + "\n" for n, word in enumerate(words)))
    (file,) = find_table(str(path))
    units = textual.units(file, None, unit_bytes)
    rows = [row for unit in units for row in textual.rows(unit, None)]
    assert [row.values["n"] for row in rows] == list(range(len(words)))
    assert len({row.origin for row in rows}) == len(words)


def test_cells_of_csv_stay_texts(tmp_path):
    (tmp_path / "t.csv").write_text('title,answer\n007,NA\ntrue,"two\nlines, one cell"\nshort\n1,2,3\nnull,1e5\n')
    samples, refused = read(str(tmp_path / "t.csv"), **PAIR)
    assert texts(samples) == [("007", "NA"), ("true", "two\nlines, one cell"), ("null", "1e5")]
    assert refused == [("t.csv:4", "bad_row"), ("t.csv:5", "bad_row")]


def test_text_tables_may_be_packed(tmp_path):
    for extension in ("jsonl", "csv"):
        plain = Path(write_table(tmp_path / f"t.{extension}", ROWS))
        packed = tmp_path / f"p.{extension}.gz"
        packed.write_bytes(gzip.compress(plain.read_bytes()))
        assert texts(read(str(packed), **PAIR)[0]) == texts(read(str(plain), **PAIR)[0])
        packed.write_bytes(gzip.compress(plain.read_bytes())[:-20])
        with pytest.raises(UserError, match="is damaged"):
            read(str(packed), **PAIR)


def test_json_may_be_an_object_of_objects_or_hold_lines(tmp_path):
    (tmp_path / "o.json").write_text(json.dumps({f"k{n}": row for n, row in enumerate(ROWS)} | {"bad": 3}))
    samples, refused = read(str(tmp_path / "o.json"), query={"text": "_key"}, positive={"text": "answer"})
    assert texts(samples)[1] == ("k1", "answer 1")
    assert refused == [("o.json:8", "bad_json")]
    (tmp_path / "l.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert len(read(str(tmp_path / "l.json"), **PAIR)[0]) == 7


def test_one_column_is_null_in_one_file_and_text_in_another(tmp_path):
    write_table(tmp_path / "a.parquet", [{"title": "a", "answer": "b", "note": None}])
    write_table(tmp_path / "b.parquet", [{"title": "c", "answer": "d", "note": "more"}])
    settings = {"query": {"text": "title"}, "positive": {"text": "note | answer"}}
    assert texts(read(str(tmp_path / "*.parquet"), **settings)[0]) == [("a", "b"), ("c", "more")]


def test_names_of_files_are_relative_to_the_folder_that_they_share(tmp_path, s3_endpoint, monkeypatch):
    for name in ("a/x.csv", "ab/x.csv", "ab/y.csv"):
        write_table(tmp_path / name, ROWS[:1])
    names = ["a/x.csv", "ab/x.csv", "ab/y.csv"]
    assert [file.name for file in find_table(str(tmp_path))] == names
    assert [file.name for file in find_table(str(tmp_path / "ab"))] == ["x.csv", "y.csv"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    store = open_store(f"s3://b{uuid.uuid4().hex[:12]}/d")
    store.ensure_bucket()
    store.upload_tree(tmp_path, "t")
    assert [file.name for file in find_table(f"{store.url}/t/*/*.csv")] == names
    write_pictures(tmp_path, "a.jpg")
    store.upload(tmp_path / "a.jpg", "t/a/a.jpg")
    store.write("t/a/t.jsonl", json.dumps({"title": "t", "photo": "a.jpg"}).encode())
    (raw,), _ = read(f"{store.url}/t/a/t.jsonl", **SHOWN)  # media are next to the table
    assert raw.files == {"p0": FileRef(f"{store.url}/t/a/a.jpg")}


def test_a_folder_of_save_to_disk_names_its_files(tmp_path):
    folder = tmp_path / "saved/train"
    write_table(folder / "data-00000-of-00001.arrow", ROWS)
    write_table(folder / "cache-12.arrow", ROWS)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    assert len(read(str(folder), **PAIR)[0]) == 7
    (tmp_path / "saved/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(
        UserError, match=r"holds the splits train, test; name one of its folders, such as .*saved/train"
    ):
        opened(str(tmp_path / "saved"), **PAIR)


def test_choices_are_drawn_by_seed_and_row(tmp_path):
    rows = [{"title": f"t {n}", "answer": [f"{n} a", f"{n} b", f"{n} c"]} for n in range(40)]
    table = write_table(tmp_path / "t.jsonl", rows)
    one = {"query": {"text": "title"}, "positive": {"text": "answer", "choose": "one"}}
    first = texts(read(table, **one)[0])
    assert first == texts(read(table, **one)[0])
    assert first != texts(read(table, seed=1, **one)[0])
    assert len({answer[-1] for _, answer in first}) == 3
    each = {"query": {"text": "title"}, "positive": {"text": "answer", "choose": "each"}}
    assert texts(read(table, **each)[0])[:3] == [("t 0", "0 a"), ("t 0", "0 b"), ("t 0", "0 c")]


def test_lists_of_negatives_are_pairs_and_python_lists_are_only_read(tmp_path):
    write_pictures(tmp_path, "a.jpg", "b.jpg")
    rows = [
        {"title": "two", "answer": "x", "neg": "['one', \"two\"]", "neg_image": "['a.jpg', 'b.jpg']"},
        {"title": "text", "answer": "x", "neg": "['one']", "neg_image": "['']"},
        {"title": "none", "answer": "x", "neg": "[]", "neg_image": ""},
        {"title": "uneven", "answer": "x", "neg": "['one']", "neg_image": "['a.jpg', 'b.jpg']"},
        {"title": "code", "answer": "x", "neg": "__import__('os').getcwd()", "neg_image": ""},
        {"title": "number", "answer": "x", "neg": "3", "neg_image": ""},
    ]
    negatives = [{"text": "neg?", "media": "neg_image?", "parse": "python_list"}]
    samples, refused = read(write_table(tmp_path / "t.jsonl", rows), negatives=negatives, **PAIR)
    assert [[(part.text, len(part.media)) for part in raw.sample.negatives] for raw in samples] == [
        [("one", 1), ("two", 1)],
        [("one", 0)],
        [],
    ]
    assert list(samples[0].files) == ["n0", "n1"]
    assert refused == [("t.jsonl:4", "unequal_lists"), ("t.jsonl:5", "bad_list"), ("t.jsonl:6", "bad_list")]


def test_placeholders_must_match_the_media(tmp_path):
    write_pictures(tmp_path, "a.jpg")
    rows = [
        {"title": "<|image_1|>\nWhat is it?", "photo": "a.jpg", "answer": "a"},
        {"title": "<image><image> Compare", "photo": "a.jpg", "answer": "b"},
        {"title": "<image> alone", "photo": "", "answer": "c"},
        {"title": "none", "photo": "a.jpg", "answer": "d"},
    ]
    table = write_table(tmp_path / "t.jsonl", rows)
    both = {"query": {"text": "title", "media": "photo?"}, "positive": {"text": "answer"}}
    samples, refused = read(table, **both)
    assert texts(samples) == [("What is it?", "a"), ("none", "d")]
    assert refused == [("t.jsonl:2", "placeholder_mismatch"), ("t.jsonl:3", "placeholder_mismatch")]
    kept, _ = read(table, strip_tokens=False, **both)
    assert texts(kept)[1] == ("<image><image> Compare", "b")


def test_rows_are_selected_limited_and_split_into_sources(tmp_path):
    rows = [{"title": f"t {n}", "answer": f"a {n}", "lang": ("en", "de", "fr")[n % 3], "ok": n % 2} for n in range(30)]
    table = write_table(tmp_path / "t.csv", rows)
    samples, refused = read(table, where={"lang": ["en", "de"]}, unless={"ok": 0}, **PAIR)
    assert len(samples) == 10
    assert {reason for _, reason in refused} == {"not_selected"}
    samples, refused = read(table, split_by="lang", **PAIR)
    assert {raw.sample.source for raw in samples} == {"mine-en", "mine-de", "mine-fr"}
    few, beyond = read(table, limit=6, **PAIR)
    assert len(few) == 6
    assert [reason for _, reason in beyond] == ["over_limit"] * 24
    assert texts(few) != texts(read(table, **PAIR)[0])[:6]
    assert texts(few) == texts(read(table, limit=6, **PAIR)[0]) != texts(read(table, limit=6, seed=3, **PAIR)[0])


def test_instructions_relevance_and_splits(tmp_path):
    rows = [{"title": "t", "answer": "a", "prompt": "Find:", "score": "4.5"}, {**ROWS[0], "prompt": "", "score": "x"}]
    table = write_table(tmp_path / "t.jsonl", rows)
    settings = {"instruction": {"column": "prompt?"}, "relevance": "score", "split": "held_out", "task": "sts"}
    (raw,), refused = read(table, **settings, **PAIR)
    assert (raw.sample.instruction, raw.sample.relevance, raw.split, raw.sample.task) == (
        "Find:",
        4.5,
        "held_out",
        "sts",
    )
    assert refused == [("t.jsonl:2", "not_a_number")]
    samples, _ = read(table, **PAIR)
    assert samples[0].sample.instruction == "Find a text that matches the given query:"


def test_an_instruction_may_have_several_wordings(tmp_path):
    rows = [{"title": "t", "answer": "a", "prompts": prompts} for prompts in (["Find:", "Get:", "Find:"], [], "See:")]
    table = write_table(tmp_path / "t.jsonl", rows)
    samples, refused = read(table, instruction={"column": "prompts?"}, **PAIR)
    assert refused == []
    assert [raw.sample.instructions for raw in samples] == [("Find:", "Get:"), ("",), ("See:",)]
    samples, _ = read(table, instruction=["Find:", "Get:"], **PAIR)
    assert {raw.sample.instructions for raw in samples} == {("Find:", "Get:")}
    with pytest.raises(ValueError, match="instruction"):
        read(table, instruction=[], **PAIR)


def test_a_pool_is_joined_by_id(tmp_path):
    write_pictures(tmp_path, "a.jpg")
    corpus = [
        {"did": 1, "txt": "one", "img": ""},
        {"did": 2, "txt": "", "img": "a.jpg"},
        {"did": 3, "txt": "", "img": ""},
    ]
    write_table(tmp_path / "pool.parquet", corpus)
    rows = [
        {"title": "q1", "ids": ["1"], "bad": ["2", "1"]},
        {"title": "q2", "ids": [{"did": "2"}], "bad": []},
        {"title": "q3", "ids": ["9"]},
        {"title": "q4", "ids": []},
        {"title": "q5", "ids": ["3"]},
    ]
    settings = {
        "query": {"text": "title"},
        "positive": {"id": "ids.did | ids", "choose": "one"},
        "negatives": [{"id": "bad?"}],
        "pool": {"table": str(tmp_path / "pool.parquet"), "id": "did", "text": "txt?", "media": "img?"},
    }
    samples, refused = read(write_table(tmp_path / "t.jsonl", rows), **settings)
    assert [(raw.sample.positive.text, len(raw.sample.positive.media)) for raw in samples] == [("one", 0), ("", 1)]
    assert [part.text for part in samples[0].sample.negatives] == [""]  # "one" is its positive
    assert [item[1] for item in refused] == ["missing_id", "missing_id", "empty_text"]
    assert refused[0][0] == "t.jsonl:3"


def test_a_unit_is_read_anywhere_and_named_by_content_and_settings(tmp_path):
    rows = [{"title": f"t {n}", "photo": picture(n)} for n in range(6)]
    table = write_table(tmp_path / "t.parquet", rows, row_group_size=2)
    reader = opened(table, **SHOWN)
    assert [(unit.part, unit.first_row, unit.num_rows) for unit in reader.units()] == [(0, 0, 2), (1, 2, 2), (2, 4, 2)]
    there = pickle.loads(pickle.dumps(reader))
    units = pickle.loads(pickle.dumps(reader.units()))
    assert [item for unit in units for item in there.read(unit)] == list(reader.read_all())
    ids = [reader.unit_id(unit) for unit in units]
    assert len(set(ids)) == 3
    assert ids == [opened(table, **SHOWN).unit_id(unit) for unit in units]
    assert ids != [opened(table, task="other", **SHOWN).unit_id(unit) for unit in units]


def test_references_hold_no_media(tmp_path):
    rows = [{"title": f"t {n}", "photo": picture(n % 7) + bytes(100_000)} for n in range(200)]
    reader = opened(write_table(tmp_path / "t.parquet", rows, row_group_size=20), **SHOWN)
    tracemalloc.start()
    samples = list(reader.read_all())
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(samples) == 200
    assert held < 2_000_000  # of 20 MB


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["did", "bytes", "path"]), inner),
    max_leaves=5,
)
SETTINGS = (
    {"query": {"text": "a"}, "positive": {"text": "b"}},
    {"query": {"text": "a?", "media": "b?"}, "positive": {"media": ["c", "d?"]}},
    {"query": {"text": "a", "choose": "each"}, "positive": {"text": "b", "media": "c", "choose": "one"}},
    {"query": {"text": "a[0] | b.did"}, "positive": {"text": "c"}, "negatives": [{"text": "d", "media": "c"}]},
    {"query": {"text": "a"}, "positive": {"text": "b", "parse": "python_list"}, "where": {"c": [0, "x"]}},
    {"query": {"text": "a"}, "positive": {"text": "b"}, "relevance": "c", "split_by": "d", "limit": 2},
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys("abcd", JSON)), max_size=5), st.sampled_from(SETTINGS))
def test_whatever_rows_hold_each_is_a_sample_or_counted(tmp_path_factory, rows, given_settings):
    folder = tmp_path_factory.mktemp("rows")
    (file,) = find_table(write_table(folder / "t.jsonl", rows))
    config = TableSource.model_validate({"table": file.url, "task": "t"} | given_settings)
    mapper = RowMapper("mine", config, media_roots([str(folder)], {}), seed=0)
    found = [list(mapper.samples(row)) for row in textual.rows(Unit(file), None)]
    assert len(found) == len(rows)
    assert all(found)


def test_a_damaged_parquet_file_is_one_error(tmp_path):
    rows = [{"title": f"t {n}" * 50, "answer": f"a {n}" * 50} for n in range(500)]
    path = Path(write_table(tmp_path / "t.parquet", rows, row_group_size=100))
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes(byte ^ 0x5A for byte in whole[200:3000]) + whole[3000:])
    with pytest.raises(UserError, match=r"t\.parquet: cannot be read: .*; fetch it again"):
        read(str(path), **PAIR)
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"t\.parquet: cannot be read: .*; fetch it again"):
        read(str(path), **PAIR)


def test_a_table_that_was_replaced_is_an_error(tmp_path):
    table = write_table(tmp_path / "t.parquet", [{"title": "t", "photo": picture(1)}])
    (raw,), _ = read(table, **SHOWN)
    write_table(tmp_path / "t.parquet", [{"title": "t", "photo": picture(2)}])
    with pytest.raises(UserError, match="was replaced while it was read"):
        load_sample(raw, CONFIG)


def error(table: object, **settings: object) -> str:
    with pytest.raises(UserError) as caught:
        opened(table, **settings)
    return str(caught.value)


def test_errors_before_any_task_say_place_value_rule_and_fix(tmp_path):
    write_pictures(tmp_path, "images/a.jpg")
    table = write_table(tmp_path / "t.jsonl", [{"title": "t", "answer": "a", "photo": "a.jpg"}])
    assert error(table, query={"text": "Titel"}, positive={"text": "answer"}) == (
        f"sources.mine.query.text='Titel': {table} has no such column, but title, answer, photo; did you mean 'title'?"
    )
    assert "sources.mine.media_root=" in error(table, media_root=str(tmp_path / "image"), **SHOWN)
    assert f"{tmp_path} has images, t.jsonl" in error(table, media_root=str(tmp_path / "image"), **SHOWN)
    wrong = error(table, **SHOWN)  # the folder of the table has no a.jpg
    assert "none of the first 1 rows can be used: missing_file 1, as in t.jsonl:1 (a.jpg)" in wrong
    assert f"correct media_root or rebase: media are looked for in {tmp_path}" in wrong
    assert "is not a preset; did you mean 'mmeb'?" in error(table, preset="mmebb")
    assert "is a table of no known layout: its columns are title, answer, photo" in error(table, preset="auto")
    assert "has no positive; write positive: {text: COLUMN}" in error(table, query={"text": "title"})
    missing = error(str(tmp_path / "gone.jsonl"), **PAIR)
    assert missing.startswith(f"sources.mine.table={tmp_path}/gone.jsonl: there is no such file or folder; ")
    assert "has images, t.jsonl" in missing
    assert "matches no file" in error(str(tmp_path / "*.csv"), **PAIR)
    assert "holds no table but a.jpg" in error(str(tmp_path / "images"), **PAIR)
    assert "names targets by id and has no pool" in error(table, query={"text": "title"}, positive={"id": "answer"})


def test_without_columns_it_is_read_as_look_suggests(tmp_path):
    write_pictures(tmp_path, "images/a.jpg")
    table = write_table(tmp_path / "t.jsonl", [{"title": "t", "photo": "a.jpg", "n": n} for n in range(4)])
    reader = opened(table, where={"n": [1, 2]})
    written = {"query": {"text": "title"}, "positive": {"media": "photo"}, "media_root": str(tmp_path / "images")}
    assert reader.suggested == written
    assert [item.reason for item in reader.read_all() if isinstance(item, Rejected)] == ["not_selected"] * 2
    # What was stored of the table is kept when the settings are written down.
    explicit = opened(table, where={"n": [1, 2]}, **written)
    assert explicit.suggested == {}
    assert [reader.unit_id(unit) for unit in reader.units()] == [explicit.unit_id(unit) for unit in explicit.units()]
    assert "media_root" not in opened(table, media_root=str(tmp_path / "images")).suggested
    assert "t.jsonl: no column says what is a query" in error(write_table(tmp_path / "n/t.jsonl", [{"n": 1}]))
    links = write_table(tmp_path / "links.csv", [{"title": "a mug", "photo": "https://shop.example/b.jpg"}])
    told = "fetch it first, as with img2dataset); then read the tars that it writes with `rzen index`"
    assert error(links).endswith(told)


def test_the_first_rows_may_lack_their_media_or_not_be_selected(tmp_path):
    write_pictures(tmp_path, "a.jpg")
    rows = [{"title": f"t {n}", "photo": "a.jpg" if n == 120 else "gone.jpg", "n": n} for n in range(200)]
    table = write_table(tmp_path / "t.jsonl", rows)
    samples, refused = read(table, **SHOWN)
    assert [raw.sample.task for raw in samples] == ["text_image"]
    assert len(refused) == 199
    samples, _ = read(table, where={"n": 120}, **SHOWN)
    assert [raw.sample.task for raw in samples] == ["text_image"]
    assert "has no task, and none of the first 200 rows is selected" in error(table, where={"n": 900}, **SHOWN)


def test_archives_that_cannot_be_read_by_range_name_the_command(tmp_path):
    table = write_table(tmp_path / "t.jsonl", [{"title": "t", "photo": "a.jpg"}])
    assert "is there" not in error(table, **SHOWN)
    (tmp_path / "z.zip").write_bytes(b"x")
    assert f"{tmp_path}/z.zip is there: name it as media_root" in error(table, **SHOWN)
    for name, fix in {
        "i.tar.gz": "unpack it with `tar -xf i.tar.gz`",
        "i.tar.gz.part-00": f"unpack it: cat {tmp_path}/i.tar.gz.part* | tar -xz",
    }.items():
        (tmp_path / name).write_bytes(b"x")
        assert fix in error(table, media_root=str(tmp_path / name), **SHOWN)
    assert f"{tmp_path}/i.tar.gz is there: unpack it" in error(table, **SHOWN)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("ChartQA/1.png", picture())
    assert "/other.zip has ChartQA/1.png" in error(table, media_root=str(tmp_path / "other.zip"), **SHOWN)
    assert "there is no such archive; fetch it" in error(table, media_root=str(tmp_path / "gone.zip"), **SHOWN)
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    assert "cannot be read as an archive" in error(table, media_root=str(tmp_path / "bad.zip"), **SHOWN)


def test_files_that_are_no_table_are_named(tmp_path):
    (tmp_path / "lfs.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    assert "is a pointer of Git LFS, and not the file; fetch the file with `git lfs pull`" in error(
        str(tmp_path / "lfs.parquet"), **PAIR
    )
    (tmp_path / "no.parquet").write_text("hello")
    assert "is no Parquet file" in error(str(tmp_path / "no.parquet"), **PAIR)
    (tmp_path / "x.xlsx").write_text("hello")
    assert "has the extension '.xlsx'" in error(str(tmp_path / "x.xlsx"), **PAIR)
    (tmp_path / "u.csv").write_bytes("a,b\n".encode("utf-16"))
    assert "iconv -f utf-16 -t utf-8" in error(str(tmp_path / "u.csv"), **PAIR)
    for part in (0, 2):
        write_table(tmp_path / f"parts/train-{part:05d}-of-00003.parquet", ROWS)
    assert "has 2 of 3 parts: 00001 missing" in error(str(tmp_path / "parts"), **PAIR)
    write_table(tmp_path / "mixed/a.csv", ROWS)
    write_table(tmp_path / "mixed/a.jsonl", ROWS)
    assert "has files of several formats: csv jsonl" in error(str(tmp_path / "mixed"), **PAIR)


def test_a_page_of_a_pdf_is_selected(tmp_path):
    import pymupdf

    def pages(data):
        with pymupdf.open(stream=data, filetype="pdf") as document:
            return [page.get_text().strip() for page in document]

    with pymupdf.open() as document:
        for number in range(3):
            document.new_page(width=200, height=100).insert_text((20, 50), f"page {number}")
        pdf = document.tobytes()
    (tmp_path / "a.pdf").write_bytes(pdf)
    (tmp_path / "b.png").write_bytes(picture(1))
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("a.pdf", pdf)
    asked = [("a.pdf", None), ("a.pdf", 2), ("a.pdf", "1"), ("a.pdf", 1.5), ("a.pdf", -1), ("a.pdf", 3), ("b.png", 0)]
    rows = [{"q": f"q{n}", "file": name, "page": page} for n, (name, page) in enumerate(asked)]
    table = write_table(tmp_path / "t.jsonl", rows)
    settings = {"query": {"text": "q"}, "positive": {"media": "file", "page": "page?"}}
    for root in (".", "m.zip"):
        samples, refused = read(table, media_root=str(tmp_path / root), **settings)
        loaded = {raw.sample.query.text: load_sample(raw, CONFIG) for raw in samples[:3]}
        found = {text: pages(members["p0.pdf"]) for text, (_, members) in loaded.items()}
        assert found == {"q0": ["page 0"], "q1": ["page 2"], "q2": ["page 1"]}
        assert [reason for _, reason in refused if reason != "missing_file"] == ["not_a_number", "not_a_number"]
        assert len({pair_identity(replace(raw, sample=replace(raw.sample, query=Input()))) for raw in samples[:3]}) == 3
        for raw in samples[3:]:
            with pytest.raises(BadMedia, match="no_such_page"):
                load_sample(raw, CONFIG)
    cells = [{"q": "q", "file": {"bytes": pdf, "path": ""}, "page": page} for page in (2, 0)]
    samples, _ = read(write_table(tmp_path / "t.parquet", cells), **settings)
    assert [pages(load_sample(raw, CONFIG)[1]["p0.pdf"]) for raw in samples] == [["page 2"], ["page 0"]]
    pool = write_table(tmp_path / "pool.jsonl", [{"did": "x", "file": "a.pdf", "page": 1}])
    named = write_table(tmp_path / "named.jsonl", [{"q": "q", "did": "x"}])
    pooled = {"table": pool, "id": "did", "media": "file", "page": "page"}
    (raw,), _ = read(named, query={"text": "q"}, positive={"id": "did"}, pool=pooled)
    assert pages(load_sample(raw, CONFIG)[1]["p0.pdf"]) == ["page 1"]


def test_few_bytes_are_read_ahead_of_their_use(tmp_path, monkeypatch):
    """Pictures, damaged ones and folders of frames: the samples are those that come one by one."""
    monkeypatch.setattr(members, "_WINDOW_BYTES", 3000)
    write_pictures(tmp_path, *(f"{n}.jpg" for n in range(5)), *(f"clip/{n}.jpg" for n in range(9)))
    (tmp_path / "1.jpg").write_bytes(picture(1, "JPEG")[:300])
    rows = [{"title": name, "photo": name} for name in ("0.jpg", "1.jpg", "clip", "2.jpg", "3.jpg", "4.jpg")]
    samples, _ = read(write_table(tmp_path / "t.jsonl", rows), **SHOWN)
    windows = []
    with ReferenceReader(CONFIG) as reader:
        for window in members._windows(samples, reader):
            windows.append(len(window))
            before_last = sum(members._num_bytes(data) for _, files in window[:-1] for data in files.values())
            assert before_last <= 3000
        found = list(members.load_samples(samples, CONFIG, reader=reader))
    assert sum(windows) == 6
    assert len(windows) >= 2
    assert [raw for raw, _ in found] == samples
    assert [getattr(loaded, "reason", "") for _, loaded in found] == ["", "corrupt_image", "", "", "", ""]
    assert [loaded for _, loaded in found if not isinstance(loaded, BadMedia)] == [
        load_sample(raw, CONFIG) for raw, loaded in found if not isinstance(loaded, BadMedia)
    ]
