"""Raw files to shards on a real local Ray: accounting, splits, byte identity, planted faults, both stores."""

import io
import json
import subprocess
import time
import uuid
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pymupdf
import pytest
from PIL import Image

import pipelines.ingest.job
from jobs.cli import main
from jobs.runtime.local_s3 import free_port
from pipelines.config import DataConfig, MediaConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.ingest.blocks import plan_blocks
from pipelines.ingest.groups import ListedTable, list_table
from pipelines.ingest.ingest import ingest
from pipelines.ingest.report import IngestReport
from pipelines.samples import FileRef, Input, Media, MediaKind, Members, RawSample, Rejected, Sample
from pipelines.shards.index import content_sha256
from pipelines.shards.manifest import read_manifest
from pipelines.shards.verify import verify
from pipelines.storage.location import open_store
from pipelines.storage.store import Store
from tests.inline import run_here
from tests.kills import run_until_a_part_is_stored
from tests.tables import opened, picture, write_pictures, write_table

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
MEDIA = MediaConfig(frames=2, page_pixels=40_000)


def text_to(kind: MediaKind, path: Path, text: str, source: str = "cars", page: int | None = None) -> RawSample:
    member = f"p0{path.suffix}"
    sample = Sample("", source, "t2i", Input(text), Input("", (Media(kind, member),)), origin=path.name)
    return RawSample(sample, {member: FileRef(str(path), page)})


def write_images(folder: Path, count: int, start: int = 0) -> list[RawSample]:
    folder.mkdir(parents=True, exist_ok=True)
    raws = []
    for n in range(start, start + count):
        pixels = np.random.default_rng(n).integers(0, 255, (24, 32, 3), np.uint8)
        path = folder / f"{n:04d}.jpg"
        Image.fromarray(pixels).save(path)
        raws.append(text_to("image", path, f"picture {n}"))
    return raws


