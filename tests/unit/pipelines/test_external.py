"""External tars: what is read, what is not, and that every sample is counted."""

import hashlib
import io
import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import pymupdf
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.config import DataConfig, MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.feed.reader import Reader
from pipelines.samples import DecodedSample, Input, Media, Rejected, Sample
from pipelines.shards.external import ScanCounts, ScanJob, index_shard, scan
from pipelines.shards.index import IndexRow, content_sha256
from pipelines.shards.manifest import Manifest, SourceInfo, publish_manifest
from pipelines.shards.mapping import InputMapping, SampleMapper, SourceMapping
from pipelines.shards.tar_headers import Header, read_header
from pipelines.shards.tars import Entry, Finding, entries, groups
from pipelines.shards.verify import verify
from pipelines.storage.location import open_store
from pipelines.storage.shard_urls import ShardFile, expand_braces, find_shards
from tests.external import picture, write_img2dataset

CAPTIONED = SourceMapping()


def make_tar(
    files: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT, kinds: dict[str, bytes] | None = None
) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tar_format) as tar:
        for name, data in files:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            header.type = (kinds or {}).get(name, tarfile.REGTYPE)
            tar.addfile(header, io.BytesIO(data))
    return sink.getvalue()


def pairs(count: int, folder: str = "") -> list[tuple[str, bytes]]:
    return [
        (f"{folder}{n:03d}.{extension}", data)
        for n in range(count)
        for extension, data in (("jpg", picture(n)), ("txt", f"caption {n}".encode()))
    ]


WHOLE = make_tar(pairs(12))


def scanned(data: bytes, mapping: SourceMapping = CAPTIONED) -> tuple[list[IndexRow], ScanCounts]:
    rows, tally, _ = scan(data, SampleMapper("s", mapping))
    return rows, tally


def names(data: bytes) -> list[str]:
    return [item.name if isinstance(item, Entry) else item.reason for item in entries(data)]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_entries_are_those_of_tarfile_in_every_format(tar_format: int) -> None:
    long = f"{'d' * 90}/{'e' * 60}/{'f' * 80}" if tar_format != tarfile.USTAR_FORMAT else f"{'d' * 90}/{'e' * 60}"
    files = [(f"{long}/a.b.jpg", b"x" * 700), ("empty.txt", b""), ("ü.json", b"{}"), ("./c.txt", b"y" * 512)]
    data = make_tar(files, tar_format)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    found = [item for item in entries(data) if isinstance(item, Entry)]
    assert [(entry.name, data[entry.start : entry.start + entry.size]) for entry in found] == expected == files
    for entry, following in itertools.pairwise(found):
        assert entry.end == following.offset


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_headers_are_read_as_tarfile_reads_them(tar_format: int) -> None:
    headers = [tarfile.TarInfo(name) for name in ("a.jpg", f"{'d' * 90}/ü.txt", "x" * 100)]
    headers[0].size = 9 << 33 if tar_format == tarfile.GNU_FORMAT else 0o7654321
    blocks = [header.tobuf(tar_format, "utf-8")[:512] for header in headers]
    blocks += [block[:n] + bytes([block[n] ^ 0x81]) + block[n + 1 :] for block in blocks for n in range(512)]
    accepted = 0
    for block in [*blocks, bytes(512), b"\xff" * 512]:
        try:
            expected = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            with pytest.raises(tarfile.HeaderError):
                read_header(block)
        else:
            assert read_header(block) == Header(expected.name, expected.size, expected.type)
            accepted += 1
    assert accepted >= 3


def test_folders_and_global_headers_are_passed_over_and_links_are_reported() -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "git"}) as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("d/a.jpg", tarfile.REGTYPE), ("d/a.txt", tarfile.SYMTYPE)):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "elsewhere"
            tar.addfile(header)
        tar.addfile(tarfile.TarInfo("d/b.jpg"))
    assert names(sink.getvalue()) == ["d/a.jpg", "link", "d/b.jpg"]


