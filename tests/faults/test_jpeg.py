"""The check of a JPEG by its first block never accepts a file that a whole decode refuses."""

import io
import random
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.media import jpeg
from pipelines.media.images import decode_image
from pipelines.media.jpeg import first_block

pytestmark = pytest.mark.filterwarnings("ignore:Tag data:UserWarning", "ignore:Corrupt EXIF:UserWarning")
CONFIG = MediaConfig(max_pixels=4_000_000)
_EXIF = Image.Exif()
_EXIF[0x0112] = 6  # turned
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fully sampled": {"subsampling": 0, "quality": 95},
    "half as wide": {"subsampling": 1},
    "half": {"subsampling": 2, "quality": 30},
    "optimized": {"optimize": True},
    "restarts": {"restart_marker_blocks": 2},
    "restarts of rows": {"restart_marker_rows": 1, "subsampling": 0},
    "turned": {"exif": _EXIF},
    "profile": {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()},
    "comment": {"comment": b"\xff\xd9 \xff\xda", "dpi": (72, 72)},
}
OTHERS = {
    "progressive": {"progressive": True},
    "progressive grey": {"progressive": True, "mode": "L"},
    "CMYK": {"mode": "CMYK"},
}


def encoded(seed: int, form: dict[str, Any], size: tuple[int, int] = (53, 41)) -> bytes:
    settings = dict(form)
    mode = settings.pop("mode", "RGB")
    coarse = np.random.default_rng(seed).integers(0, 255, (7, 9, 3), np.uint8)
    picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)
    sink = io.BytesIO()
    picture.save(sink, "JPEG", **settings)
    return sink.getvalue()


def reason(data: bytes) -> str:
    """Why a decode refuses a file, and "" for a good one."""
    try:
        decode_image(data, CONFIG)
    except BadMedia as bad:
        return bad.reason
    return ""


def damaged(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """The file with one kind of damage after another, each at a place of its own."""
    place = partial(rng.randrange, 2, len(data))
    yield data[: place()]
    yield data[: place()] + b"\xff\xd9"
    for _ in range(3):
        spoilt = bytearray(data)
        for _ in range(rng.choice((1, 1, 3, 20))):
            spoilt[place()] = rng.choice((0, 0xFF, rng.randrange(256)))
        yield bytes(spoilt)
    spoilt = bytearray(data)
    spoilt[rng.randrange(2, min(len(data), 640))] = rng.randrange(256)  # in the headers
    yield bytes(spoilt)
    start, length = place(), rng.randrange(1, 60)
    yield data[:start] + data[start + length :]
    marker = bytes((0xFF, rng.choice((0xD0, 0xD3, 0xD8, 0xD9, 0xDA, 0xC4, 0xDB, 0xFF, rng.randrange(256)))))
    yield data[:start] + marker + data[start:]
    yield data[:start] + rng.randbytes(length) + data[start:]
    yield data[:start] + data[place() :]


def accepted_and_bad(rounds: int, seed: int = 0) -> tuple[Counter[str], list[bytes]]:
    """Damage files of all forms. Return counts, and files that the first block accepts and a whole decode refuses."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    wrong = []
    files = [encoded(number, form) for number, form in enumerate((FORMS | OTHERS).values())]
    for data in (spoilt for _ in range(rounds) for whole in files for spoilt in damaged(whole, rng)):
        block = first_block(data, CONFIG)
        is_sure = block is not None and not reason(block)
        refused = bool(reason(data))
        counts[f"{'sure' if is_sure else 'unsure'}, {'bad' if refused else 'good'}"] += 1
        if is_sure and refused:
            wrong.append(data)
    return counts, wrong


def test_no_damaged_file_passes_by_its_first_block_that_a_decode_refuses() -> None:
    counts, wrong = accepted_and_bad(rounds=16)
    assert wrong == []
    assert counts["unsure, bad"] > 500
    assert counts["sure, good"] > 300


def test_a_check_that_does_not_look_for_the_end_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        def __init__(self, place: int) -> None:
            self.place = place

        def start(self) -> int:
            return self.place

        def __getitem__(self, number: int) -> bytes:
            return b"\xff\xd9"

    class Careless:
        def search(self, data: bytes, start: int) -> Found:
            return Found(len(data))

    monkeypatch.setattr(jpeg, "_MARKER", Careless())
    assert accepted_and_bad(rounds=2)[1]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("size", [(53, 41), (1, 1), (8, 200), (640, 480)])
def test_good_files_are_known_by_a_block(name: str, size: tuple[int, int]) -> None:
    for mode in ("RGB", "L"):
        data = encoded(3, FORMS[name] | {"mode": mode}, size)
        block = first_block(data, CONFIG)
        assert block is not None
        assert max(decode_image(block, CONFIG).shape[:2]) <= 16
        assert first_block(data + b"anything", CONFIG) == block


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_several_scans_and_four_colors_are_decoded_as_a_whole(name: str) -> None:
    assert first_block(encoded(3, OTHERS[name]), CONFIG) is None


@pytest.mark.parametrize(
    "limits", [{"max_pixels": 2000}, {"max_aspect_ratio": 1.2}, {"max_memory_bytes": 64 * 53 * 41 - 1}]
)
def test_files_beyond_a_limit_are_decoded_as_a_whole(limits: dict[str, Any]) -> None:
    assert first_block(encoded(3, {}), CONFIG.model_copy(update=limits)) is None
    assert first_block(encoded(3, {}), CONFIG) is not None


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\xff\xd8" + b"\xff\xe0\0\0" * 9]
)
def test_what_is_no_whole_jpeg_has_no_first_block(data: bytes) -> None:
    assert first_block(data, CONFIG) is None