def write_video(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for shade in range(0, 200, 20):
            frame = av.VideoFrame.from_ndarray(np.full((24, 32, 3), shade, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_pdf(path: Path, pages: int) -> None:
    with pymupdf.open() as document:
        for number in range(pages):
            document.new_page(width=200, height=100).insert_text((20, 50), f"page {number}")
        document.save(path)


def run(raw: list[RawSample | Rejected], out: Store, **changes: object) -> IngestReport:
    settings: dict[str, object] = {"media": MEDIA, "held_out_fraction": 0.2, "seed": 5, "samples_per_shard": 4}
    return ingest(raw, out, **(settings | changes))  # type: ignore[arg-type]


def stored(out: Store, split: str) -> list[tuple[Sample, Members]]:
    data = DataConfig(root=out.url, endpoint=getattr(out, "endpoint", None))
    reader = Reader(data.model_copy(update={"split": split}))  # no setting names the split `uncaptioned`
    return [item for source, size in reader.sizes().items() for item in reader.raw(source, range(size))]


def snapshot(out: Store) -> dict[str, bytes]:
    """Every file of a dataset. Markers have times of files, and the report has its own."""
    return {path: out.read(path) for path in out.list() if path != "report.json" and not path.startswith("ingest/")}


def test_every_medium_arrives_whole(tmp_path: Path) -> None:
    raws = write_images(tmp_path / "raw", 3)
    write_video(tmp_path / "raw/clip.mp4")
    write_pdf(tmp_path / "raw/paper.pdf", 3)
    raws.append(text_to("video", tmp_path / "raw/clip.mp4", "a clip", "clips"))
    raws += [text_to("document", tmp_path / "raw/paper.pdf", f"about {n}", "papers", page=n) for n in (0, 2)]
    raws.append(RawSample(Sample("", "words", "t2t", Input("left"), Input("right"), (Input("wrong"),))))
    out = open_store(str(tmp_path / "out"))
    progress: list[tuple[int, int]] = []
    report = run(raws, out, held_out_fraction=0.0, on_progress=lambda done, total, _: progress.append((done, total)))
    assert report.accepted == {"train": {"cars": 3, "clips": 1, "papers": 2, "words": 1}, "held_out": {}}
    assert (report.seen, report.rejected) == (7, {})
    assert sorted(done for done, _ in progress) == [done for done, _ in progress]
    assert progress[-1] == (7, 7)
    found = {sample.query.text: (sample, members) for sample, members in stored(out, "train")}
    for raw in raws:
        sample, members = found[raw.sample.query.text]
        assert sample.target_sha256 == content_sha256(sample.positive, members)
        assert replace(sample, key="", target_sha256="", query_sha256="") == raw.sample
        whole = {name: Path(ref.path).read_bytes() for name, ref in raw.files.items() if ref.page is None}
        assert {name: members[name] for name in whole} == whole
    for number in (0, 2):
        with pymupdf.open(stream=found[f"about {number}"][1]["p0.pdf"], filetype="pdf") as document:
            assert [page.get_text().strip() for page in document] == [f"page {number}"]
    assert verify(out, "train") == verify(out, "held_out") == []
    assert json.loads(out.read("report.json")) == json.loads(report.to_json())
    assert {kind: name.split()[0] for kind, name in report.libraries.items()} == {
        "image": "pillow",
        "video": "pyav",
        "document": "pymupdf",
    }
    assert read_manifest(out, "train").settings["media"] == MEDIA.model_dump()


def plant(folder: Path) -> Iterator[tuple[RawSample, str]]:
    """One bad file after another, each with the reasons under which it may be counted."""
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)).save(picture, "JPEG")
    write_video(folder / "good.mp4")
    write_pdf(folder / "good.pdf", 2)
    contents: dict[str, tuple[MediaKind, bytes]] = {
        "cut.jpg": ("image", picture.getvalue()[:900]),
        "zero.jpg": ("image", b""),
        "text.png": ("image", b"this is not a picture"),
        "cut.mp4": ("video", (folder / "good.mp4").read_bytes()[:500]),
        "zero.mp4": ("video", b""),
        "picture.mp4": ("video", b"\x89PNG\r\n\x1a\n" + bytes(100)),
        "cut.pdf": ("document", (folder / "good.pdf").read_bytes()[:300]),
        "page.pdf": ("document", b"<html><body>hello</body></html>"),
    }
    for name, (kind, data) in contents.items():
        (folder / name).write_bytes(data)
        yield text_to(kind, folder / name, name), name
    yield text_to("document", folder / "good.pdf", "page 9", page=9), "good.pdf"
    yield text_to("image", folder / "absent.jpg", "absent"), "absent.jpg"
    yield text_to("image", folder, "a folder"), folder.name
    (folder / "large.jpg").write_bytes(picture.getvalue() + bytes(200_000))
    yield text_to("image", folder / "large.jpg", "large"), "large.jpg"
    nameless = Sample("", "cars", "t2i", Input("nameless"), Input("", (Media("image", "p0.jpg"),)), origin="nameless")
    yield RawSample(nameless), "nameless"


def test_planted_faults_are_counted_and_nothing_is_lost(tmp_path: Path) -> None:
    good = write_images(tmp_path / "raw", 9)
    planted = list(plant(tmp_path / "raw"))
    early = [Rejected("notes.txt", "unknown_extension", ".txt")]
    raws = [*good, *(raw for raw, _ in planted), good[3], *early]
    out = open_store(str(tmp_path / "out"))
    report = run(raws, out, held_out_fraction=0.0, media=MEDIA.model_copy(update={"max_bytes": 200_000}))
    assert report.seen == 9 + 13 + 1 + 1
    assert report.accepted["train"] == {"cars": 9}
    assert report.num_rejected == 15
    certain = {"duplicate": 1, "unknown_extension": 1, "missing_file": 2, "unreadable_file": 1, "too_many_bytes": 1}
    assert {reason: report.rejected[reason] for reason in certain} == certain
    assert report.rejected["no_such_page"] == 1
    assert report.rejected["not_a_pdf"] == 1
    assert "decoder_error" not in report.rejected
    listed = "\n".join(line for lines in report.examples.values() for line in lines)
    assert all(name in listed for _, name in planted)
    assert {sample.query.text for sample, _ in stored(out, "train")} == {f"picture {n}" for n in range(9)}
    assert verify(out, "train") == []


def test_a_rerun_gives_the_same_bytes_wherever_the_raw_data_lies(tmp_path: Path) -> None:
    outs = []
    for place in ("first", "second/deeper"):
        raws = write_images(tmp_path / place, 11)
        write_pdf(tmp_path / place / "paper.pdf", 3)
        # The PDF itself carries a random ID; both runs shall read the same one.
        (tmp_path / place / "paper.pdf").write_bytes((tmp_path / "first/paper.pdf").read_bytes())
        raws += [text_to("document", tmp_path / place / "paper.pdf", f"{n}", "papers", page=n) for n in range(3)]
        outs.append(open_store(str(tmp_path / f"out {place}")))
        run(raws if place == "first" else raws[::-1], outs[-1])
    once = snapshot(outs[0])
    assert once == snapshot(outs[1])
    run(raws, outs[1])
    assert once == snapshot(outs[1])
    run(raws, outs[1], seed=6)
    assert once != snapshot(outs[1])


def test_a_smaller_rerun_leaves_no_orphans(tmp_path: Path) -> None:
    raws = write_images(tmp_path / "raw", 13)
    out = open_store(str(tmp_path / "out"))
    run(raws, out)
    out.write("train/notes.txt", b"not ours")
    out.write("train/cars/cars-000000-0123456789ab.tar", b"from a run that was killed")
    run(raws[:5], out)
    assert verify(out, "train") == ["train/notes.txt: not in the manifest"]
    assert read_manifest(out, "train").num_samples == 4


def test_s3_holds_the_same_bytes_as_a_disk(tmp_path: Path, s3_endpoint: str) -> None:
    raws = write_images(tmp_path / "raw", 7)
    local, remote = open_store(str(tmp_path / "out")), open_store(f"s3://b{uuid.uuid4().hex[:12]}/x", s3_endpoint)
    run(raws, local)
    run(raws, remote)
    assert snapshot(local) == snapshot(remote)
    assert verify(remote, "train") == []


def test_nothing_usable_is_reported(tmp_path: Path) -> None:
    (tmp_path / "zero.jpg").write_bytes(b"")
    out = open_store(str(tmp_path / "out"))
    with pytest.raises(UserError, match="none of 0 samples can be used"):
        run([], out)
    with pytest.raises(UserError, match=r"none of 2 samples can be used for training \(.*unknown_extension 1"):
        run([text_to("image", tmp_path / "zero.jpg", "x"), Rejected("a.txt", "unknown_extension")], out)
    assert json.loads(out.read("report.json"))["seen"] == 2
    with pytest.raises(UserError, match="there is no such manifest"):
        read_manifest(out, "train")


def test_uncaptioned_media_are_a_split_that_nothing_is_trained_on(tmp_path: Path) -> None:
    raws = write_images(tmp_path / "raw", 3)
    alone = [replace(raw, sample=replace(raw.sample, query=Input()), split="uncaptioned") for raw in raws]
    out = open_store(str(tmp_path / "out"))
    assert run(alone, out, keep_uncaptioned=True).accepted == {"train": {}, "held_out": {}, "uncaptioned": {"cars": 3}}
    assert {sample.origin for sample, _ in stored(out, "uncaptioned")} == {"0000.jpg", "0001.jpg", "0002.jpg"}
    assert verify(out, "uncaptioned") == []
    with pytest.raises(
        UserError, match=r"out/train: has no pair to train on; caption the raw files with .*captions\.js"
    ):
        Reader(DataConfig(root=out.url)).tables()
    assert run(raws, out).accepted == {"train": {"cars": 2}, "held_out": {"cars": 1}, "uncaptioned": {}}
    assert stored(out, "uncaptioned") == []
    assert not any(path.startswith("uncaptioned/cars") for path in out.list())


def test_a_folder_without_captions_says_which_line_to_write_where(tmp_path: Path) -> None:
    rejected = [Rejected("a/1.jpg", "no_caption"), Rejected("b.jpg", "no_caption")]
    line = (
        r'write captions\.jsonl into the raw folder with lines such as {"file": "a/1\.jpg", "caption": "what it shows"}'
    )
    with pytest.raises(UserError, match=line):
        run([*rejected], open_store(str(tmp_path / "out")))


def test_a_run_without_raw_data_leaves_what_is_there(tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))
    run(write_images(tmp_path / "raw", 5), out)
    before = snapshot(out)
    with pytest.raises(UserError, match="none of 0 samples"):
        run([], out)
    assert snapshot(out) == before