def test_groups_are_those_of_webdataset(tmp_path: Path) -> None:
    files = [
        ("a/001.jpg", b"1"),
        ("a/001.seg.PNG", b"2"),
        ("./a.b/001.left.txt", b"3"),
        ("README", b"no extension"),
        (".hidden.txt", b"no base name"),
        ("__meta__/x.json", b"webdataset's own"),
        ("a.b/002.txt", b"4"),
        ("a.b/003.txt", b"5"),
        ("a.b/003.json", b"{}"),
    ]
    (tmp_path / "a.tar").write_bytes(make_tar(files, tarfile.GNU_FORMAT))
    data = (tmp_path / "a.tar").read_bytes()
    found = [item for item in groups(entries(data)) if not isinstance(item, Finding)]
    ours = {
        group.key: {name.lower(): data[e.start : e.start + e.size] for name, e in group.members.items()}
        for group in found
    }
    theirs = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    assert ours == {item["__key__"]: {k: v for k, v in item.items() if not k.startswith("__")} for item in theirs}
    findings = [item.reason for item in groups(entries(data)) if isinstance(item, Finding)]
    assert findings == ["not_a_member"] * 3


def test_a_damaged_header_costs_its_sample_and_no_other() -> None:
    data = bytearray(make_tar(pairs(5)))
    rows, _ = scanned(bytes(data))
    data[rows[2].offset + 3] ^= 0xFF  # the header of the picture of sample 2
    lost = 512 + len(picture(2)) + -len(picture(2)) % 512
    rows, tally = scanned(bytes(data))
    assert [row.key for row in rows] == ["000", "001", "003", "004"]
    assert tally.findings == {"bad_header": [1, lost]}
    assert (tally.seen, tally.rejected) == (5, {"missing_member": 1})
    assert tally.examples["bad_header"] == [f"at byte {rows[1].offset + rows[1].length}"]


def test_a_damaged_header_within_a_sample_is_not_read_over() -> None:
    files = [("0.jpg", picture(0)), ("0.cls", b"7"), ("0.txt", b"caption"), *pairs(2)]
    data = bytearray(make_tar(files))
    middle = next(item for item in entries(bytes(data)) if isinstance(item, Entry) and item.name == "0.cls")
    data[middle.offset] ^= 0xFF
    rows, tally = scanned(bytes(data))
    assert [row.key for row in rows] == ["000", "001"]
    assert (tally.rejected, tally.findings) == ({"damaged": 1}, {"bad_header": [1, 1024]})


@pytest.mark.parametrize(("cut", "reason"), [(100, "truncated"), (512 + 200, "truncated"), (0, "no_end_marker")])
def test_truncated_tars_are_reported(cut: int, reason: str) -> None:
    data = make_tar(pairs(4))
    rows, _ = scanned(data)
    rows, tally = scanned(data[: rows[3].offset + cut])
    assert [row.key for row in rows] == ["000", "001", "002"]
    assert tally.findings == {reason: [1, cut]}
    assert tally.rejected == {}


def test_an_unpadded_end_is_read_and_garbage_behind_the_end_is_counted() -> None:
    data = make_tar(pairs(3))
    rows, _ = scanned(data)
    caption_end = data.rindex(b"caption 2") + len(b"caption 2")
    unpadded, tally = scanned(data[:caption_end])
    assert [row.key for row in unpadded] == ["000", "001", "002"]
    assert unpadded[2].offset + unpadded[2].length == caption_end
    assert tally.findings == {"no_end_marker": [1, 0]}
    end = rows[2].offset + rows[2].length
    behind, tally = scanned(data[:end] + bytes(1024) + b"garbage" * 100)
    assert behind == rows
    assert tally.findings == {"trailing_bytes": [1, 1024 + 700]}


