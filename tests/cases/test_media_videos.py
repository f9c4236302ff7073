"""Kinds of videos that players show and a plain decoder gets wrong. Frame i of a clip is grey `first + 8 * i`."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.media.containers import is_whole
from pipelines.media.video_pixels import to_square
from pipelines.media.videos import decode_video
from tests.cases.measure_media import FILES
from tests.encoders import scheduling_kept

EVERY = MediaConfig(frames=100)
CODECS = {"mpegts": "libx264", "mpeg": "mpeg2video", "matroska": "libx264", "flv": "flv1", "asf": "wmv2"}


def clip(
    form: str, first: int = 16, num_frames: int = 8, *, noise: bool = False, bframes: int = 0, **fields: Fraction
) -> bytes:
    """25 frames a second. Fields of the stream, such as `sample_aspect_ratio`, can be set."""
    buffer = io.BytesIO()
    with scheduling_kept(), av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(CODECS[form], rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = 64, 48, "yuv420p", 1
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = num_frames, bframes
        for name, value in fields.items():
            setattr(stream.codec_context, name, value)
        for i in range(num_frames):
            pixels = np.full((48, 64, 3), first + 8 * i, np.uint8)
            if noise:
                pixels = np.random.default_rng(i).integers(0, 256, pixels.shape, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    return buffer.getvalue()


def greys(frames: np.ndarray, step: int = 8) -> list[int]:
    return [step * round(float(frame.mean()) / step) for frame in frames]


@pytest.mark.parametrize("form", ["mpegts", "mpeg"])
@pytest.mark.parametrize("bframes", [0, 2])
def test_joined_clips_are_shown_one_after_the_other(form: str, bframes: int) -> None:
    """The clock starts again at each join, as in downloads of HTTP live streams."""
    one, other = clip(form, 16, bframes=bframes), clip(form, 128, bframes=bframes)
    frames, times_s = decode_video(one + other + one, EVERY)
    assert greys(frames) == [*range(16, 80, 8), *range(128, 192, 8), *range(16, 80, 8)]
    assert times_s == pytest.approx(np.arange(24) / 25)
    few, few_s = decode_video(one + other + one, MediaConfig(frames=4))
    assert greys(few) == [16, 72, 184, 72]
    assert few_s == pytest.approx([0, 7 / 25, 15 / 25, 23 / 25])


def test_two_joined_matroska_files_are_shown_whole() -> None:
    frames, times_s = decode_video(clip("matroska") + clip("matroska", 128), EVERY)
    assert greys(frames) == [*range(16, 80, 8), *range(128, 192, 8)]
    assert times_s == pytest.approx(np.arange(16) / 25, abs=0.001)


def test_the_length_of_a_joined_video_is_that_of_its_pictures() -> None:
    data = (FILES / "hls_clock_jumps_two_hours.ts").read_bytes()
    assert len(decode_video(data, MediaConfig(max_video_s=0.64))[1]) == 8
    with pytest.raises(BadMedia, match="too_long_video"):
        decode_video(data, MediaConfig(max_video_s=0.5))
    with pytest.raises(BadMedia, match="too_many_frames"):
        decode_video(data, MediaConfig(max_video_frames=15))


@pytest.mark.parametrize(
    ("name", "expected"), [("vfr_last_frame_held.mp4", [40, 200]), ("vfr_slides_last_held.mp4", [40, 90, 220])]
)
def test_the_last_picture_is_shown_as_long_as_its_packet_says(name: str, expected: list[int]) -> None:
    """Values of `ffmpeg -vf fps=1:round=up`, version 5.1.9."""
    frames, _ = decode_video((FILES / name).read_bytes(), MediaConfig(fps=1.0))
    assert greys(frames, 10) == expected


@pytest.mark.parametrize("form", ["matroska", "flv"])
def test_the_last_picture_is_held_until_the_end_that_the_container_declares(form: str) -> None:
    buffer = io.BytesIO()
    with av.open(FILES / "vfr_last_frame_held.mp4") as source, av.open(buffer, "w", format=form) as sink:
        stream = sink.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                sink.mux(packet)
    assert is_whole(buffer.getvalue())
    assert greys(decode_video(buffer.getvalue(), MediaConfig(fps=1.0))[0], 10) == [40, 200]


@pytest.mark.parametrize("form", ["flv", "asf", "matroska"])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 20])
def test_short_clips_are_whole_and_their_parts_are_not(form: str, num_frames: int) -> None:
    data = clip(form, num_frames=num_frames)
    assert is_whole(data)
    assert greys(decode_video(data, EVERY)[0]) == list(range(16, 16 + 8 * num_frames, 8))
    assert not any(is_whole(data[:end]) for end in range(0, len(data), 101))


@pytest.mark.parametrize(("form", "kept"), [("asf", 0.3), ("asf", 0.6), ("flv", 0.3), ("flv", 0.6)])
def test_a_cut_file_is_refused(form: str, kept: float) -> None:
    data = clip(form, num_frames=25, noise=True)
    with pytest.raises(BadMedia, match=r"truncated_video|corrupt_video"):
        decode_video(data[: int(len(data) * kept)], EVERY)


@pytest.mark.parametrize(
    ("aspect", "size"), [(Fraction(64, 45), (48, 91)), (Fraction(8, 9), (54, 64)), (Fraction(1), (48, 64))]
)
@pytest.mark.parametrize("form", ["mpegts", "matroska"])
def test_pixels_become_square(form: str, aspect: Fraction, size: tuple[int, int]) -> None:
    data = clip(form, sample_aspect_ratio=aspect)
    assert decode_video(data, EVERY)[0].shape == (8, *size, 3)


def test_pixels_that_are_too_wide_are_refused_before_they_are_scaled() -> None:
    with pytest.raises(BadMedia, match="too_many_pixels"):
        decode_video(clip("matroska", sample_aspect_ratio=Fraction(3)), MediaConfig(max_pixels=2 * 64 * 48))
    frames = np.zeros((1, 48, 64, 3), np.uint8)
    for aspect in (Fraction(200), Fraction(1, 1000), Fraction(1, 10**9)):
        with pytest.raises(BadMedia, match=r"extreme_aspect_ratio|too_many_pixels"):
            to_square(frames, aspect, EVERY)


@pytest.mark.parametrize(
    ("codec", "form", "pix_fmt"),
    [
        ("qtrle", "mov", "argb"),
        ("ffv1", "matroska", "yuva420p"),
        ("prores_ks", "mov", "yuva444p10le"),
        ("libvpx", "webm", "yuva420p"),
        ("libvpx-vp9", "webm", "yuva420p"),
    ],
)
def test_transparent_pixels_are_shown_on_white(codec: str, form: str, pix_fmt: str, tmp_path: Path) -> None:
    file = tmp_path / "clip"
    options = {"auto-alt-ref": "0"} if codec == "libvpx" else {}
    with scheduling_kept(), av.open(str(file), "w", format=form) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = 64, 48, pix_fmt, 1
        pixels = np.zeros((48, 64, 4), np.uint8)
        pixels[:, 32:] = (0, 0, 255, 255)
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format=pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames, _ = decode_video(file.read_bytes(), EVERY)
    assert np.abs(frames[:, 24, 8].astype(int) - 255).max() <= 2
    assert np.abs(frames[:, 24, -8].astype(int) - (0, 0, 255)).max() <= 4