def test_an_unreachable_store_is_reported_within_seconds(tmp_path: Path) -> None:
    raws = write_images(tmp_path / "raw", 3)
    start_s = time.monotonic()
    with pytest.raises(UserError, match="no proper answer"):
        run(raws, open_store("s3://b/x", f"http://127.0.0.1:{free_port()}"))
    assert time.monotonic() - start_s < 60


def test_a_full_disk_in_a_task_is_reported(tmp_path: Path) -> None:
    raws = write_images(tmp_path / "raw", 90)
    (tmp_path / "small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path / "small")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small tmpfs here")
    try:
        out = open_store(str(tmp_path / "small"))
        with pytest.raises(UserError, match="No space left on device; free some space") as caught:
            run(raws, out, samples_per_shard=20)
        # The shards of a group are written in any order.
        shards = tuple(str(tmp_path / f"small/{split}/cars/cars-0") for split in ("train", "held_out"))
        assert caught.value.place.startswith(shards)
        with pytest.raises(UserError, match="there is no such manifest"):
            read_manifest(out, "train")
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "small")], check=True)


def test_plan_splits_by_target_and_cuts_evenly(tmp_path: Path) -> None:
    raws = [text_to("image", tmp_path / f"{n}.jpg", f"picture {n}") for n in range(53)]
    blocks = plan_blocks(raws, 0.1, seed=1, samples_per_shard=10)
    sizes = {split: [len(b.samples) for b in blocks if b.split == split] for split in ("train", "held_out")}
    assert sizes == {"train": [10, 10, 10, 10, 8], "held_out": [5]}
    assert [b.path for b in blocks][3:] == [
        "train/cars/cars-000003.tar",
        "train/cars/cars-000004.tar",
        "held_out/cars/cars-000000.tar",
    ]
    train = [raw.sample.key for b in blocks if b.split == "train" for raw in b.samples]
    assert train == [f"{n:08d}" for n in range(48)]
    texts = [raw.sample.query.text for b in blocks for raw in b.samples]
    assert sorted(texts) == sorted(raw.sample.query.text for raw in raws)
    assert texts[:48] != sorted(texts[:48])