def test_a_shard_that_is_no_tar_is_one_damage() -> None:
    rows, tally = scanned(b"\x1f\x8b compressed" * 200)
    assert (rows, tally.findings) == ([], {"bad_header": [1, 2600]})


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, len(WHOLE) - 1), length=st.integers(1, 3000), fill=st.sampled_from([0, 255, None]))
def test_no_damage_loses_a_sample_without_a_count(position: int, length: int, fill: int | None) -> None:
    if fill is None:
        data = WHOLE[:position]
    else:
        data = WHOLE[:position] + bytes([fill]) * min(length, len(WHOLE) - position) + WHOLE[position + length :]
    rows, tally = scanned(data)
    assert tally.seen == len(rows) + sum(tally.rejected.values())
    assert len(rows) == 12 or tally.rejected or tally.findings
    if fill is not None and length <= 512:
        assert len(rows) >= 10 or "trailing_bytes" in tally.findings  # two zeroed blocks look like an end


def test_every_reason_is_counted_and_the_counts_add_up() -> None:
    good = picture(1)
    files = [
        ("ok.jpg", good),
        ("ok.txt", b"fine"),
        ("nocaption.jpg", good),
        ("nopicture.txt", b"x"),
        ("blank.jpg", good),
        ("blank.txt", b" \n"),
        ("hollow.jpg", b""),
        ("hollow.txt", b"x"),
        ("latin.jpg", good),
        ("latin.txt", "ü".encode("latin-1")),
        ("ok.jpg", good),
        ("ok.txt", b"again"),
        ("twice.jpg", good),
        ("twice.jpg", good),
        ("twice.txt", b"x"),
        ("case.jpg", good),
        ("case.JPG", good),
        ("case.txt", b"x"),
        ("json.jpg", good),
        ("json.json", b'{"caption": '),
        ("null.jpg", good),
        ("null.json", b'{"caption": null}'),
        ("number.jpg", good),
        ("number.json", b'{"caption": 7}'),
        ("other.jpg", good),
        ("other.json", b'{"title": "x"}'),
        ("meta.jpg", good),
        ("meta.json", b'{"caption": "from json"}'),
    ]
    rows, tally = scanned(make_tar(files))
    assert [row.key for row in rows] == ["ok", "meta"]
    assert tally.rejected == {
        "missing_member": 2,
        "empty_text": 2,
        "empty_file": 1,
        "not_utf8": 1,
        "duplicate_key": 1,
        "duplicate_member": 2,
        "bad_json": 1,
        "not_text": 1,
        "missing_field": 1,
    }
    assert tally.seen == 14 == len(rows) + sum(tally.rejected.values())
    assert tally.examples["missing_field"] == ["other: txt | json:caption"]


def test_a_mapping_reads_query_positive_negatives_and_instructions() -> None:
    mapping = SourceMapping.model_validate(
        {
            "task": "image_text_image",
            "query": {"text": "json:edit.text", "media": "source.png | source.jpg"},
            "positive": {"text": "title", "media": "target.mp4"},
            "negatives": [{"media": "n0.pdf"}, {"media": "n1.pdf"}, {"text": "json:negatives"}],
            "instruction": {"member": "json:prompt"},
            "target_instruction": "Represent it.",
        }
    )
    facts = {"edit": {"text": "make it red"}, "negatives": ["a", "b"], "prompt": "Find."}
    members = {
        "json": json.dumps(facts).encode(),
        "source.jpg": b"s",
        "target.mp4": b"t",
        "title": b" A title\n",
        "n1.pdf": b"n",
        "unused.npy": b"",
    }
    assert SampleMapper("edits", mapping).sample("k", members, "here") == Sample(
        key="k",
        source="edits",
        task="image_text_image",
        query=Input("make it red", (Media("image", "source.jpg"),)),
        positive=Input("A title", (Media("video", "target.mp4"),)),
        negatives=(Input("", (Media("document", "n1.pdf"),)), Input("a"), Input("b")),
        instruction="Find.",
        target_instruction="Represent it.",
        origin="here",
    )
    with pytest.raises(BadMedia, match=r"missing_field: json:prompt"):
        SampleMapper("edits", mapping).sample("k", members | {"json": b'{"edit": {"text": "x"}}'})

    def wordings(mapping: SourceMapping, prompt: object) -> tuple[str, ...]:
        data = json.dumps(facts | {"prompt": prompt}).encode()
        return SampleMapper("edits", mapping).sample("k", members | {"json": data}).instructions

    assert wordings(mapping, ["Find.", " Look.", "Find."]) == ("Find.", "Look.")
    constant = mapping.model_copy(update={"instruction": ["A", "B"]})
    assert wordings(constant, 5) == ("A", "B")
    assert constant.selection() == mapping.model_copy(update={"instruction": ""}).selection()
    for bad, reason in (([], "empty_text"), (["Find.", 5], "not_text"), ([""], "empty_text")):
        with pytest.raises(BadMedia, match=reason):
            wordings(mapping, bad)


