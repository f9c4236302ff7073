"""An embedded corpus of pictures, pages, clips and texts, in the files of `rzen embed`, made without Ray."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from reportlab.pdfgen.canvas import Canvas

import rzen
from jobs.cli import main
from jobs.runtime.records import as_json
from pipelines.config import DataConfig, MediaConfig
from pipelines.feed.reader import Reader
from pipelines.samples import DecodedSample, Input, Media, MediaKind, Members, Sample
from pipelines.shards.index import with_hashes
from pipelines.shards.manifest import Manifest, SourceInfo, publish_manifest
from pipelines.shards.write import write_shard
from pipelines.storage.location import open_store
from rzen.embedding.corpus import MANIFEST
from tests.encoders import CONSTANT
from tests.inline import without_ray

MEDIA = MediaConfig(frames=4)
_MODALITIES = {"image": "image", "document": "page", "video": "video"}
_EXTENSIONS: dict[str, MediaKind] = {"png": "image", "pdf": "document", "mp4": "video"}


def picture(number: int) -> bytes:
    """A PNG of its own colors."""
    pixels = np.random.default_rng(number).integers(0, 256, (6, 9, 3), dtype=np.uint8).repeat(9, 0).repeat(9, 1)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def document(number: int) -> bytes:
    """A PDF of one page with circles of its own."""
    sink = io.BytesIO()
    canvas = Canvas(sink, pagesize=(200, 300), invariant=True)
    for x, y, radius in np.random.default_rng(number).integers(10, 190, (6, 3)).tolist():
        canvas.circle(x, y, radius / 4, fill=1)
    canvas.save()
    return sink.getvalue()


def clip(number: int) -> bytes:
    """An MP4 of 8 frames of its own colors."""
    sink = io.BytesIO()
    frames = np.random.default_rng(number).integers(0, 256, (8, 6, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    with av.open(sink, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return sink.getvalue()


def scenes(colors: Sequence[tuple[int, int, int]], scene_s: float, form: str = "mp4", codec: str = "libx264") -> bytes:
    """A video of one color after the other, each shown for a time, at ten frames a second."""
    sink = io.BytesIO()
    with av.open(sink, "w", format=form) as container:
        stream = container.add_stream(codec, rate=10, options=CONSTANT.get(codec, {}))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for color in colors:
            frame = np.full((48, 64, 3), color, np.uint8)
            for _ in range(round(10 * scene_s)):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return sink.getvalue()


def damaged(data: bytes, start_s: float, end_s: float) -> bytes:
    """A video of which nothing that is shown in a range can be decoded, if every frame is a key frame."""
    changed = bytearray(data)
    with av.open(io.BytesIO(data)) as container:
        for packet in container.demux(video=0):
            if packet.pts is not None and start_s <= float(packet.pts * packet.time_base) < end_s:
                start = data.find(bytes(packet), packet.pos)
                changed[start + 2 : start + packet.size] = bytes(packet.size - 2)  # its header stays
    return bytes(changed)


def publish_mixed(root: Path, count: int) -> dict[str, bytes]:
    """Write the split `train` with `count` targets of each modality. Return origin -> file."""
    makers = {"png": picture, "pdf": document, "mp4": clip}
    samples: list[tuple[Sample, Members]] = []
    files: dict[str, bytes] = {}
    for extension, make in makers.items():
        for number in range(count):
            files[f"{number}.{extension}"] = make(number)
            medium = Media(_EXTENSIONS[extension], f"p0.{extension}")
            samples.append(_sample(len(samples), Input(media=(medium,)), f"{number}.{extension}", files))
    samples += [_sample(len(samples) + n, Input(f"some text, number {n}"), f"t.jsonl:{n}", {}) for n in range(count)]
    path = f"train/mixed/{count}.tar"
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    shard = replace(write_shard(root / path, samples), path=path)
    publish_manifest(
        open_store(str(root)), Manifest("train", {"mixed": SourceInfo("text_image", len(samples), (shard,))})
    )
    return files


def _sample(number: int, positive: Input, origin: str, files: dict[str, bytes]) -> tuple[Sample, Members]:
    members = {medium.member: files[origin] for medium in positive.media}
    target_instruction = "Understand the content of the provided image." if positive.media else ""
    sample = Sample(
        f"{number:08}",
        "mixed",
        "text_image",
        Input(f"caption {number}"),
        positive,
        instruction="Find it.",
        target_instruction=target_instruction,
        origin=origin,
    )
    return with_hashes(sample, members), members


def embed_corpus(model: rzen.Embedder, data: DataConfig, out: Path, **changes: Any) -> None:
    """Write the vectors of all targets of a dataset. `changes` replace parts of `vectors.json`."""
    media = data.media.for_model(model.processor.visual_pixels)
    reader = Reader(data.model_copy(update={"media": media}))
    size = reader.sizes()["mixed"]
    samples = [some for some in reader.samples("mixed", range(size)) if isinstance(some, DecodedSample)]
    vectors = model.encode([some.positive for some in samples])
    rows = [
        {
            "split": "train",
            "source": "mixed",
            "index": index,
            "modality": _MODALITIES[some.sample.positive.media[0].kind] if some.sample.positive.media else "text",
            "title": some.sample.query.text,
            "origin": some.sample.origin,
            "target_sha256": some.sample.target_sha256,
            "vector": vector,
        }
        for index, (some, vector) in enumerate(zip(samples, vectors, strict=True))
    ]
    (out / "parts").mkdir(parents=True, exist_ok=True)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    (out / "parts/a.parquet").write_bytes(sink.getvalue())
    made_by = model.made_by
    content = {
        "parts": ["parts/a.parquet"],
        "num_vectors": len(rows),
        "model": str(model.base),
        "config": "c",
        "made_by": {**made_by, "identity": made_by["identity"].model_dump(mode="json")},
        "dtype": "float32",
        "data": data.model_dump(mode="json", exclude={"trusted"}),
        "fingerprints": {"train": reader.fingerprint},
    }
    content |= changes
    (out / MANIFEST).write_bytes(as_json({key: value for key, value in content.items() if value is not None}))


def embed_folder(model: Path, media: Path, out: Path, *options: str) -> None:
    """Write the vectors of a folder of files with `rzen embed`, without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        assert main(["embed", str(model), str(media), str(out), "--set", "data.media.frames=4", *options]) == 0


def manifest_of(out: Path) -> dict[str, Any]:
    """Return the content of `vectors.json`."""
    content: dict[str, Any] = json.loads((out / MANIFEST).read_text())
    return content