def test_samples_of_one_target_are_never_split(tmp_path: Path) -> None:
    raws = [text_to("image", tmp_path / f"{n % 12}.jpg", f"question {n}") for n in range(60)]
    blocks = plan_blocks(raws, 0.25, seed=1, samples_per_shard=7)
    splits_of: dict[str, set[str]] = {}
    for block in blocks:
        for raw in block.samples:
            splits_of.setdefault(raw.files["p0.jpg"].path, set()).add(block.split)
    assert {len(splits) for splits in splits_of.values()} == {1}
    assert sum(len(block.samples) for block in blocks if block.split == "held_out") == 15


def test_samples_go_to_the_split_that_they_name(tmp_path: Path) -> None:
    """Even where they share a target with samples of the other, as those of one class do; the rest is drawn."""
    raws = [text_to("image", tmp_path / f"{n % 4}.jpg", f"question {n}") for n in range(20)]
    named = [replace(raw, split=("train", "held_out")[n % 3 == 0]) for n, raw in enumerate(raws)]
    free = [text_to("image", tmp_path / f"free-{n}.jpg", f"free {n}") for n in range(10)]
    blocks = plan_blocks(named + free, 0.2, seed=1, samples_per_shard=7)
    of = {split: [raw for b in blocks if b.split == split for raw in b.samples] for split in ("train", "held_out")}
    assert [len(of["train"]), len(of["held_out"])] == [13 + 8, 7 + 2]
    assert all(raw.split in (None, split) for split, members in of.items() for raw in members)
    nothing_drawn = plan_blocks(named, 0.9, seed=1, samples_per_shard=7)
    assert sum(len(b.samples) for b in nothing_drawn if b.split == "held_out") == 7


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (2, 0), (3, 1), (4, 2), (10, 5)])
def test_small_sources_keep_two_samples_to_train(count: int, held_out: int, tmp_path: Path) -> None:
    raws = [text_to("image", tmp_path / f"{n}.jpg", f"picture {n}") for n in range(count)]
    blocks = plan_blocks(raws, 0.5, seed=0, samples_per_shard=3)
    assert Counter(block.split for block in blocks for _ in block.samples)["held_out"] == held_out


