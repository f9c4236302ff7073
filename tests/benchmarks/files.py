"""Data sets for the benchmark of the feed: seeded files in real formats and of the sizes that one meets outside.

images   photo-like JPEGs of 30 to 100 KB, about 640 x 480 pixels
pages    one-page PDFs: two columns of text, a table, a chart, a figure
clips    H.264 MP4s of three seconds, from which 8 frames are taken
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pymupdf
from PIL import Image

from pipelines.samples import Input, Media, MediaKind, Members, Sample
from pipelines.shards.index import content_sha256
from pipelines.shards.manifest import Manifest, ShardInfo, SourceInfo, publish_manifest
from pipelines.shards.write import write_shard
from pipelines.storage.location import open_store
from pipelines.synthetic.clips import encode_clip

NUM_SHARDS = 8  # so that two workers get equally many
SETTINGS = "settings.json"

_GENERATION = 2  # raised whenever equal settings come to mean other files
_SIZES_PX = ((640, 480), (640, 427), (480, 640), (600, 600), (500, 375))
_CLIP_PX = (320, 240)
_CLIP_FRAMES = 24
_WORDS = (
    "the of and to in that it with as for was on are by his they at one this from measure harbour season"
    " transport northern committee average increase material surface records instrument annual temperature quarter"
)


def photo(rng: np.random.Generator, size_px: tuple[int, int]) -> Image.Image:
    """Clouds of colour at many scales, some shapes with edges, grain: what a JPEG of a photograph costs to decode."""
    width, height = size_px
    canvas = np.full((height, width, 3), 110.0, np.float32)
    for cells, strength in ((3, 60), (9, 34), (28, 18), (90, 9)):
        noise = rng.standard_normal((cells * height // width + 2, cells, 3)).astype(np.float32)
        noise = 0.7 * noise.mean(axis=2, keepdims=True) * 3**0.5 + 0.4 * noise  # mostly light, some colour
        layers = [
            Image.fromarray(np.ascontiguousarray(noise[..., channel])).resize(size_px, Image.Resampling.BICUBIC)
            for channel in range(3)
        ]
        canvas += strength * np.stack([np.asarray(layer) for layer in layers], axis=-1)
    for _ in range(8):
        left, top = int(rng.integers(width)), int(rng.integers(height))
        patch = canvas[top : top + int(rng.integers(20, 200)), left : left + int(rng.integers(20, 200))]
        patch *= 0.5
        patch += rng.uniform(0, 128, 3)
    canvas += rng.standard_normal((height, width, 1), np.float32) * 5
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def jpeg(number: int, seed: int) -> bytes:
    """A photo of one of five sizes."""
    rng = np.random.default_rng([seed, 0, number])
    return _jpeg_bytes(photo(rng, _SIZES_PX[number % len(_SIZES_PX)]))


def _jpeg_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def pdf(number: int, seed: int) -> bytes:
    """An A4 page."""
    rng = random.Random(f"{seed} page {number}")
    with pymupdf.open() as document:
        page = document.new_page(width=595, height=842)
        page.insert_text((50, 70), _sentence(rng, 5).title(), fontsize=20, fontname="hebo")
        for left in (50, 307):
            text = "\n\n".join(_sentence(rng, 56) for _ in range(4))
            unused = page.insert_textbox((left, 95, left + 238, 505), text, fontsize=8.5, fontname="tiro", align=3)
            assert unused >= 0, "a text that does not fit is left out"
        figure = photo(np.random.default_rng([seed, 1, number]), (360, 240))
        page.insert_image(pymupdf.Rect(50, 515, 288, 674), stream=_jpeg_bytes(figure))
        _draw_chart(page, rng)
        _draw_table(page, rng)
        data: bytes = document.tobytes(deflate=True, no_new_id=True)
    return data


def _sentence(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(_WORDS.split(), k=num_words)).capitalize() + "."


def _draw_chart(page: Any, rng: random.Random) -> None:
    shape = page.new_shape()
    for bar in range(24):
        top = 674 - rng.uniform(20, 150)
        shape.draw_rect(pymupdf.Rect(307 + bar * 10, top, 314 + bar * 10, 674))
        shape.finish(fill=[rng.random() for _ in range(3)], color=(0, 0, 0), width=0.4)
    shape.commit()


def _draw_table(page: Any, rng: random.Random) -> None:
    shape = page.new_shape()
    for row in range(10):
        for column in range(8):
            cell = pymupdf.Rect(50 + column * 62, 690 + row * 12, 112 + column * 62, 702 + row * 12)
            shape.draw_rect(cell)
            shape.insert_text((cell.x0 + 4, cell.y1 - 3), f"{rng.uniform(0, 9999):,.1f}", fontsize=7)
    shape.finish(color=(0.4, 0.4, 0.4), width=0.3)
    shape.commit()


def mp4(number: int, seed: int) -> bytes:
    """A camera that pans over a photo."""
    rng = np.random.default_rng([seed, 2, number])
    width, height = _CLIP_PX
    scene = photo(rng, (width + 4 * _CLIP_FRAMES, height + 2 * _CLIP_FRAMES))
    across, down = rng.integers(1, 5), rng.integers(0, 3)
    corners = [(int(across) * i, int(down) * i) for i in range(_CLIP_FRAMES)]
    return encode_clip([scene.crop((x, y, x + width, y + height)) for x, y in corners])


KINDS: dict[str, tuple[MediaKind, str, Callable[[int, int], bytes]]] = {
    "images": ("image", "p0.jpg", jpeg),
    "pages": ("document", "p0.pdf", pdf),
    "clips": ("video", "p0.mp4", mp4),
}


def make(root: Path, kind: str, num_samples: int, seed: int) -> str:
    """Publishes the split `train` of one kind below `root`, unless it is there; returns what the files weigh."""
    settings = json.dumps([_GENERATION, kind, num_samples, seed])
    marker = root / SETTINGS
    if not marker.exists() or marker.read_text() != settings:
        (root / "train" / kind).mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor() as pool:
            shards = tuple(
                pool.map(partial(_write_shard, root, kind, num_samples // NUM_SHARDS, seed), range(NUM_SHARDS))
            )
        store = open_store(str(root))
        publish_manifest(store, Manifest("train", {kind: SourceInfo(f"text_{kind}", num_samples, shards)}))
        marker.write_text(settings)
    return _weights(root, kind)


def _write_shard(root: Path, kind: str, num_samples: int, seed: int, ordinal: int) -> ShardInfo:
    path = f"train/{kind}/{kind}-{ordinal:06d}.tar"
    numbers = range(ordinal * num_samples, (ordinal + 1) * num_samples)
    return replace(write_shard(root / path, _samples(kind, numbers, seed)), path=path)


def _samples(kind: str, numbers: range, seed: int) -> Iterator[tuple[Sample, Members]]:
    medium, member, make_bytes = KINDS[kind]
    for number in numbers:
        caption = _sentence(random.Random(f"{seed} caption {number}"), 12)
        members = {member: make_bytes(number, seed)}
        query, positive = Input(caption), Input("", (Media(medium, member),))
        yield (
            Sample(
                key=f"{number:08d}",
                source=kind,
                task=f"text_{kind}",
                query=query,
                positive=positive,
                instruction="Find what is described.",
                target_sha256=content_sha256(positive, members),
                query_sha256=content_sha256(query, members),
                origin=f"{number}.{member}",
            ),
            members,
        )


def _weights(root: Path, kind: str) -> str:
    """Smallest, median and largest file, from the headers of the first shard."""
    import tarfile

    with tarfile.open(root / f"train/{kind}/{kind}-000000.tar") as tar:
        sizes = sorted(member.size for member in tar if not member.name.endswith(".json"))
    low, middle, high = (sizes[i] / 1000 for i in (0, len(sizes) // 2, -1))
    return f"{low:.0f} - {middle:.0f} - {high:.0f} KB"
