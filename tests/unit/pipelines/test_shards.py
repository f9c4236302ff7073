"""Shards: bytes, index, manifest, and the readers of other projects."""

import hashlib
import itertools
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray.data
import webdataset

from pipelines.errors import BadMedia, UserError
from pipelines.samples import Input, Media, Members, Sample, instruction_fields
from pipelines.shards import write
from pipelines.shards.index import content_sha256, read_shard_index
from pipelines.shards.manifest import (
    Manifest,
    ShardInfo,
    SourceInfo,
    index_path,
    publish_manifest,
    read_manifest,
    source_info,
)
from pipelines.shards.read import read_samples
from pipelines.shards.verify import verify
from pipelines.shards.write import write_shard
from pipelines.storage.location import open_store
from pipelines.storage.store import Store


def make_samples(count: int) -> list[tuple[Sample, Members]]:
    samples = []
    for n in range(count):
        members = {"p0.png": bytes([n]) * (n * 300), "n0.png": b"negative", "q0.mp4": b"q" * 512}
        inputs = {"query": Input("ü?", (Media("video", "q0.mp4"),)), "positive": Input("", (Media("image", "p0.png"),))}
        sample = Sample(f"{n:08d}", "cars", "t2i", negatives=(Input("", (Media("image", "n0.png"),)),), **inputs)
        target, query = (content_sha256(part, members) for part in (sample.positive, sample.query))
        samples.append((replace(sample, target_sha256=target, query_sha256=query), members))
    return samples


def test_a_sample_without_relevance_has_the_bytes_it_always_had() -> None:
    sample = Sample("k", "s", "t", Input("q"), Input("p"), target_sha256="ab", origin="o")
    assert sample.to_json() == (
        b'{"instruction":"","key":"k","negatives":[],"origin":"o","positive":{"media":[],"text":"p"},'
        b'"query":{"media":[],"text":"q"},"source":"s","target_instruction":"","target_sha256":"ab","task":"t"}'
    )
    assert Sample.from_json(sample.to_json()) == sample
    graded = replace(sample, relevance=0.1 + 0.2)
    assert json.loads(graded.to_json()) == json.loads(sample.to_json()) | {"relevance": 0.1 + 0.2}
    assert Sample.from_json(graded.to_json()) == graded


def test_wordings_of_an_instruction_are_stored_where_there_are_several() -> None:
    worded = Sample("k", "s", "t", Input("q"), Input("p"), **instruction_fields(["", "Find:", "Get:", "Find:"]))
    assert worded.instructions == ("Find:", "Get:")
    assert json.loads(worded.to_json())["instruction_variants"] == ["Get:"]
    assert Sample.from_json(worded.to_json()) == worded
    assert instruction_fields([]) == {"instruction": "", "instruction_variants": ()}


def make_split(root: Path, counts: tuple[int, ...] = (5, 3)) -> tuple[Store, Manifest]:
    """Writes `train` with one source and a shard for each count."""
    samples = make_samples(sum(counts))
    shards: list[ShardInfo] = []
    for ordinal, count in enumerate(counts):
        path = f"train/cars/cars-{ordinal:06d}.tar"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        start = sum(counts[:ordinal])
        shards.append(replace(write_shard(root / path, samples[start : start + count]), path=path))
    manifest = Manifest("train", {"cars": SourceInfo("t2i", sum(counts), tuple(shards))}, {"seed": 7})
    store = open_store(str(root))
    publish_manifest(store, manifest)
    return store, manifest


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    first = write_shard(tmp_path / "a.tar", make_samples(5))
    shuffled = [(sample, dict(reversed(members.items()))) for sample, members in make_samples(5)]
    second = write_shard(tmp_path / "b.tar", shuffled)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert (tmp_path / "a.idx.parquet").read_bytes() == (tmp_path / "b.idx.parquet").read_bytes()
    assert replace(first, path="") == replace(second, path="")


def test_shard_info_reports_the_bytes(tmp_path: Path) -> None:
    info = write_shard(tmp_path / "a.tar", make_samples(5))
    data = (tmp_path / "a.tar").read_bytes()
    assert info == ShardInfo(
        "a.tar",
        5,
        len(data),
        hashlib.sha256(data).hexdigest(),
        hashlib.sha256((tmp_path / "a.idx.parquet").read_bytes()).hexdigest(),
    )