def test_sources_that_cannot_be_are_reported(tmp_path: Path) -> None:
    raw = text_to("image", tmp_path / "a.jpg", "a")
    out = open_store(str(tmp_path / "out"))
    with pytest.raises(UserError, match="has samples of the tasks 't2i' and 'i2t'"):
        run([raw, replace(raw, sample=replace(raw.sample, task="i2t"))], out)
    with pytest.raises(UserError, match="is not a folder name"):
        run([replace(raw, sample=replace(raw.sample, source="../x"))], out)


def test_tables_of_several_layouts_and_a_folder_become_one_dataset(
    tmp_path: Path, s3_endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes in Parquet, paths in a zip, texts in CSV, frames, and files with captions, in one job that is repeated."""
    pictures = [{"caption": f"cell {n}", "image": {"bytes": picture(n, "JPEG"), "path": "1.png"}} for n in range(6)]
    pictures.append({"caption": "damaged", "image": {"bytes": picture(6, "JPEG")[:300], "path": "1.jpg"}})
    cells = write_table(tmp_path / "cells.parquet", pictures, row_group_size=2)
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for n in range(3):
            archive.writestr(f"images/{n}.bin", picture(20 + n))
    listed = [{"qry": f"<|image_1|> q {n}", "pic": f"images/{n}.bin", "pos_text": f"answer {n}"} for n in range(4)]
    lines = write_table(tmp_path / "lines.jsonl", listed)
    pairs = write_table(tmp_path / "pairs.csv", [{"sent0": f"a {n}", "sent1": f"b {n}"} for n in range(3)])
    write_pictures(tmp_path, "frames/v/1.jpg", "frames/v/2.jpg")
    clips = write_table(tmp_path / "clips.json", [{"text": "a clip", "video": "frames/v"}])
    remote = open_store(f"s3://b{uuid.uuid4().hex[:12]}/remote", s3_endpoint)
    remote.ensure_bucket()
    remote.write("pages/1.bin", picture(30))
    faq = [{"caption": f"remote {n}", "page": f"pages/{n}.bin"} for n in (1, 2)]
    remote.upload(Path(write_table(tmp_path / "faq.jsonl", faq)), "faq.jsonl")
    write_images(tmp_path / "raw", 2)
    for n in range(2):
        (tmp_path / f"raw/{n:04d}.txt").write_text(f"file {n}")
    spec = {
        "kind": "ingest",
        "input": str(tmp_path / "raw"),
        "out": str(tmp_path / "out"),
        "endpoint": s3_endpoint,
        "held_out_fraction": 0.0,
        "samples_per_shard": 4,
        "sources": {
            "cells": {"table": cells, "license": "CC BY 4.0"},  # its columns say the rest
            "lines": {
                "table": lines,
                "media_root": str(tmp_path / "images.zip"),
                "query": {"text": "qry", "media": "pic"},
                "positive": {"text": "pos_text"},
            },
            "pairs": {"table": pairs},
            "remote": {
                "table": f"{remote.url}/*.jsonl",
                "query": {"text": "caption"},
                "positive": {"media": "page"},
                "task": "text_page",
            },
            "clips": {"table": clips, "query": {"text": "text"}, "positive": {"media": "video"}},
        },
    }
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    assert main(["run", str(tmp_path / "spec.yaml")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert 'cells is read with {"query": {"text": "caption"}, "positive": {"media": "image"}}: see `rzen look' in told
    assert "lines is read with" not in told
    out = open_store(str(tmp_path / "out"))
    report = json.loads(out.read("report.json"))
    assert report["accepted"]["train"] == {"cells": 6, "clips": 1, "lines": 3, "pairs": 3, "remote": 1, "text_image": 2}
    assert report["rejected"] == {"corrupt_image": 1, "missing_file": 2}
    assert report["seen"] == 19
    assert {source: info.task for source, info in read_manifest(out, "train").sources.items()} == {
        **{"cells": "text_image", "clips": "text_video", "lines": "image_text_text"},
        **{"pairs": "text_text", "remote": "text_page", "text_image": "text_image"},
    }
    assert report["licenses"] == {"cells": "CC BY 4.0"}
    card = out.read("DATA.md").decode()
    assert "16 samples of 6 sources" in card
    assert "| cells | text_image | CC BY 4.0 | 6 |" in card
    assert "| pairs | text_text | not stated | 3 |" in card
    assert "| corrupt_image | 1 |" in card
    assert "| clips | a clip | [video] | 0 | clips.json:1 |" in card
    found = {sample.query.text: (sample, members) for sample, members in stored(out, "train")}
    assert found["cell 3"][1] == {"p0.jpg": picture(3, "JPEG")}
    assert found["remote 1"][1] == {"p0.png": picture(30)}
    assert found["q 2"][1] == {"q0.png": picture(22)}
    assert list(found["a clip"][1]) == ["p0.avi"]
    once = snapshot(out)
    assert main(["run", str(tmp_path / "spec.yaml")]) == 0
    assert snapshot(out) == once
    spec["sources"]["pairs"]["query"] = {"text": "sent"}  # type: ignore[index]
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    assert main(["run", str(tmp_path / "spec.yaml")]) == 1
    assert snapshot(out) == once


def test_a_job_that_is_killed_twice_goes_on_with_any_number_of_workers(tmp_path: Path) -> None:
    """SIGKILL on the job while its tasks run on Ray, then the same command: the bytes of a job that one process did."""
    rows = [{"q": f"picture {n}", "p": {"bytes": picture(n, "JPEG"), "path": "1.png"}} for n in range(200)]
    table = write_table(tmp_path / "t.parquet", rows, row_group_size=4)
    source = {"table": table, "query": {"text": "q"}, "positive": {"media": "p"}}
    spec = {"kind": "ingest", "out": str(tmp_path / "out"), "samples_per_shard": 7, "sources": {"pics": source}}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    out = open_store(str(tmp_path / "out"))
    stored_blocks = []
    for pattern in ("*/000000.json", "*/000009.json"):
        run_until_a_part_is_stored(tmp_path / "spec.yaml", tmp_path / "out/ingest", pattern)
        stored_blocks.append({path: out.tag(path) for path in out.list("ingest")})
        assert "manifest.json" not in "".join(out.list())
    assert stored_blocks[0].items() <= stored_blocks[1].items()
    assert main(["run", str(tmp_path / "spec.yaml")]) == 0
    assert stored_blocks[1].items() <= {path: out.tag(path) for path in out.list("ingest")}.items()
    here = open_store(str(tmp_path / "here"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.ingest.job, "run", run_here)
        ingest(
            (),
            here,
            tables=[list_table(opened(table, "pics", query={"text": "q"}, positive={"media": "p"}))],
            media=MediaConfig(),
            held_out_fraction=0.1,
            seed=0,
            samples_per_shard=7,
        )
    assert snapshot(out) == snapshot(here)
    assert read_manifest(out, "train").num_samples + read_manifest(out, "held_out").num_samples == 200


def test_a_damaged_table_is_an_error_and_what_is_stored_stays(tmp_path: Path) -> None:
    """Other groups are planned and written on Ray at that moment. Once the file is whole, they are not made again."""
    pairs = [{"q": f"question {n}", "p": f"answer {n}"} for n in range(400)]
    settings = {"query": {"text": "q"}, "positive": {"text": "p"}}
    good = write_table(tmp_path / "good.parquet", pairs, row_group_size=10)
    bad = Path(write_table(tmp_path / "bad.parquet", pairs, row_group_size=200, compression="zstd"))
    whole = bad.read_bytes()
    place = pq.ParquetFile(bad).metadata.row_group(1).column(0).data_page_offset
    bad.write_bytes(whole[: place + 40] + bytes(200) + whole[place + 240 :])
    out = open_store(str(tmp_path / "out"))

    def tables() -> list[ListedTable]:
        return [list_table(opened(good, "good", **settings)), list_table(opened(str(bad), "bad", **settings))]

    with pytest.raises(UserError, match=r"bad\.parquet: cannot be read: .*; fetch it again"):
        run([], out, tables=tables())
    with pytest.raises(UserError, match="there is no such manifest"):
        read_manifest(out, "train")
    bad.write_bytes(whole)
    run([], out, tables=tables())
    before = {path: out.tag(path) for path in out.list("ingest") if path.endswith("00.json")}
    report = run([], out, tables=tables())
    assert (report.num_accepted, report.num_groups, report.num_reused) == (800, 4, 4)
    assert before == {path: out.tag(path) for path in before}
