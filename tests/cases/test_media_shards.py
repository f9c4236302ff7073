"""Tars and folders of many writers. Values of GNU tar 1.34, bsdtar 3.6.2 and `wc -l`."""

import codecs
import io
import json
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.config import MediaConfig
from pipelines.samples import RawSample, Rejected
from pipelines.shards.external import ScanCounts, scan
from pipelines.shards.index import IndexRow, ShardIndex, index_bytes
from pipelines.shards.mapping import InputMapping, SampleMapper, SourceMapping
from pipelines.shards.read import external_sample_parser, parse_native_sample
from pipelines.shards.tars import Finding, entries, groups
from pipelines.sources.folder import read_folder
from pipelines.texts import decode_text, lines_of
from tests.cases.measure_media import FILES

CAPTIONED = SourceMapping()
ENCODINGS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


def archive(*members: tuple[str, bytes | tuple[bytes, str]], form: int = tarfile.GNU_FORMAT) -> bytes:
    """Members are (name, content), or (name, (type, target)) for links, folders and devices."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                header.type, header.linkname = content
                tar.addfile(header)
            else:
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    return sink.getvalue()


def samples(data: bytes, mapping: SourceMapping = CAPTIONED) -> tuple[dict[str, tuple[str, list[bytes]]], ScanCounts]:
    """Return key -> text and files of every usable sample, read by its range as training reads it."""
    rows, counts, _ = scan(data, SampleMapper("s", mapping))
    parse = external_sample_parser("s", mapping)
    found = {}
    for row in rows:
        sample, members = parse(row.key, data[row.offset : row.offset + row.length])
        found[row.key] = sample.query.text, [*members.values()]
    return found, counts


def captions(name: str) -> tuple[dict[str, str], ScanCounts]:
    found, counts = samples((FILES / name).read_bytes())
    return {key: text for key, (text, _) in found.items()}, counts


def numbered(text: str, numbers: range | list[int], key: str = "{:04}") -> dict[str, str]:
    return {key.format(number): text.format(number) for number in numbers}


TARS = [
    ("bom_json.tar", numbered("a red square {}", range(3)), {}, {}),
    ("bom_txt.tar", numbered("a red square {}", range(3)), {}, {}),
    ("mac_appledouble_in_folder.tar", numbered("picture {}", range(3), "data/{:04}"), {}, {"not_a_member": 6}),
    ("mac_appledouble_flat.tar", numbered("picture {}", range(3)), {}, {"not_a_member": 6}),
    ("hard_links.tar", {"a/0000": "first", "a/0001": "second"}, {}, {}),
    ("data[1].tar", {"0000": "from data[1]"}, {}, {}),
    ("data1.tar", {"0000": "from data1"}, {}, {}),
    ("empty.tar", {}, {}, {}),
    ("dot_slash.tar", numbered("picture {}", range(3), "./{:04}"), {}, {}),
    ("duplicate_keys.tar", numbered("picture {}", range(2)), {"duplicate_key": 1}, {}),
    ("empty_then_json.tar", {}, {"empty_text": 2}, {}),
    ("gnu_long_names.tar", numbered("picture {}", range(3), "d" * 150 + "/{:04}"), {}, {}),
    ("gzip_named.tar", {}, {}, {"bad_header": 1}),
    ("keys_with_dots.tar", {}, {"missing_member": 1}, {}),
    ("latin1_text.tar", {"0000": "café 0"}, {"not_utf8": 1}, {}),
    ("line_separator.tar", numbered("one\u2028two {}", range(2)), {}, {}),
    ("pax_unicode.tar", numbered("picture {}", range(3), "日本/é{:04}"), {}, {}),
    ("sorted_by_extension.tar", {}, {"missing_member": 3, "duplicate_key": 3}, {}),
    ("two_part_extension.tar", numbered("picture {}", range(3)), {}, {}),
    ("upper_case.tar", numbered("picture {}", range(3)), {}, {}),
]


@pytest.mark.parametrize(("name", "expected", "rejected", "findings"), TARS)
def test_every_tar_gives_the_samples_that_tar_extracts(name, expected, rejected, findings) -> None:
    found, counts = captions(name)
    assert found == expected
    assert counts.rejected == rejected
    assert {reason: places for reason, (places, _) in counts.findings.items()} == findings


FOLDERS = [
    ("folder_line_separators", ["A cat\u2028on a mat", "Price: 5\x85euro", "one line\x0band a vertical tab"]),
    ("folder_upper_case_txt", ["a red square", "a blue square"]),
    ("folder_nfd_names", ["a café", "z"]),
    ("folder_bom", ["b", "a red square"]),
    ("folder_utf16", ["a red square", "z"]),
]


@pytest.mark.parametrize(("name", "expected"), FOLDERS)
def test_every_folder_gives_its_captions(name: str, expected: list[str]) -> None:
    found = list(read_folder(str(FILES / name), MediaConfig()))
    assert [item.sample.query.text for item in found if isinstance(item, RawSample)] == expected
    assert not [item for item in found if isinstance(item, Rejected)]


def test_the_zoo_has_every_tar_and_folder() -> None:
    archives = {path.name for path in FILES.iterdir() if path.suffix == ".tar" or path.is_dir()}
    assert archives == {name for name, *_ in TARS} | {name for name, _ in FOLDERS}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_texts_of_every_encoding_are_read_in_folders_and_tars(tmp_path: Path, encoding: str) -> None:
    def written(text: str) -> bytes:
        return ENCODINGS[encoding] + text.encode(encoding)

    listed = json.dumps({"query": "q", "positive": "ein Ä"}, ensure_ascii=False)
    files = {"a.txt": "two\u2028parts\r\nein Ü\rÉ\n", "captions.jsonl": f"{listed}\n{listed}\n"}
    (tmp_path / "a.jpg").write_bytes(b"picture")
    for name, text in files.items():
        (tmp_path / name).write_bytes(written(text))
    found = list(read_folder(str(tmp_path), MediaConfig()))
    texts = [item.sample.positive.text or item.sample.query.text for item in found if isinstance(item, RawSample)]
    assert texts == ["ein Ä", "ein Ä", "two\u2028parts", "ein Ü", "É"]
    tar = archive(
        ("0.jpg", b"a"), ("0.txt", written("ein Ü")), ("1.jpg", b"b"), ("1.json", written('{"caption": "É"}'))
    )
    assert samples(tar)[0] == {"0": ("ein Ü", [b"a"]), "1": ("É", [b"b"])}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_refused(tmp_path: Path, encoding: str) -> None:
    """Its bytes are valid UTF-8, in which every second character is U+0000."""
    (tmp_path / "a.jpg").write_bytes(b"picture")
    (tmp_path / "a.txt").write_bytes("a caption".encode(encoding))
    [item] = read_folder(str(tmp_path), MediaConfig())
    assert isinstance(item, Rejected)
    assert item.reason == "unreadable"
    assert samples(archive(("0.jpg", b"a"), ("0.txt", "a caption".encode(encoding))))[1].rejected == {"not_utf8": 1}


def test_what_ends_a_line() -> None:
    kept = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
    assert lines_of(f"a{kept}b\nc\r\nd\re") == [f"a{kept}b", "c", "d", "e"]
    assert decode_text(codecs.BOM_UTF8 + b"\xef\xbb\xbf") == "\ufeff"  # one mark only


def test_hard_links_have_the_bytes_of_the_file_that_they_name() -> None:
    link, soft = (tarfile.LNKTYPE, "./a/0.jpg"), (tarfile.SYMTYPE, "0.jpg")
    data = archive(
        *[("a/0.jpg", b"one"), ("a/0.txt", b"zero"), ("a/1.txt", b"1"), ("a/1.jpg", link)],
        *[("a/2.jpg", b"two"), ("a/2.txt", b"2"), ("a/3.jpg", (tarfile.LNKTYPE, "a/1.jpg")), ("a/3.txt", b"3")],
        *[("a/4.txt", b"4"), ("a/4.jpg", soft), ("a/5.txt", b"5"), ("a/5.jpg", (tarfile.LNKTYPE, "b/none.jpg"))],
        *[("a/6.jpg", b"six"), ("a/6.other", soft), ("a/6.txt", b"6"), ("dir", (tarfile.DIRTYPE, ""))],
        ("pipe", (tarfile.FIFOTYPE, "")),
    )
    found, counts = samples(data)
    assert found == {
        "a/0": ("zero", [b"one"]),
        "a/1": ("1", [b"one"]),
        "a/2": ("2", [b"two"]),
        "a/3": ("3", [b"one"]),
        "a/6": ("6", [b"six"]),
    }
    assert counts.rejected == {"missing_member": 2}
    assert {reason: places for reason, (places, _) in counts.findings.items()} == {"link": 3, "not_a_member": 1}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_to_long_names_are_resolved(form: int) -> None:
    name = "d" * 120 + "/0.jpg"
    data = archive((name, b"one"), ("1.jpg", (tarfile.LNKTYPE, name)), ("1.txt", b"linked"), form=form)
    assert samples(data)[0] == {"1": ("linked", [b"one"])}


def test_a_run_with_links_backwards_is_read_in_one_range() -> None:
    link = (tarfile.LNKTYPE, "0.jpg")
    data = archive(
        ("0.jpg", b"one"), ("0.txt", b"0"), ("1.jpg", b"two"), ("1.txt", b"1"), ("2.jpg", link), ("2.txt", b"2")
    )
    rows: list[IndexRow] = scan(data, SampleMapper("s", CAPTIONED))[0]
    assert [row.offset == 0 for row in rows] == [True, False, True]
    offsets, lengths = (np.array([getattr(row, name) for row in rows]) for name in ("offset", "length"))
    index = ShardIndex(pa.array([row.key for row in rows]), offsets, lengths)
    assert index.span(1, 2) == (0, rows[2].length)
    assert index_bytes(rows)


def test_a_link_that_needs_too_many_bytes_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.shards.tars._MAX_LINK_BYTES", 3000)
    data = archive(("0.jpg", b"one"), ("0.txt", b"0" * 3000), ("1.jpg", (tarfile.LNKTYPE, "0.jpg")), ("1.txt", b"1"))
    found, counts = samples(data)
    assert list(found) == ["0"]
    assert counts.rejected == {"link_too_far": 1}


def test_two_samples_are_not_one_unless_they_are_linked() -> None:
    data = archive(("0.jpg", b"one"), ("0.txt", b"0"), ("1.jpg", b"two"), ("1.txt", b"1"))
    with pytest.raises(ValueError, match="not one sample"):
        external_sample_parser("s", CAPTIONED)("1", data)
    with pytest.raises(ValueError, match="not one sample"):
        parse_native_sample("1", data)


def test_metadata_of_archives_is_no_sample() -> None:
    data = archive(
        *[("__MACOSX/._0.jpg", b"x"), ("__MACOSX/data/0.jpg", b"x"), ("data/.DS_Store", b"x"), ("data/._0.jpg", b"x")],
        *[("data/0.jpg", b"one"), ("data/._0.txt", b"x"), ("data/0.txt", b"zero")],
        *[("PaxHeader/0.txt", b"x"), ("data/PaxHeaders.712/0.jpg", b"x"), ("x/__MACOSX/0.jpg", b"x")],
    )
    found, counts = samples(data)
    assert found == {"data/0": ("zero", [b"one"])}
    assert counts.seen == 1
    assert counts.findings["not_a_member"][0] == 8


@pytest.mark.parametrize("first", ["NFC", "NFD"])
def test_names_of_the_same_letters_are_one_key(first: str, tmp_path: Path) -> None:
    forms = [first, "NFD" if first == "NFC" else "NFC"]
    picture, caption = (unicodedata.normalize(form, "Ålesund é") for form in forms)
    assert picture != caption
    found, _ = samples(archive((f"{picture}.jpg", b"one"), (f"{caption}.txt", b"zero")))
    assert list(found.values()) == [("zero", [b"one"])]
    (tmp_path / f"{picture}.jpg").write_bytes(b"one")
    (tmp_path / f"{caption}.TXT").write_text("zero")
    [item] = read_folder(str(tmp_path), MediaConfig())
    assert isinstance(item, RawSample)
    assert item.sample.query.text == "zero"


def test_one_table_of_extensions_serves_folders_and_tars() -> None:
    mapping = SourceMapping(positive=InputMapping(media="avif | bmp | tiff | avi | m4v | pdf"))
    data = archive(
        ("0.AVIF", b"x"), ("0.txt", b"0"), ("1.tiff", b"x"), ("1.txt", b"1"), ("2.M4V", b"x"), ("2.txt", b"2")
    )
    parse = external_sample_parser("s", mapping)
    rows, _, _ = scan(data, SampleMapper("s", mapping))
    found = [parse(row.key, data[row.offset : row.offset + row.length])[0] for row in rows]
    assert [sample.positive.media[0].kind for sample in found] == ["image", "image", "video"]


def test_findings_do_not_break_the_sample_around_them() -> None:
    data = archive(("0.jpg", b"one"), ("0.other", (tarfile.SYMTYPE, "x")), ("0.txt", b"0"))
    [group] = [item for item in groups(entries(data)) if not isinstance(item, Finding)]
    assert group.problem == ""
