"""Files of many writers, against what independent tools see in them (`values.json`, written by `measure_media`)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.media.decode import Decoder
from pipelines.media.documents import extract_page, page_texts, render_page
from pipelines.media.files import KINDS
from pipelines.media.images import decode_image
from pipelines.media.videos import uniform_indices
from pipelines.sources.passages import choose_passages
from tests.cases.measure_media import FILES, IMAGE_GRID, VALUES, VIDEO_GRID, grid

EXPECTED: dict[str, dict[str, Any]] = json.loads(VALUES.read_text())["files"]
# Differences that are not faults: compression, other filters, anti-aliasing.
VIDEO_TOLERANCE, IMAGE_TOLERANCE, PAGE_TOLERANCE = 2, 2, 6
TOLERANCES = {
    "tiff_cielab.tif": 65,  # its green is outside of sRGB, and each library clips it differently
}


def files(kind: str) -> list[str]:
    return [name for name in EXPECTED if KINDS[Path(name).suffix] == kind]


@pytest.fixture(scope="module")
def decord() -> Iterator[Decoder]:
    with Decoder(MediaConfig(video_backend="decord")) as decoder:
        yield decoder


def frames_or_reason(decoder: Decoder, name: str) -> tuple[np.ndarray, tuple[float, ...]] | str:
    try:
        found = decoder.member("video", (FILES / name).read_bytes())
    except BadMedia as error:
        return error.reason
    return found.frames, found.times_s


def check_video(name: str, frames: np.ndarray, times_s: tuple[float, ...]) -> None:
    expected = EXPECTED[name]
    width, height = expected["size"]
    chosen = uniform_indices(len(expected["frames"]), 8)
    assert frames.shape == (len(chosen), height, width, 3)
    assert times_s == pytest.approx([expected["times_s"][i] for i in chosen], abs=0.002)
    for frame, i in zip(frames, chosen, strict=True):
        np.testing.assert_allclose(grid(frame, VIDEO_GRID), expected["frames"][i], atol=VIDEO_TOLERANCE)


def test_the_zoo_has_every_file() -> None:
    assert sorted(EXPECTED) == sorted(path.name for path in FILES.iterdir() if path.suffix.lower() in KINDS)


@pytest.mark.parametrize("name", files("image"))
def test_an_image_looks_as_imagemagick_shows_it(name: str) -> None:
    pixels = decode_image((FILES / name).read_bytes(), MediaConfig())
    width, height = EXPECTED[name]["size"]
    assert pixels.shape == (height, width, 3)
    tolerance = TOLERANCES.get(name, IMAGE_TOLERANCE)
    np.testing.assert_allclose(grid(pixels, IMAGE_GRID), EXPECTED[name]["grid"], atol=tolerance)


@pytest.mark.parametrize("name", files("video"))
def test_a_video_shows_the_frames_that_ffmpeg_shows(name: str) -> None:
    found = frames_or_reason(Decoder(MediaConfig()), name)
    if isinstance(found, str):
        assert found == EXPECTED[name]["rejected"]
    else:
        check_video(name, *found)


@pytest.mark.parametrize("name", files("video"))
def test_decord_shows_the_same_frames_or_refuses_the_file(name: str, decord: Decoder) -> None:
    found = frames_or_reason(decord, name)
    if isinstance(found, str):
        # decord needs a duration in the header.
        reasons = ("corrupt_video",) if name == "no_duration.mkv" else ("decord_unsupported", "no_video_stream")
        assert found in reasons
    else:
        check_video(name, *found)


# Its crop box is larger than the page. Poppler cuts it at the page on two sides only.
@pytest.mark.parametrize("name", sorted(set(files("document")) - {"pdf_cropbox_outside.pdf"}))
@pytest.mark.parametrize("backend", ["pymupdf", "pypdfium2"])
def test_a_page_looks_as_poppler_shows_it_also_without_its_file(name: str, backend: Any) -> None:
    data, config = (FILES / name).read_bytes(), MediaConfig(document_backend=backend)
    width, height = EXPECTED[name]["size"]
    single = extract_page(data, 0, config)
    assert extract_page(data, 0, config) == single
    for pixels in (render_page(data, 0, config), render_page(single, 0, config)):
        assert pixels.shape[1] / pixels.shape[0] == pytest.approx(width / height, rel=0.01)
        np.testing.assert_allclose(grid(pixels, IMAGE_GRID), EXPECTED[name]["grid"], atol=PAGE_TOLERANCE)


@pytest.mark.parametrize("name", [name for name in files("document") if len(EXPECTED[name]["text"].split()) > 3])
@pytest.mark.parametrize("backend", ["pymupdf", "pypdfium2"])
def test_the_query_of_a_page_is_the_text_that_poppler_reads(name: str, backend: Any) -> None:
    texts = page_texts((FILES / name).read_bytes(), MediaConfig(document_backend=backend))
    [passage] = choose_passages(texts)
    assert len(passage.split()) >= 5
    assert passage in EXPECTED[name]["text"]
