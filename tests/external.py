"""Shards as other people write them: webdataset's ShardWriter, the layout of img2dataset, unshuffled."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

TOPICS = ("old wooden boat on a lake", "racing car at the finish line", "sleeping cat under the table")
PER_TOPIC = 24


def picture(number: int) -> bytes:
    """A small JPEG that differs from every other."""
    pixels = np.random.default_rng(number).integers(0, 255, (24, 32, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG")
    return sink.getvalue()


def img2dataset_samples(count: int) -> Iterator[dict[str, Any]]:
    """Samples topic by topic, as a crawler finds them: nothing is shuffled."""
    for number in range(count):
        caption = f"{TOPICS[number // PER_TOPIC % len(TOPICS)]} no{number}"
        facts = {"caption": caption, "url": f"https://example.org/{number}.jpg", "key": f"{number:09d}"}
        facts |= {"status": "success", "width": 32, "height": 24}
        yield {"__key__": f"{number:09d}", "jpg": picture(number), "txt": caption, "json": facts}


def write_img2dataset(folder: Path, count: int, per_shard: int) -> list[Path]:
    """Shards `00000.tar`, ... in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=per_shard, verbose=0) as writer:
        for sample in img2dataset_samples(count):
            writer.write(sample | {"json": json.dumps(sample["json"])})
    return sorted(folder.glob("*.tar"))
