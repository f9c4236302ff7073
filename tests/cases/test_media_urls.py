"""Shards whose names hold characters that shells, URLs and paths treat specially."""

import io
import tarfile
import uuid
from pathlib import Path

import boto3
import pytest

from pipelines.errors import UserError
from pipelines.shards.external import ScanJob, index_shard
from pipelines.shards.index import read_shard_index
from pipelines.shards.mapping import SourceMapping
from pipelines.shards.read import external_sample_parser, read_samples, shard_file
from pipelines.shards.verify import _external_tags
from pipelines.storage.location import open_store
from pipelines.storage.shard_urls import find_shards

NAMES = [
    *("data1.tar", "data[1].tar", "data?.tar", "data*.tar", "{a,b}.tar", "a.tar", "b.tar", "{0..1}.tar", "a b.tar"),
    *(
        "a%20b.tar",
        "a+b.tar",
        "a#b.tar",
        "a&b=c.tar",
        "a'b\"c.tar",
        "a\\b.tar",
        "a:b.tar",
        "é日本.tar",
        "~x.tar",
        "A.TAR",
    ),
]
KEYS = [
    *(f"d/{name}" for name in NAMES),
    "d//x.tar",
    "d/../y.tar",
    "d/./z.tar",
    "d/x.tar",
    "y.tar",
    "/lead.tar",
    "lead.tar",
]


def shard(caption: str) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, content in (("0.jpg", b"picture"), ("0.txt", caption.encode())):
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return sink.getvalue()


def captions(urls: list[str], out: Path, endpoint: str | None = None) -> list[str]:
    """Index the shards and read their only sample from where they are."""
    store, mapping, found = open_store(str(out)), SourceMapping(), []
    for number, one in enumerate(find_shards(urls, endpoint)):
        indexed = index_shard(ScanJob("s", one, f"train/s/{number}.idx.parquet", mapping), store, endpoint)
        index = read_shard_index(store, indexed.shard)
        parse = external_sample_parser("s", mapping)
        [sample] = read_samples(*shard_file(store, indexed.shard, endpoint), index, range(1), parse)
        assert not isinstance(sample, Exception)
        found.append(sample[0].query.text)
        assert _external_tags([indexed.shard], endpoint)[indexed.shard.path] == one.tag
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "shards"
    for name in (*NAMES, "part[2]/c.tar"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(shard(name))
    return place


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_the_name_given_is_no_pattern(folder: Path, name: str, tmp_path: Path) -> None:
    assert captions([f"{folder}/{name}"], tmp_path / "out") == [name]


def test_patterns_still_work_and_folders_may_have_brackets(folder: Path, tmp_path: Path) -> None:
    assert captions([f"{folder}/part[2]"], tmp_path / "out") == ["part[2]/c.tar"]
    assert captions([f"{folder}/part[2]/*.tar"], tmp_path / "out") == ["part[2]/c.tar"]
    assert sorted(captions([f"{folder}/d*[1].tar"], tmp_path / "out")) == ["data1.tar"]
    (folder / "data[1].tar").unlink()
    (folder / "{a,b}.tar").unlink()
    assert captions([f"{folder}/data[1].tar"], tmp_path / "out") == ["data1.tar"]
    assert captions([f"{folder}/{{b,a}}.tar"], tmp_path / "out") == ["b.tar", "a.tar"]
    assert len(captions([str(folder)], tmp_path / "out")) == len(NAMES) - 1


@pytest.fixture(scope="module")
def bucket(s3_endpoint: str) -> str:
    name = f"b{uuid.uuid4().hex[:12]}"
    open_store(f"s3://{name}", s3_endpoint).ensure_bucket()
    client = boto3.client("s3", endpoint_url=s3_endpoint, config=boto3.session.Config(s3={"addressing_style": "path"}))
    for key in KEYS:
        client.put_object(Bucket=name, Key=key, Body=shard(key))
    return name


def test_every_key_of_s3_is_read_by_its_own_url(bucket: str, s3_endpoint: str, tmp_path: Path) -> None:
    urls = [f"s3://{bucket}/{key}" for key in KEYS]
    assert captions(urls, tmp_path / "out", s3_endpoint) == KEYS


def test_a_bucket_gives_each_of_its_keys_once(bucket: str, s3_endpoint: str, tmp_path: Path) -> None:
    assert sorted(captions([f"s3://{bucket}"], tmp_path / "out", s3_endpoint)) == sorted(KEYS)
    assert len(captions([f"s3://{bucket}/d"], tmp_path / "out", s3_endpoint)) == len(KEYS) - 3


def test_odd_keys_cannot_leave_a_folder(bucket: str, s3_endpoint: str, tmp_path: Path) -> None:
    """A tree is copied to a disk by its keys, where `..` would be a place outside."""
    with pytest.raises(UserError, match="leaves its store"):
        open_store(f"s3://{bucket}/d", s3_endpoint).download_tree("", tmp_path / "tree")
    assert not (tmp_path / "y.tar").exists()