GRADED = {"query": {"text": "txt"}, "positive": {"text": "json:other"}, "relevance": "json:score | cls"}


@pytest.mark.parametrize(
    ("member", "value", "expected"),
    [("json", 3.8, 3.8), ("json", 0, 0.0), ("json", "-1e-3", -0.001), ("cls", "4\n", 4.0), ("cls", "0.25", 0.25)],
)
def test_a_mapping_reads_a_relevance(member: str, value: Any, expected: float) -> None:
    facts = {"other": "b"} | ({"score": value} if member == "json" else {})
    members = {"txt": b"a", "json": json.dumps(facts).encode()} | ({"cls": value.encode()} if member == "cls" else {})
    assert SampleMapper("s", SourceMapping.model_validate(GRADED)).sample("k", members).relevance == expected


@pytest.mark.parametrize("value", [True, None, "high", [1], float("nan"), float("inf"), 10**400])
def test_a_relevance_that_is_no_finite_number_is_refused(value: Any) -> None:
    members = {"txt": b"a", "json": json.dumps({"other": "b", "score": value}).encode()}
    with pytest.raises(BadMedia, match=r"not_a_number: json:score \| cls is"):
        SampleMapper("s", SourceMapping.model_validate(GRADED)).sample("k", members)


def test_indices_and_manifests_of_sources_without_relevance_stay_as_they_were() -> None:
    assert "relevance" not in SourceMapping().selection()
    assert "relevance" not in SourceMapping().model_dump()
    graded = SourceMapping.model_validate(GRADED)
    assert graded.selection()["relevance"] == "json:score | cls"
    assert SourceMapping.model_validate(graded.model_dump()) == graded


@pytest.mark.parametrize(
    "wrong",
    [
        {"relevance": "a/b"},
        {"query": {}},
        {"query": {"text": ""}},
        {"query": {"text": "txt |"}},
        {"query": {"text": "json:"}},
        {"query": {"media": "npy"}},
        {"positive": {"media": "json:image"}},
        {"negatives": [{"text": "a/b"}]},
        {"instruction": {"member": ":x"}},
    ],
)
def test_wrong_mappings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SourceMapping.model_validate(wrong)


def published(tmp_path: Path, files: dict[str, bytes], mapping: SourceMapping = CAPTIONED) -> Reader:
    """Indexes tars in `tmp_path/theirs`, without Ray, and opens what came of it."""
    (tmp_path / "theirs").mkdir(exist_ok=True)
    for name, data in files.items():
        (tmp_path / "theirs" / name).write_bytes(data)
    out = open_store(str(tmp_path / "out"))
    found = find_shards([str(tmp_path / "theirs")])
    jobs = [ScanJob("s", one, "train/s", mapping) for one in found]
    shards = tuple(index_shard(job, out).shard for job in jobs)
    info = SourceInfo(mapping.task, sum(shard.num_samples for shard in shards), shards, mapping.model_dump())
    publish_manifest(out, Manifest("train", {"s": info}))
    return Reader(DataConfig(root=str(tmp_path / "out")))


def test_a_relevance_is_read_from_shards_in_place_and_pairs_without_one_are_left_out(tmp_path: Path) -> None:
    scores = {"a": b"2", "b": b'"high"', "c": b"null", "d": b"-0.5"}
    files = [
        entry
        for key, score in scores.items()
        for entry in ((f"{key}.txt", b"q"), (f"{key}.json", b'{"other": "p", "score": ' + score + b"}"))
    ]
    reader = published(tmp_path, {"0.tar": make_tar(files)}, SourceMapping.model_validate(GRADED))
    assert [(sample.key, sample.relevance) for sample, _ in reader.raw("s", range(2))] == [("a", 2.0), ("d", -0.5)]
    assert reader.sizes() == {"s": 2}