def test_tar_is_plain_and_ordered(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", make_samples(2))
    with tarfile.open(tmp_path / "a.tar") as tar:
        entries = tar.getmembers()
    assert [entry.name for entry in entries] == [
        f"{key}.{name}" for key in ("00000000", "00000001") for name in ("json", "n0.png", "p0.png", "q0.mp4")
    ]
    assert {(e.mtime, e.mode, e.uid, e.gid, e.uname, e.gname) for e in entries} == {(0, 0o644, 0, 0, "", "")}


def test_index_cuts_between_samples(tmp_path: Path) -> None:
    samples = make_samples(5)
    write_shard(tmp_path / "a.tar", samples)
    rows = pq.read_table(tmp_path / "a.idx.parquet").to_pylist()
    assert [row["key"] for row in rows] == ["00000000", "00000001", "00000002", "00000003", "00000004"]
    assert {row["num_members"] for row in rows} == {3}
    assert rows[0]["offset"] == 0
    for row, following in itertools.pairwise(rows):
        assert row["offset"] + row["length"] == following["offset"]
    assert rows[-1]["offset"] + rows[-1]["length"] + 1024 == (tmp_path / "a.tar").stat().st_size
    assert [row["target_sha256"] for row in rows] == [sample.target_sha256 for sample, _ in samples]


def test_one_range_gives_one_sample_or_several(tmp_path: Path) -> None:
    samples = make_samples(5)
    index = read_shard_index(open_store(str(tmp_path)), write_shard(tmp_path / "a.tar", samples))
    store = open_store(str(tmp_path))
    assert read_samples(store, "a.tar", index, range(3, 4)) == [samples[3]]
    assert read_samples(store, "a.tar", index, range(1, 4)) == samples[1:4]


@pytest.mark.parametrize("where", ["header", "json", "key", "cut", "middle", "zeros"])
def test_damage_is_reported_and_costs_no_neighbor(where: str, tmp_path: Path) -> None:
    samples, store = make_samples(4), open_store(str(tmp_path))
    index = read_shard_index(store, write_shard(tmp_path / "a.tar", samples))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    offset, length = index.span(2, 2)
    if where == "header":
        data[offset + 20] ^= 0xFF
    elif where == "json":
        data[offset + 512] ^= 0xFF
    elif where == "zeros":
        data[offset : offset + length] = bytes(length)
    elif where == "key":  # the bytes of another sample
        data[offset : offset + length] = data[: index.lengths[0]].ljust(length, b"\0")
    elif where == "cut":
        index = replace(index, lengths=index.lengths - np.array([0, 0, 600, 0]))
    else:
        later = np.array([0, 0, 1024, 0])
        index = replace(index, offsets=index.offsets + later, lengths=index.lengths - later)
    (tmp_path / "a.tar").write_bytes(data)
    first, second, third = read_samples(store, "a.tar", index, range(1, 4))
    assert isinstance(second, BadMedia)
    assert (second.reason, second.detail.startswith("a.tar at byte ")) == ("damaged_shard", True)
    assert [first, third] == [samples[1], samples[3]]


def test_content_sha256_is_that_of_text_and_bytes() -> None:
    target = Input("a", (Media("image", "p0.png"), Media("image", "p1.png")))
    base = content_sha256(target, {"p0.png": b"xy", "p1.png": b"z"})
    assert base == content_sha256(target, {"p0.png": b"xy", "p1.png": b"z", "q0.png": b"other"})
    assert base != content_sha256(target, {"p0.png": b"x", "p1.png": b"yz"})
    assert base != content_sha256(replace(target, text="b"), {"p0.png": b"xy", "p1.png": b"z"})


@pytest.mark.parametrize("key", ["", "a.b", "a/b"])
def test_keys_that_webdataset_would_split_are_refused(key: str, tmp_path: Path) -> None:
    sample, members = make_samples(1)[0]
    with pytest.raises(ValueError, match="key"):
        write_shard(tmp_path / "a.tar", [(replace(sample, key=key), members)])


def test_webdataset_reads_it(tmp_path: Path) -> None:
    samples = make_samples(5)
    write_shard(tmp_path / "a.tar", samples)
    read = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [item["__key__"] for item in read] == [sample.key for sample, _ in samples]
    for item, (sample, members) in zip(read, samples, strict=True):
        assert Sample.from_json(item["json"]) == sample
        assert {name: item[name] for name in members} == members


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_ray_data_reads_it(tmp_path: Path) -> None:
    samples = make_samples(5)
    write_shard(tmp_path / "a.tar", samples)
    rows = ray.data.read_webdataset(str(tmp_path / "a.tar"), decoder=None).take_all()
    assert [row["__key__"] for row in rows] == [sample.key for sample, _ in samples]
    assert Sample.from_json(rows[4]["json"]) == samples[4][0]
    assert rows[4]["p0.png"] == samples[4][1]["p0.png"]


def test_manifest_survives_json_and_its_fingerprint_is_the_content(tmp_path: Path) -> None:
    store, manifest = make_split(tmp_path)
    assert read_manifest(store, "train") == manifest
    assert manifest.num_samples == 8
    assert json.loads(manifest.to_json())["fingerprint"] == manifest.fingerprint
    assert replace(manifest, settings={"seed": 8}).fingerprint != manifest.fingerprint


def test_bad_manifests_are_reported(tmp_path: Path) -> None:
    store, manifest = make_split(tmp_path)
    with pytest.raises(UserError, match="there is no such manifest; run a job of kind ingest or index"):
        read_manifest(store, "held_out")
    store.write("train/manifest.json", manifest.to_json().replace(b'"seed": 7', b'"seed": 8'))
    with pytest.raises(UserError, match="fingerprint"):
        read_manifest(store, "train")
    store.write("train/manifest.json", manifest.to_json().replace(b'"format_version": 3', b'"format_version": 4'))
    with pytest.raises(UserError, match="format version 4, this program reads 2 and 3"):
        read_manifest(store, "train")
    for damaged in (b"{", b"[]", b"{}", b'{"format_version": 1}'):
        store.write("train/manifest.json", damaged)
        with pytest.raises(UserError, match="cannot be read"):
            read_manifest(store, "train")


def test_index_of_a_source_leads_to_its_samples(tmp_path: Path) -> None:
    store, manifest = make_split(tmp_path, (5, 3))
    shard = source_info(store, manifest, "cars").shards[1]
    index = read_shard_index(store, shard)
    assert (len(index), index.keys.to_pylist()) == (3, ["00000005", "00000006", "00000007"])
    assert index.num_bytes == 3 * (8 + 8 + 8 + 4 + 4)  # offset, length, key and its end, checksum
    assert read_samples(store, shard.path, index, range(1, 2)) == [make_samples(8)[6]]
    with pytest.raises(UserError, match="has no source 'boats'; its sources: cars"):
        source_info(store, manifest, "boats")


def test_a_wrong_or_missing_index_is_reported(tmp_path: Path) -> None:
    store, manifest = make_split(tmp_path)
    shard, other = manifest.sources["cars"].shards
    store.write(shard.index_path, store.read(other.index_path))
    with pytest.raises(
        UserError, match="not the index that the manifest names; delete it and run the ingest job again"
    ):
        read_shard_index(store, shard)
    store.delete(shard.index_path)
    with pytest.raises(UserError, match="missing"):
        read_shard_index(store, shard)


def test_verify_finds_what_was_planted(tmp_path: Path) -> None:
    store, manifest = make_split(tmp_path, (2, 2, 2, 2))
    assert verify(store, "train") == []
    paths = [shard.path for shard in manifest.sources["cars"].shards]
    changed = bytearray(store.read(paths[0]))
    changed[700] ^= 1
    store.write(paths[0], bytes(changed))
    store.write(paths[1], store.read(paths[1])[:-1])
    store.delete(paths[2])
    store.write(index_path(paths[3]), b"not parquet")
    store.write("train/cars/stray.tar", b"")
    num_bytes = manifest.sources["cars"].shards[1].num_bytes
    assert verify(store, "train") == [
        "train/cars/cars-000002.tar: missing",
        "train/cars/stray.tar: not in the manifest",
        "train/cars/cars-000000.tar: its bytes have changed",
        f"train/cars/cars-000001.tar: {num_bytes - 1} bytes, the manifest says {num_bytes}",
        "train/cars/cars-000003.idx.parquet: is not the index that the manifest names",
    ]


def test_verify_finds_wrong_counts(tmp_path: Path) -> None:
    store, manifest = make_split(tmp_path, (2, 3))
    source = manifest.sources["cars"]
    wrong = replace(source, num_samples=6, shards=(replace(source.shards[0], num_samples=1), source.shards[1]))
    publish_manifest(store, replace(manifest, sources={"cars": wrong}))
    assert verify(store, "train") == [
        "train/cars: 6 samples, its shards hold another number",
        "train/cars/cars-000000.idx.parquet: 2 indexed samples, the manifest says 1",
    ]


def test_the_manifest_of_ingest_says_nothing_about_external_shards(tmp_path: Path) -> None:
    _, manifest = make_split(tmp_path)
    text = manifest.to_json().decode()
    assert '"mapping"' not in text
    assert '"tag"' not in text


def test_an_empty_shard_is_a_readable_tar(tmp_path: Path) -> None:
    info = write_shard(tmp_path / "a.tar", [])
    assert info.num_samples == 0
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getmembers() == []


@pytest.mark.parametrize("size", [0, 1, 511, 8**7, 8**11 - 1])
@pytest.mark.parametrize("name", ["00000000.json", "ü" * 50, "a" * 100, "a" * 55 + "/" + "b" * 60])
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    expected = tarfile.TarInfo(name)
    expected.size, expected.mode = size, 0o644
    assert write._header(name, size) == expected.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")


def test_a_size_that_a_header_cannot_hold_is_an_error() -> None:
    with pytest.raises(ValueError, match="overflow"):
        write._header("a.json", 8**11)
