"""A shard replaced or damaged under its manifest: a clear error or a counted skip, and never another sample."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import uuid
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.samples import DecodedSample, Rejected
from pipelines.shards.external import ScanJob, index_shard
from pipelines.shards.manifest import Manifest, SourceInfo, publish_manifest
from pipelines.shards.mapping import SourceMapping
from pipelines.storage.location import open_store
from pipelines.storage.shard_urls import find_shards
from pipelines.storage.store import Store
from tests.data import publish

SHARD = "train/cars/cars-000000.tar"


def native(tmp_path: Path, name: str = "data") -> tuple[Path, Reader]:
    root = tmp_path / name
    publish(open_store(str(root)), {"cars": ("text_image", 8)})
    return root / SHARD, Reader(DataConfig(root=str(root)))


def read(reader: Reader, source: str = "cars", count: int = 8) -> list[DecodedSample | Rejected]:
    return [*reader.samples(source, range(count))]


def reasons(found: list[DecodedSample | Rejected]) -> list[str]:
    return [item.reason if isinstance(item, Rejected) else item.sample.key for item in found]


def test_one_byte_of_a_text_costs_its_sample_and_no_other(tmp_path: Path) -> None:
    """It decodes: only the checksum shows that it is another text."""
    shard, reader = native(tmp_path)
    expected = reasons(read(reader))
    data = shard.read_bytes()
    assert data.count(b"cars 5") == 2  # the query, and in a mined negative
    shard.write_bytes(data.replace(b'"cars 5"', b'"cars 6"', 1))
    found = read(reader)
    assert reasons(found) == [*expected[:5], "damaged_shard", *expected[6:]]
    assert isinstance(found[5], Rejected)
    assert "other bytes than were indexed" in found[5].detail


def test_a_shard_of_the_same_samples_in_another_place_gives_no_sample(tmp_path: Path) -> None:
    """Its samples are sound and have the keys of the index, so that only the checksums tell them apart."""
    shard, reader = native(tmp_path)
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b'"cars ', b'"bars '))
    assert reasons(read(reader)) == ["damaged_shard"] * 8


@pytest.mark.parametrize("longer", [True, False])
def test_a_shard_of_another_length_is_an_error(tmp_path: Path, longer: bool) -> None:
    shard, reader = native(tmp_path)
    data = shard.read_bytes().replace(b'"cars 1"', b'"cars 2"')
    shard.write_bytes(data + bytes(512) if longer else data[:-512])
    with pytest.raises(
        UserError, match=r"cars-000000.tar: has .* bytes, the manifest says .*: it was replaced; restore"
    ):
        read(reader)


def test_datasets_without_checksums_are_read(tmp_path: Path) -> None:
    shard, _ = native(tmp_path)
    index = shard.with_name("cars-000000.idx.parquet")
    table = pq.read_table(index)
    assert table["crc32"].null_count == 0
    pq.write_table(table.drop_columns(["crc32"]), index)
    manifest = shard.parents[1] / "manifest.json"
    old = Manifest.from_json(manifest.read_bytes())
    digest = hashlib.sha256(index.read_bytes()).hexdigest()
    (info,) = old.sources.values()
    shards = tuple(replace(one, index_sha256=digest) for one in info.shards)
    publish_manifest(open_store(str(shard.parents[2])), Manifest("train", {"cars": replace(info, shards=shards)}))
    assert "damaged_shard" not in reasons(read(Reader(DataConfig(root=str(shard.parents[2])))))


def tar_of(word: str) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(3):
            for name, data in (
                (f"{number}.txt", f"{word} {number}"),
                (f"{number}.json", f'{{"other": "to {number}"}}'),
            ):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data.encode()))
    return sink.getvalue()


MAPPING = SourceMapping.model_validate({"query": {"text": "txt"}, "positive": {"text": "json:other"}, "task": "t"})


@pytest.fixture(params=["local", "s3"])
def theirs(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, str | None]:
    if request.param == "local":
        return open_store(str(tmp_path / "theirs")), None
    endpoint = request.getfixturevalue("s3_endpoint")
    store = open_store(f"s3://b{uuid.uuid4().hex[:12]}/theirs", endpoint)
    store.ensure_bucket()
    return store, endpoint


def test_an_external_shard_is_read_only_while_it_is_the_indexed_one(
    tmp_path: Path, theirs: tuple[Store, str | None]
) -> None:
    """The other one has the same length, keys and offsets."""
    store, endpoint = theirs
    store.write("0.tar", tar_of("first"))
    out = open_store(str(tmp_path / "out"))
    (found,) = find_shards([f"{store.url}/0.tar"], endpoint)
    shard = index_shard(ScanJob("s", found, "train/s/0.idx.parquet", MAPPING), out, endpoint).shard
    publish_manifest(out, Manifest("train", {"s": SourceInfo("t", 3, (shard,), MAPPING.model_dump())}))
    reader = Reader(DataConfig(root=str(tmp_path / "out"), endpoint=endpoint))
    assert [sample.query.text for sample, _ in reader.raw("s", range(3))] == ["first 0", "first 1", "first 2"]
    store.write("0.tar", tar_of("other"))
    with pytest.raises(
        UserError, match=r"0.tar: has changed since it was indexed: .*; restore it, or run the index job"
    ):
        read(reader, "s", 3)


def test_reads_under_a_tag_are_of_that_object_only(theirs: tuple[Store, str | None]) -> None:
    store, _ = theirs
    store.write("a", b"0123456789")
    tag = store.tags()["a"]
    assert store.read_range_if("a", 3, 4, tag) == b"3456"
    assert store.size("a") == 10
    store.write("a", b"9876543210")
    assert store.read_range_if("a", 3, 4, tag) is None
    assert store.read_range_if("a", 3, 4, store.tags()["a"]) == b"6543"
    with pytest.raises(FileNotFoundError):
        store.read_range_if("b", 0, 1, tag)
    with pytest.raises(FileNotFoundError):
        store.size("b")


def test_a_file_replaced_within_the_clock_of_the_disk_is_told_by_its_checksums(tmp_path: Path) -> None:
    """Same size and time: the tag is the same, the samples are not."""
    store = open_store(str(tmp_path / "theirs"))
    store.write("0.tar", tar_of("first"))
    out = open_store(str(tmp_path / "out"))
    (found,) = find_shards([f"{store.url}/0.tar"])
    shard = index_shard(ScanJob("s", found, "train/s/0.idx.parquet", MAPPING), out).shard
    publish_manifest(out, Manifest("train", {"s": SourceInfo("t", 3, (shard,), MAPPING.model_dump())}))
    file = tmp_path / "theirs/0.tar"
    stat = file.stat()
    file.write_bytes(tar_of("other"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert reasons(read(Reader(DataConfig(root=str(tmp_path / "out"))), "s", 3)) == ["damaged_shard"] * 3
