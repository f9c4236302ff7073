"""Folders and lists of untrusted makers: links that leave, texts without end, wrong types. Nothing is lost silently."""

import io
import json
import os
import resource
import tarfile
import threading
from pathlib import Path

import pytest

from pipelines.benchmarks.custom import read_custom
from pipelines.config import MediaConfig
from pipelines.errors import UserError
from pipelines.samples import Rejected
from pipelines.shards.external import scan
from pipelines.shards.mapping import SampleMapper, SourceMapping
from pipelines.sources.folder import read_folder
from pipelines.texts import MAX_TEXT_BYTES

CONFIG = MediaConfig()


def read(root: Path, **options: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Return origin -> query of what is used, and origin -> reason of what is not."""
    used, rejected = {}, {}
    for row in read_folder(str(root), CONFIG, **options):
        if isinstance(row, Rejected):
            rejected[row.origin] = row.reason
        else:
            used[row.sample.origin] = row.sample.query.text
    return used, rejected


@pytest.fixture
def folder(tmp_path):
    """A folder with one good pair, next to a secret."""
    (tmp_path / "secret.txt").write_text("a key")
    (tmp_path / "secret.jpg").write_bytes(b"private")
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    (root / "ok.jpg").write_bytes(b"x")
    (root / "ok.txt").write_text("a caption")
    return root


def test_links_that_leave_the_folder_are_counted_by_name(folder):
    (folder / "leak.jpg").symlink_to("/etc/hostname")
    (folder / "leak.txt").write_text("c")
    (folder / "stolen.jpg").write_bytes(b"x")
    (folder / "stolen.txt").symlink_to("../secret.txt")
    (folder / "chain.jpg").symlink_to("hop.jpg")
    (folder / "hop.jpg").symlink_to("../secret.jpg")
    (folder / "sub/captions.jsonl").symlink_to("../../secret.txt")
    (folder / "zero.md").symlink_to("/dev/zero")
    (folder / "inner.jpg").symlink_to("ok.jpg")
    (folder / "inner.txt").write_text("a link inside of the folder")
    (folder / "listed.jpg").symlink_to("/etc/hostname")
    (folder / "captions.jsonl").write_text('{"file": "listed.jpg", "caption": "c"}\n')
    used, rejected = read(folder)
    assert used == {"ok.jpg": "a caption", "inner.jpg": "a link inside of the folder"}
    assert rejected == {
        **dict.fromkeys(("leak.jpg", "stolen.jpg", "chain.jpg", "hop.jpg", "sub/captions.jsonl"), "outside_folder"),
        **{"captions.jsonl:1": "outside_folder", "zero.md": "unreadable"},
    }
    followed, _ = read(folder, follow_links=True)
    assert followed["stolen.jpg"] == "a key"


def test_a_folder_that_is_named_by_a_link_is_read(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert read(tmp_path / "link") == ({"ok.jpg": "a caption"}, {})


def test_a_sibling_whose_name_begins_like_the_folder_is_outside(folder):
    sibling = folder.with_name("data-private")
    sibling.mkdir()
    (sibling / "a.jpg").write_bytes(b"x")
    (folder / "a.jpg").symlink_to(sibling / "a.jpg")
    (folder / "a.txt").write_text("c")
    assert read(folder)[1] == {"a.jpg": "outside_folder"}


def test_texts_have_a_largest_size(folder):
    (folder / "long.jpg").write_bytes(b"x")
    (folder / "long.txt").write_text("x" * (MAX_TEXT_BYTES + 1))
    long_line = json.dumps({"query": "q", "positive": "p" * MAX_TEXT_BYTES})
    good_line = json.dumps({"query": "q", "positive": "p"})
    (folder / "captions.jsonl").write_text(f"{good_line}\n{long_line}\n{good_line}\n{long_line}")
    used, rejected = read(folder)
    assert used == {"ok.jpg": "a caption", "captions.jsonl:1": "q", "captions.jsonl:3": "q"}
    assert rejected == dict.fromkeys(("long.jpg", "captions.jsonl:2", "captions.jsonl:4"), "too_long_text")


def test_a_caption_of_4_gb_takes_no_memory(folder):
    (folder / "big.jpg").write_bytes(b"x")
    for name in ("big.txt", "sub/captions.jsonl"):
        with (folder / name).open("wb") as sparse:
            sparse.truncate(300 << 20 if name.endswith("jsonl") else 4 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, rejected = read(folder)
    assert rejected == {"big.jpg": "too_long_text", "sub/captions.jsonl:1": "too_long_text"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize("source", ["../../up", "a/b", "..", "a\\b", "a\nb", "\x1b[2J", "", ".git"])
def test_a_source_of_a_list_is_a_name(folder, source):
    (folder / "captions.jsonl").write_text(json.dumps({"query": "q", "positive": "p", "source": source}))
    assert read(folder)[1] == {"captions.jsonl:1": "bad_json"}


def test_long_members_of_shards_are_counted():
    long = b"x" * (MAX_TEXT_BYTES + 1)
    files = [("a.jpg", b"x"), ("a.txt", long), ("b.jpg", b"x"), ("b.txt", b"short"), ("c.jpg", b"x"), ("c.json", long)]
    rows, counts, _ = scan(tar_of(files), SampleMapper("s", SourceMapping()))
    assert [row.key for row in rows] == ["b"]
    assert counts.rejected == {"too_long_text": 2}


def tar_of(files: list[tuple[str, bytes]]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return sink.getvalue()


QUERY, CANDIDATE, GRADES = b'{"_id":"1","text":"q"}', b'{"_id":"a","text":"x"}', b"1\ta\t1\n"


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        (b'{"_id":"a","image":"link.jpg"}', "is a link to a file outside of the folder; put the file inside"),
        (b'{"_id":"a","image":"../../etc/passwd"}', "is outside the folder"),
        (b'{"_id":"a","image":"/etc/passwd"}', "is outside the folder"),
        (b'{"_id":"a","image":3}', "image=3: input should be a valid string"),
        (b'{"_id":"a","image":["a.jpg"]}', "image=['a.jpg']: input should be a valid string"),
        (b'{"_id":"a","document":"a.pdf","page":"x"}', "page='x': input should be a valid integer"),
        (b'{"_id":"a","document":"a.pdf","page":1e400}', "page=inf: "),
        (b'{"_id":"a","document":"a.pdf","page":-1}', "page=-1: "),
        (b'{"_id":"a","text":{}}', "text"),
        (b"[" * 100_000, "corpus.jsonl:1: is not JSON: recursion limit exceeded"),
        (b"\xff", "corpus.jsonl:1: is not JSON: "),
        (b"[1]", "corpus.jsonl:1: is [1]: input should be an object"),
        (b'{"_id":"a","text":"' + b"x" * MAX_TEXT_BYTES + b'"}', "corpus.jsonl:1: is longer than 1048576 bytes"),
    ],
)
def test_faults_of_a_custom_dataset_are_one_error(folder, candidate, expected):
    write_dataset(folder, candidate)
    with pytest.raises(UserError) as caught:
        list(read_custom(folder).candidates)
    assert expected in str(caught.value)
    assert str(folder) in caught.value.place


def write_dataset(root: Path, candidate: bytes) -> None:
    (root / "qrels").mkdir()
    (root / "link.jpg").symlink_to("../secret.jpg")
    (root / "queries.jsonl").write_bytes(QUERY)
    (root / "corpus.jsonl").write_bytes(candidate)
    (root / "qrels/test.tsv").write_bytes(GRADES)


@pytest.mark.parametrize(
    "line",
    [
        {"query": 3, "candidates": [], "relevance": []},
        {"query": {"text": "q"}, "candidates": {"text": "c"}, "relevance": [1]},
        {"query": {"text": "q"}, "candidates": ["c"], "relevance": [1]},
        {"query": {"text": "q"}, "candidates": [{"text": "c"}], "relevance": 1},
        {"query": {"text": "q"}, "candidates": [{"text": "c"}], "relevance": ["x"]},
        {"query": {"text": "q"}, "candidates": [{"text": "c"}], "relevance": [{}]},
        {"query": {"text": "q", "image": 1}, "candidates": [{"text": "c"}], "relevance": [1]},
    ],
)
def test_faults_of_a_file_of_lists_are_one_error(tmp_path, line):
    path = tmp_path / "lists.jsonl"
    path.write_text(json.dumps(line))
    with pytest.raises(UserError) as caught:
        read_custom(path)
    assert str(tmp_path) in caught.value.place


def test_a_json_list_that_is_none_is_one_error(tmp_path):
    for content in ("7", "{}", "[3]", "[" * 100_000):
        path = tmp_path / "lists.json"
        path.write_text(content)
        with pytest.raises(UserError):
            read_custom(path)


def test_pipes_and_devices_are_never_opened(folder):
    os.mkfifo(folder / "pipe.jpg")
    os.mkfifo(folder / "fifo.txt")
    (folder / "fifo.jpg").write_bytes(b"x")
    (folder / "pipe.txt").write_text("c")
    found: list[dict[str, str]] = []
    thread = threading.Thread(target=lambda: found.append(read(folder)[1]), daemon=True)
    thread.start()
    thread.join(20)
    assert found == [{"pipe.jpg": "unreadable", "fifo.jpg": "unreadable"}]


def test_the_mark_of_a_folder_that_rzen_wrote_is_no_file_of_the_user(folder):
    (folder / "rzen-output.json").write_text("{}")
    assert read(folder) == ({"ok.jpg": "a caption"}, {})
