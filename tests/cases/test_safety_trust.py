"""Trust is the user's to give: whoever made a dataset, its pages and videos are decoded in the child by default."""

import io
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.training.kind import TRAIN
from pipelines.config import DataConfig, MediaConfig
from pipelines.errors import BadMedia
from pipelines.feed.reader import Reader
from pipelines.items.decode import ItemDecoder
from pipelines.items.types import Item
from pipelines.media import decode
from pipelines.media.decode import Decoder, decode_member
from pipelines.media.materialized import materialize
from pipelines.samples import DecodedSample, FileRef, Input, Media, Rejected, Sample
from pipelines.shards.manifest import Manifest, SourceInfo, publish_manifest
from pipelines.shards.write import write_shard
from pipelines.storage.location import open_store
from rzen.embedding.inputs import InputReader

MEDIA = MediaConfig(max_cpu_s=1, frames=2, page_pixels=20_000)
HANGS = "decoder_cpu_limit"


def endless_pdf() -> bytes:
    """Nine forms, each of which draws the next one twelve times: 5e9 rectangles in 2.5 KB."""
    forms = [
        form(b"/X%d Do " % (depth + 1) * 12 if depth < 8 else b"0 0 1 1 re f ", depth + 7 if depth < 8 else None)
        for depth in range(9)
    ]
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]/Contents 4 0 R/Resources<</XObject<</X0 6 0 R>>>>>>"
    pages = b"<</Type/Pages/Kids[3 0 R]/Count 1>>"
    return pdf([b"<</Type/Catalog/Pages 2 0 R>>", pages, page, stream(b"/X0 Do"), b"null", *forms])


def form(content: bytes, drawn: int | None) -> bytes:
    name = b"/X%d %d 0 R" % (drawn - 6, drawn) if drawn else b""
    return stream(content, b"/Type/XObject/Subtype/Form/BBox[0 0 200 200]/Resources<</XObject<<" + name + b">>>>")


def stream(content: bytes, entries: bytes = b"") -> bytes:
    return b"<<" + entries + b"/Length %d>>stream\n" % len(content) + content + b"\nendstream"


def pdf(objects: list[bytes]) -> bytes:
    data, places = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n" % number + content + b"\nendobj\n"
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer\n<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(data))
    return data + b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + table + end


def picture() -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (32, 24), "teal").save(sink, "PNG")
    return sink.getvalue()


def clip() -> bytes:
    return materialize("video", np.zeros((2, 16, 16, 3), np.uint8), [0.0, 1.0])


def own_shard(folder: Path, members: dict[str, bytes], *, trusted: bool = False) -> Reader:
    """A dataset in the project's own format, whose manifest says that it is trusted."""
    root = folder / "train/pages"
    root.mkdir(parents=True)
    kinds = {"pdf": "document", "avi": "video", "png": "image"}
    samples = []
    for number, (member, data) in enumerate(members.items()):
        medium = Media(kinds[member.rpartition(".")[2]], member)
        sample = Sample(
            f"{number:08}", "pages", "text_page", Input("q"), Input(media=(medium,)), target_sha256="0" * 64
        )
        samples.append((sample, {member: data}))
    shard = replace(write_shard(root / "pages-000000.tar", samples), path="train/pages/pages-000000.tar")
    sources = {"pages": SourceInfo("text_page", len(samples), (shard,))}
    publish_manifest(open_store(str(folder)), Manifest("train", sources, {"trusted": True}))
    return Reader(DataConfig(root=str(folder), media=MEDIA, trusted=trusted))


def test_a_shard_of_our_own_format_is_not_trusted_whatever_its_manifest_says(tmp_path):
    reader = own_shard(tmp_path, {"p0.pdf": endless_pdf(), "p1.png": picture()})
    start_s = time.monotonic()
    bad, good = reader.samples("pages", [0, 1])
    assert isinstance(bad, Rejected)
    assert bad.reason == HANGS
    assert isinstance(good, DecodedSample)
    assert time.monotonic() - start_s < 60


@pytest.mark.parametrize("page", [None, 0])
def test_files_of_benchmarks_are_not_trusted(tmp_path, page):
    (tmp_path / "a.pdf").write_bytes(endless_pdf())
    item = Item(
        "0" * 32,
        "a",
        Input(media=(Media("document", "p0.pdf"),)),
        "0" * 32,
        files={"p0.pdf": FileRef(str(tmp_path / "a.pdf"), page)},
    )
    (found,) = ItemDecoder(MEDIA).inputs([item])
    assert isinstance(found, Rejected)
    assert found.reason == HANGS


def test_files_that_a_user_embeds_are_not_trusted(tmp_path):
    (tmp_path / "a.pdf").write_bytes(endless_pdf())
    for given in (tmp_path / "a.pdf", f"{tmp_path}/a.pdf#page=0", (tmp_path / "a.pdf").as_uri()):
        with pytest.raises(BadMedia, match=HANGS), closing(InputReader(MEDIA)) as reader:
            reader.read(given)


def test_where_each_kind_is_decoded_and_that_the_pixels_are_equal(monkeypatch):
    page = pdf(
        [
            b"<</Type/Catalog/Pages 2 0 R>>",
            b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]/Contents 4 0 R>>",
            stream(b"20 20 100 50 re f"),
        ]
    )
    stored_page = materialize("document", decode_member("document", page, MEDIA).frames, [])
    files = {"image": picture(), "video": clip(), "document": page, "page": stored_page}
    in_child: dict[str, list[str]] = {}
    for trust in ({}, {"trusted": True}, {"isolated": True}):
        name = next(iter(trust), "default")
        with Decoder(MEDIA, **trust) as decoder:
            calls: list[str] = []
            call = decoder._sandbox.call
            monkeypatch.setattr(
                decoder._sandbox, "call", lambda *a, calls=calls, call=call: (calls.append(a[1]), call(*a))[1]
            )
            for what, data in files.items():
                kind = "document" if what == "page" else what
                found = decoder.member(kind, data)
                expected = decode_member(kind, data, MEDIA)
                np.testing.assert_array_equal(found.frames, expected.frames)
                assert found.times_s == expected.times_s
            in_child[name] = calls
    assert in_child == {
        "default": ["video", "document"],
        "trusted": [],
        "isolated": ["image", "video", "document", "document"],
    }


def test_a_trusted_dataset_needs_no_child(tmp_path, monkeypatch):
    reader = own_shard(tmp_path, {"p0.avi": clip()}, trusted=True)
    monkeypatch.setattr(decode.Sandbox, "_attempt", None)
    (good,) = reader.samples("pages", [0])
    assert isinstance(good, DecodedSample)


def test_trust_decides_no_result():
    data = {"root": "a", "trusted": True, "split": "train"}
    assert TRAIN.science({"data": data}) == {"data": {"split": "train"}}
    assert DataConfig(root="a").trusted is False
