"""Frames and page images instead of videos and PDFs: training gets the same pixels."""

from pathlib import Path

import numpy as np
import pymupdf
import pytest
from PIL import Image

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.ingest.members import load_sample
from pipelines.media.decode import decode_member, decode_sample
from pipelines.media.materialized import materialize
from pipelines.samples import FileRef, Input, Media, RawSample, Sample
from tests.unit.pipelines.test_media import video

CONFIG = MediaConfig(frames=5, page_pixels=90_000)


@pytest.fixture
def raw(tmp_path: Path) -> RawSample:
    """Return a query of an image and a text, and a target of a video, a page and an image."""
    (tmp_path / "clip.mp4").write_bytes(video(23, size=(96, 64)))
    with pymupdf.open() as pdf:
        for number in range(3):
            pdf.new_page(width=200, height=300).insert_text((20, 150), f"page {number}", fontsize=30)
        pdf.save(tmp_path / "paper.pdf")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    sample = Sample(
        key="1",
        source="s",
        task="t",
        query=Input("which?", (Media("image", "q0.png"),)),
        positive=Input("", (Media("video", "p0.mp4"), Media("document", "p1.pdf"), Media("image", "p2.png"))),
    )
    files = {"q0.png": "photo.png", "p0.mp4": "clip.mp4", "p2.png": "photo.png"}
    refs = {member: FileRef(str(tmp_path / name)) for member, name in files.items()}
    return RawSample(sample, refs | {"p1.pdf": FileRef(str(tmp_path / "paper.pdf"), page=1)})


def test_what_training_sees_stays_what_it_was(raw: RawSample) -> None:
    as_files, as_pixels = (
        decode_sample(*load_sample(raw, CONFIG, materialized=materialized), CONFIG, instructions=False)
        for materialized in (False, True)
    )
    frames, page, image = as_files.positive.visuals
    stored_frames, stored_page, stored_image = as_pixels.positive.visuals
    assert [visual.kind for visual in as_pixels.positive.visuals] == ["video", "document", "image"]
    assert stored_frames.frames.shape == frames.frames.shape == (5, 64, 96, 3)
    assert np.abs(stored_frames.frames.astype(int) - frames.frames).mean() < 3  # JPEG
    assert np.array_equal(stored_page.frames, page.frames)
    assert np.array_equal(stored_image.frames, image.frames)
    assert as_pixels.query.text == "which?"


def test_members_are_named_after_what_they_are(raw: RawSample) -> None:
    sample, members = load_sample(raw, CONFIG, materialized=True)
    assert sorted(members) == ["p0.avi", "p1.webp", "p2.png", "q0.png"]
    assert [media.member for media in sample.positive.media] == ["p0.avi", "p1.webp", "p2.png"]
    assert members["p2.png"] == Path(raw.files["p2.png"].path).read_bytes()
    as_files, _ = load_sample(raw, CONFIG)
    assert [media.member for media in as_files.positive.media] == ["p0.mp4", "p1.pdf", "p2.png"]
    assert sample.target_sha256 != as_files.target_sha256


def test_equal_pixels_give_equal_bytes(raw: RawSample) -> None:
    assert load_sample(raw, CONFIG, materialized=True) == load_sample(raw, CONFIG, materialized=True)


@pytest.mark.parametrize("num_frames", [1, 2, 8])
def test_every_frame_comes_back_in_order(num_frames: int) -> None:
    frames = np.zeros((num_frames, 48, 64, 3), np.uint8)
    frames[:] = (20 + 25 * np.arange(num_frames, dtype=np.uint8))[:, None, None, None]
    config = MediaConfig(frames=8)
    times_s = [1.5 + 7.3 * number for number in range(num_frames)]
    found = decode_member("video", materialize("video", frames, times_s), config)
    assert found.frames.shape == frames.shape
    assert np.abs(found.frames.astype(int) - frames).max() <= 3
    assert found.times_s == pytest.approx([7.3 * number for number in range(num_frames)], abs=1e-3)


def test_colours_survive() -> None:
    """The range and the matrix of JPEG are not those of broadcast video."""
    frames = np.zeros((2, 32, 96, 3), np.uint8)
    for third, colour in enumerate([(255, 0, 0), (0, 255, 0), (255, 255, 255)]):
        frames[:, :, 32 * third : 32 * third + 32] = colour
    found = decode_member("video", materialize("video", frames, [0.0, 1.0]), MediaConfig(frames=2)).frames
    for third in range(3):
        centre = (slice(None), slice(8, 24), slice(32 * third + 8, 32 * third + 24))
        assert np.abs(found[centre].astype(int) - frames[centre]).max() <= 8


def test_a_page_too_long_for_the_format_is_reported() -> None:
    with pytest.raises(BadMedia, match="extreme_aspect_ratio"):
        materialize("document", np.zeros((1, 17_000, 100, 3), np.uint8), [])