def test_indexed_shards_are_read_in_place_by_range(tmp_path: Path) -> None:
    odd = [("a.b/x.txt", b"no picture"), ("README", b"between"), *pairs(3, "deep/er/")]
    reader = published(tmp_path, {"0.tar": make_tar(pairs(4)), "1.tar": make_tar(odd, tarfile.PAX_FORMAT)})
    assert reader.sizes() == {"s": 7}
    samples = [*reader.raw("s", range(7))]
    assert [sample.key for sample, _ in samples] == ["000", "001", "002", "003"] + [f"deep/er/00{n}" for n in range(3)]
    for number, (sample, members) in enumerate(samples):
        assert members == {"jpg": picture(number % 4 if number < 4 else number - 4)}
        assert sample.target_sha256 == content_sha256(sample.positive, members)
        assert sample.query_sha256 == content_sha256(sample.query, members)
        assert sample.positive == Input("", (Media("image", "jpg"),))
    (decoded,) = reader.samples("s", [5])
    assert decoded.query.text == "caption 1"  # type: ignore[union-attr]
    assert decoded.positive.visuals[0].frames.shape == (1, 24, 32, 3)  # type: ignore[union-attr]
    assert not [*(tmp_path / "theirs").glob("*.parquet")]


def test_untrusted_documents_are_decoded_in_a_child(tmp_path: Path) -> None:
    with pymupdf.open() as document:
        document.new_page(width=200, height=100)
        page = document.tobytes()
    files = [("a.pdf", page), ("a.txt", b"a page"), ("b.pdf", b"%PDF-1.4 no more"), ("b.txt", b"damaged")]
    mapping = SourceMapping(positive=InputMapping(media="pdf"), task="text_page")
    reader = published(tmp_path, {"0.tar": make_tar(files)}, mapping)
    good, bad = reader.samples("s", [0, 1])
    assert isinstance(good, DecodedSample)
    assert good.positive.visuals[0].kind == "document"
    assert isinstance(bad, Rejected)
    assert bad.origin == f"{tmp_path}/theirs/0.tar key b"
    assert reader._decoder._sandbox._child is not None


def test_skipped_samples_between_neighbors_are_read_over(tmp_path: Path) -> None:
    files = pairs(5)
    del files[5]  # the caption of sample 2
    reader = published(tmp_path, {"0.tar": make_tar(files)})
    assert [sample.key for sample, _ in reader.raw("s", range(4))] == ["000", "001", "003", "004"]


def test_a_shard_that_changed_is_reported_by_verify_and_by_the_feed(tmp_path: Path) -> None:
    reader = published(tmp_path, {"0.tar": make_tar(pairs(4)), "1.tar": make_tar(pairs(2))})
    out = open_store(str(tmp_path / "out"))
    assert verify(out, "train") == []
    (tmp_path / "theirs/0.tar").write_bytes(make_tar([("first.txt", b"moved"), *pairs(4)]))
    (tmp_path / "theirs/1.tar").unlink()
    out.write("train/s/stray.idx.parquet", b"")
    assert verify(out, "train") == [
        "train/s/stray.idx.parquet: not in the manifest",
        f"{tmp_path}/theirs/0.tar: has changed since it was indexed",
        f"{tmp_path}/theirs/1.tar: missing",
    ]
    with pytest.raises(UserError, match=r"0\.tar: has changed since it was indexed.*run the index job again"):
        list(reader.samples("s", range(2)))
    with pytest.raises(UserError, match=r"1\.tar: is named in the manifest but missing; run the index job again"):
        list(reader.samples("s", [4]))


