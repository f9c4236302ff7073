"""Datasets with planted duplicates, published without Ray, and their features."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.config import DataConfig, MediaConfig
from pipelines.curate.features import (
    FAMILIES,
    FeatureSettings,
    Inputs,
    ShardInputs,
    missing_features,
    shard_inputs,
    write_features,
)
from pipelines.curate.load import load_samples
from pipelines.curate.pictures import GRID_BYTES
from pipelines.curate.samples import Samples
from pipelines.curate.texts import NUM_PERMUTATIONS
from pipelines.samples import Input, Media, MediaKind, Members, Sample, Split
from pipelines.shards.duplicates import with_duplicates
from pipelines.shards.index import with_hashes
from pipelines.shards.manifest import Manifest, SourceInfo, publish_manifest
from pipelines.storage.location import open_store
from pipelines.synthetic.scenes import all_scenes, draw_scene
from tests.data import store_shard

PER_SHARD = 50
SETTINGS = FeatureSettings.of(MediaConfig(), ngram_words=8, min_words=4, languages=True)
KINDS: dict[str, MediaKind] = {"pages": "document", "clips": "video"}
"""Source -> what its media are. Those of other sources are images."""
Pair = tuple[str, bytes | str]
"""Query text, and target: the bytes of a medium, or a text."""


def encoded(image: Image.Image, format: str = "JPEG", quality: int = 90) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format, quality=quality)
    return sink.getvalue()


def scenes(count: int, seed: int = 0) -> list[tuple[str, Image.Image]]:
    """Captions and pictures of different scenes."""
    chosen = Random(seed).sample(all_scenes(), count)
    return [(scene.wordings()[0], draw_scene(scene, 96, Random(f"{seed} {n}"))) for n, scene in enumerate(chosen)]


def cropped(image: Image.Image, fraction: float) -> Image.Image:
    width, height = (round(side * fraction / 2) for side in image.size)
    return image.crop((width, height, image.width - width, image.height - height))


CHANGES: Sequence[Callable[[Image.Image], bytes]] = (
    lambda image: encoded(image, quality=40),
    lambda image: encoded(image, "WEBP", quality=50),
    lambda image: encoded(image.resize((60, 60))),
    lambda image: encoded(image.resize((150, 150), Image.Resampling.BICUBIC), "PNG"),
    lambda image: encoded(cropped(image, 0.04)),
)


def edited(text: str, rng: Random, num_letters: int = 1) -> str:
    """The text with another case, more spaces and some changed letters."""
    letters = list(text)
    for place in rng.sample(range(len(text)), num_letters):
        letters[place] = rng.choice("abcdefgh")
    return "".join(letters).upper().replace(" ", "  ")


def to_sample(source: str, number: int, pair: Pair) -> tuple[Sample, Members]:
    text, target = pair
    members = {} if isinstance(target, str) else {"p0.bin": target}
    kind = KINDS.get(source, "image")
    positive = Input(target) if isinstance(target, str) else Input("", (Media(kind, "p0.bin"),))
    sample = Sample(f"{number:06d}", source, source, Input(text), positive)
    return with_hashes(sample, members), members


def publish(folder: Path, sources: Mapping[str, Sequence[Pair]], split: Split = "train") -> list[ShardInputs]:
    store = open_store(str(folder / "data"))
    store.ensure_bucket()
    infos = {}
    for source, pairs in sources.items():
        samples = [to_sample(source, number, pair) for number, pair in enumerate(pairs)]
        parts = [samples[start : start + PER_SHARD] for start in range(0, len(samples), PER_SHARD)]
        shards = tuple(store_shard(store, split, source, number, part) for number, part in enumerate(parts))
        infos[source] = SourceInfo(source, len(samples), shards)
    publish_manifest(store, with_duplicates(store, Manifest(split, infos)))
    return shard_inputs(DataConfig(root=str(folder / "data"), split=split))  # type: ignore[arg-type]


def featured(folder: Path, inputs: Sequence[Inputs]) -> None:
    cache = open_store(str(folder / "cache"))
    cache.ensure_bucket()
    for work in missing_features(inputs, FAMILIES, SETTINGS, cache):
        write_features(work, SETTINGS, cache)
    assert not missing_features(inputs, FAMILIES, SETTINGS, cache)


def loaded(folder: Path, **sources: Sequence[Pair]) -> Samples:
    inputs = publish(folder, sources)
    featured(folder, inputs)
    return load_samples(inputs, FAMILIES, SETTINGS, open_store(str(folder / "cache")))


def random_features(num_inputs: int, seed: int) -> tuple[pa.Table, pa.Table]:
    """Features of texts and of media as the cache has them, of a random picture and a text of 40 words for each."""
    rng = np.random.default_rng(seed)

    def fixed(width: int) -> pa.Array:
        return pa.array([row.tobytes() for row in rng.integers(0, 256, (num_inputs, width), np.uint8)])

    numbers = rng.integers(0, 1 << 62, (num_inputs, 34), np.uint64)
    texts = {
        "key": [f"{seed}-{n}" for n in range(num_inputs)],
        "content": fixed(16).cast(pa.binary(16)),
        "graded": [False] * num_inputs,
        "num_media": pa.array(np.ones(num_inputs, np.int32)),
        "text": [" ".join(map(str, row)) for row in (numbers % 100_000).tolist()],
        "num_chars": pa.array(np.full(num_inputs, 200, np.int32)),
        "min_hash": fixed(4 * NUM_PERMUTATIONS).cast(pa.binary(4 * NUM_PERMUTATIONS)),
        "ngrams": pa.array(list(numbers), pa.list_(pa.uint64())),
        "language": [""] * num_inputs,
        "confidence": pa.array(np.zeros(num_inputs, np.float32)),
    }
    media = {
        "kinds": ["i"] * num_inputs,
        "content": pa.array(numbers[:, 0]),
        "width": pa.array(np.full(num_inputs, 300, np.int32)),
        "height": pa.array(np.full(num_inputs, 200, np.int32)),
        "hashes": pa.array(list(numbers[:, 1:2]), pa.list_(pa.uint64())),
        "grids": fixed(GRID_BYTES),
        "reason": [""] * num_inputs,
    }
    return pa.table(texts), pa.table(media)


def anonymous_mb() -> float:
    """Memory of this process that is not of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3
