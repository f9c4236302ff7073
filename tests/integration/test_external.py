"""Shards that others have written are indexed and trained from in place, and others read ours."""

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.data
import webdataset

from jobs.cli import main
from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.ingest.indexing import index
from pipelines.samples import Sample
from pipelines.shards.manifest import read_manifest
from pipelines.shards.mapping import InputMapping, SourceMapping
from pipelines.shards.verify import verify
from pipelines.storage.location import open_store
from pipelines.storage.store import Store
from tests.data import publish
from tests.external import img2dataset_samples, write_img2dataset
from tests.paths import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
COUNT, PER_SHARD = 72, 24


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A bucket of its own, its endpoint known from the environment as on a user's machine."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("RZEN_CACHE", str(tmp_path / "cache"))
    url = f"s3://b{uuid.uuid4().hex[:12]}"
    open_store(url).ensure_bucket()
    return url


def upload(bucket: str, folder: Path) -> Store:
    store = open_store(f"{bucket}/theirs")
    store.upload_tree(folder)
    return store


@pytest.mark.slow
@pytest.mark.long
def test_unshuffled_shards_on_s3_are_trained_from_in_place(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_img2dataset(tmp_path / "theirs", COUNT, PER_SHARD)
    theirs = upload(bucket, tmp_path / "theirs")
    before = theirs.tags()
    assert main(["index", f"{bucket}/theirs/{{00000..00002}}.tar", f"{bucket}/data", "--source", "web"]) == 0
    printed = capsys.readouterr().out
    assert "index: shards 3/3" in printed
    assert "web is not shuffled: neighbors share 8" in printed
    assert "With run_length 16 a batch of 256 holds 16 neighborhoods" in printed
    assert main(["verify", f"{bucket}/data"]) == 0
    assert f"{bucket}/data/train: 72 samples in 3 shards, sound" in capsys.readouterr().out

    changes = {
        "name": "own",
        "run.root": f"{bucket}/runs",
        "data": f"{{root: {bucket}/data, media: {{image_pixels: 50000}}}}",
        "model.backbone": "{hidden: 32, layers: 1}",
        "model.tune": "full",
        "model.prompt.max_visual_tokens": "16",
        "model.dtype": "float32",
        "model.gradient_checkpointing": "false",
        "global_batch": "8",
        "steps": "3",
        "cluster": "{workers: 1, cpus_per_worker: 0.5, gpus_per_worker: 0}",
    }
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    spec = str(ROOT / "jobs/stage1.yaml")
    assert main(["run", spec, *sets]) == 0
    assert "With run_length 16 a batch of 8 holds 1 neighborhood, and 100% of" in capsys.readouterr().out
    done = json.loads(open_store(f"{bucket}/runs/own").read("done.json"))
    assert (done["steps"], done["last"]["bad_samples"]) == (3, 0)
    assert theirs.tags() == before


def run(urls: list[str], out: Store, **changes: Any) -> Any:
    return index({"web": (SourceMapping(), urls)}, out, "train", **changes)


def test_every_sample_arrives_with_its_bytes(bucket: str, tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "theirs", COUNT, PER_SHARD)
    upload(bucket, tmp_path / "theirs")
    run([f"{bucket}/theirs"], open_store(str(tmp_path / "out")))
    reader = Reader(DataConfig(root=str(tmp_path / "out")))
    found = [*reader.raw("web", range(COUNT))]
    for (sample, members), theirs in zip(found, img2dataset_samples(COUNT), strict=True):
        assert (sample.key, sample.query.text) == (theirs["__key__"], theirs["txt"])
        assert members == {"jpg": theirs["jpg"]}


def test_a_damaged_tar_loses_nothing_without_a_count(tmp_path: Path) -> None:
    first, second, third = write_img2dataset(tmp_path / "theirs", COUNT, PER_SHARD)
    whole = run([str(tmp_path / "theirs")], open_store(str(tmp_path / "whole")))
    assert (whole.seen, whole.accepted, whole.rejected, whole.findings) == (72, {"web": 72}, {}, {})
    data = bytearray(first.read_bytes())
    data[data.index(b"000000007.") + 1] = 0xFF
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[: second.stat().st_size // 2])
    third.write_bytes(b"")
    out = open_store(str(tmp_path / "out"))
    report = run([str(tmp_path / "theirs")], out)
    assert report.seen == report.accepted["web"] + sum(report.rejected.values())
    assert {reason: found["places"] for reason, found in report.findings.items()} == {
        "bad_header": 1,
        "truncated": 1,
        "no_end_marker": 1,
    }
    assert report.accepted["web"] in range(23 + 11, 24 + 13)
    assert report.findings["truncated"]["bytes"] > 0
    assert json.loads(out.read("train/report.json"))["accepted"] == report.accepted
    reader = Reader(DataConfig(root=str(tmp_path / "out")))
    keys = [sample.key for sample, _ in reader.raw("web", range(report.accepted["web"]))]
    assert keys == sorted(keys)
    assert verify(out, "train") == []


def test_an_interrupted_index_goes_on_and_reads_only_what_is_new(tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "theirs", COUNT, PER_SHARD)
    out = open_store(str(tmp_path / "out"))

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([str(tmp_path / "theirs")], out, on_progress=stop)
    with pytest.raises(UserError, match="there is no such manifest"):
        read_manifest(out, "train")
    resumed = run([str(tmp_path / "theirs")], out)
    assert (resumed.accepted, resumed.num_shards) == ({"web": 72}, 3)
    assert resumed.num_reused >= 2
    once = read_manifest(out, "train")
    again = run([str(tmp_path / "theirs")], out)
    assert (again.num_reused, read_manifest(out, "train")) == (3, once)
    assert (again.neighbors, again.rejected, again.seen) == (resumed.neighbors, resumed.rejected, resumed.seen)
    straight = open_store(str(tmp_path / "straight"))
    run([str(tmp_path / "theirs")], straight)
    assert read_manifest(straight, "train") == once
    (tmp_path / "theirs/00001.tar").unlink()
    fewer = run([str(tmp_path / "theirs")], out)
    assert (fewer.accepted, fewer.num_reused) == ({"web": 48}, 2)
    assert verify(out, "train") == []


def test_what_cannot_be_published_is_reported(tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "theirs", 4, 4)
    own = open_store(str(tmp_path / "own"))
    publish(own, {"web": ("t2i", 8), "cars": ("t2i", 8)})
    with pytest.raises(UserError, match=r"holds shards that ingest wrote under 'web'|holds source 'cars', which"):
        run([str(tmp_path / "theirs")], own)
    own.write("train/manifest.json", b"torn")
    assert run([str(tmp_path / "theirs")], own).accepted == {"web": 4}
    captions = SourceMapping(query=InputMapping(text="cap"))
    with pytest.raises(UserError, match="source web: has no usable sample; over all sources: missing_member 4"):
        index({"web": (captions, [str(tmp_path / "theirs")])}, own.child("x"), "train")
    assert main(["index", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 1


def test_verify_on_the_command_line_lists_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(str(tmp_path))
    publish(store, {"cars": ("t2i", 20)})
    assert main(["verify", str(tmp_path)]) == 0
    assert f"{tmp_path}/train: 20 samples in 3 shards, sound" in capsys.readouterr().out
    store.delete("train/cars/cars-000001.tar")
    store.write("train/cars/stray.tar", b"")
    assert main(["verify", str(tmp_path), "--split", "train"]) == 1
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "train/cars/cars-000001.tar: missing",
        "train/cars/stray.tar: not in the manifest",
        f"{tmp_path}/train: 20 samples in 3 shards, 2 problem(s)",
    ]
    assert main(["verify", str(tmp_path / "nowhere")]) == 1


def with_webdataset(path: Path) -> Iterator[dict[str, Any]]:
    yield from webdataset.WebDataset(str(path), shardshuffle=False)


def with_ray(path: Path) -> Iterator[dict[str, Any]]:
    yield from ray.data.read_webdataset(str(path), decoder=None).iter_rows()


@pytest.mark.parametrize("read", [with_webdataset, with_ray])
def test_shards_of_ours_are_read_equally_by_others(
    read: Callable[[Path], Iterator[dict[str, Any]]], tmp_path: Path
) -> None:
    manifest = publish(open_store(str(tmp_path)), {"cars": ("t2i", 20)})
    theirs = [item for shard in manifest.sources["cars"].shards for item in read(tmp_path / shard.path)]
    ours = [*Reader(DataConfig(root=str(tmp_path))).raw("cars", range(20))]
    for item, (sample, members) in zip(theirs, ours, strict=True):
        assert item["__key__"] == sample.key
        assert Sample.from_json(item["json"]) == sample
        assert {name: item[name] for name in item if not name.startswith("__") and name != "json"} == members