def test_an_index_is_made_once_for_a_shard_and_a_selection(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(make_tar(pairs(3)))
    out = open_store(str(tmp_path / "out"))

    def run(mapping: SourceMapping = CAPTIONED, **changes: Any) -> Any:
        (found,) = find_shards([str(tmp_path / "a.tar")])
        return index_shard(ScanJob("s", found, "x", mapping, **changes), out)

    first = run()
    again = run()
    assert (first.reused, again.reused) == (False, True)
    assert (again.shard, again.tally, again.neighbors) == (first.shard, first.tally, first.neighbors)
    assert run(SourceMapping(instruction="Find.", task="other")).reused
    assert not run(SourceMapping(query=InputMapping(text="txt"))).reused
    assert run().reused
    assert not run(media=MediaConfig()).reused
    (tmp_path / "a.tar").write_bytes(make_tar(pairs(4)))
    assert run().shard.num_samples == 4
    assert run().reused
    out.write(run().shard.index_path, b"torn")
    assert not run().reused
    assert run().reused
    assert first.shard.sha256 == hashlib.sha256(make_tar(pairs(3))).hexdigest()


def test_decoding_leaves_out_what_cannot_be_decoded(tmp_path: Path) -> None:
    files = [*pairs(2), ("bad.jpg", b"no picture"), ("bad.txt", b"x")]
    (tmp_path / "a.tar").write_bytes(make_tar(files))
    (found,) = find_shards([str(tmp_path / "a.tar")])
    out = open_store(str(tmp_path / "out"))
    tallies = [index_shard(ScanJob("s", found, "x", CAPTIONED, media), out).tally for media in (None, MediaConfig())]
    assert [(tally.accepted, tally.rejected) for tally in tallies] == [(3, {}), (2, {"unsupported_format": 1})]


def test_shards_are_found_by_path_folder_glob_and_braces(tmp_path: Path) -> None:
    for name in ("a/000.tar", "a/001.tar", "a/deep/002.tar", "b/000.tar", "a/notes.txt", "a/old.tar.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")

    def found(*urls: str) -> list[str]:
        return [one.url.removeprefix(f"{tmp_path}/") for one in find_shards([f"{prefix}{url}" for url in urls])]

    prefix = f"{tmp_path}/"
    assert found("a") == found("a/") == ["a/000.tar", "a/001.tar", "a/deep/002.tar"]
    assert found("*/00?.tar") == ["a/000.tar", "a/001.tar", "b/000.tar"]
    assert found("a/{000..001}.tar", "{b,a}/000.tar") == ["a/000.tar", "a/001.tar", "b/000.tar"]
    prefix = f"file://{tmp_path}/"
    assert found("b/000.tar") == ["b/000.tar"]
    prefix = f"{tmp_path}/"
    for wrong in ("a/002.tar", "c", "a/*.tat", "a/{000..009}.tar"):
        with pytest.raises(UserError, match=r"no such shard|holds no \.tar"):
            found(wrong)
    with pytest.raises(UserError, match="is compressed"):
        found("a/old.tar.gz")
    with pytest.raises(UserError, match="not a range of numbers"):
        found("a/{9..x}.tar")


def test_braces_are_spelt_out_as_by_a_shell() -> None:
    assert list(expand_braces("s3://b/{08..11}.tar")) == [
        "s3://b/08.tar",
        "s3://b/09.tar",
        "s3://b/10.tar",
        "s3://b/11.tar",
    ]
    assert list(expand_braces("{a,b}{0..1}")) == ["a0", "a1", "b0", "b1"]
    assert list(expand_braces("{x}")) == ["{x}"]


def test_shard_writer_and_img2dataset_layout_need_no_settings(tmp_path: Path) -> None:
    (shard,) = write_img2dataset(tmp_path, 6, 10)
    rows, tally = scanned(shard.read_bytes())
    assert [row.key for row in rows] == [f"{n:09d}" for n in range(6)]
    assert (tally.rejected, tally.findings) == ({}, {})
    assert rows[3].target_sha256 == content_sha256(Input("", (Media("image", "jpg"),)), {"jpg": picture(3)})
    assert len({row.query_sha256 for row in rows}) == len(rows)


def test_the_found_tag_is_that_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x")
    tag = open_store(str(tmp_path)).tags()["a.tar"]
    assert find_shards([str(tmp_path / "a.tar")]) == [ShardFile(f"{tmp_path}/a.tar", tag)]
