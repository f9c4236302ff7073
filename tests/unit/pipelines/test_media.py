"""Decoders: which pixels come out of which bytes, and by which name bad bytes are refused."""

import io
import tempfile
import zlib
from bisect import bisect_right
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path

import av
import numpy as np
import pymupdf
import pytest
from av.stream import Disposition
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.media import documents
from pipelines.media.decode import Decoder, decode_member, decode_pixels, decode_sample
from pipelines.media.images import decode_image
from pipelines.media.videos import decode_video, sample_frames, uniform_indices
from pipelines.samples import Input, Media, Sample
from tests.encoders import scheduling_kept
from tests.faults import damaged_media

CONFIG = MediaConfig()
BACKENDS = [MediaConfig(document_backend="pymupdf"), MediaConfig(document_backend="pypdfium2")]


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def reason(function, *args) -> str:
    with pytest.raises(BadMedia) as caught:
        function(*args)
    return caught.value.reason


# --- images ---------------------------------------------------------------------------------------------------------


def test_image_is_height_width_rgb_uint8():
    pixels = decode_image(encoded(Image.new("RGB", (37, 23), (10, 20, 30)), "PNG"), CONFIG)
    assert pixels.shape == (23, 37, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert (pixels == (10, 20, 30)).all()


def test_exif_orientation_is_applied():
    stored = Image.new("RGB", (40, 20), "blue")
    stored.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown = stored turned clockwise
    pixels = decode_image(encoded(stored, "PNG", exif=exif), CONFIG)
    assert pixels.shape == (40, 20, 3)
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[-1, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF"])
def test_transparency_is_composited_on_white(form):
    image = Image.new("RGBA", (21, 13), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 10, 13))
    options = {"lossless": True} if form == "WEBP" else {}
    pixels = decode_image(encoded(image, form, **options), CONFIG)
    assert pixels[0, 0].tolist() == [0, 0, 0]
    assert pixels[0, -1].tolist() == [255, 255, 255]


def test_half_transparent_black_is_mid_grey():
    pixels = decode_image(encoded(Image.new("RGBA", (5, 3), (0, 0, 0, 128)), "PNG"), CONFIG)
    assert pixels[0, 0].tolist() == [127, 127, 127]


def test_16_bit_png_is_rescaled_and_not_saturated():
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    pixels = decode_image(encoded(Image.fromarray(values), "PNG"), CONFIG)
    assert pixels[0, :, 0].tolist() == [0, 1, 128, 255]
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_float_tiff_is_stretched_to_its_own_range():
    values = np.array([[-1.0, 0.0, 3.0]], np.float32)
    assert decode_image(encoded(Image.fromarray(values), "TIFF"), CONFIG)[0, :, 1].tolist() == [0, 64, 255]


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "lime", "blue")]
    pixels = decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), CONFIG)
    assert pixels.shape == (7, 9, 3)
    assert pixels[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("form", "target_pixels", "expected"),
    [("JPEG", 400 * 300, (300, 400, 3)), ("JPEG", 401 * 301, (600, 800, 3)), ("PNG", 10_000, (600, 800, 3))],
)
def test_draft_shrinks_only_a_jpeg_of_twice_the_target(form, target_pixels, expected):
    data = encoded(Image.new("RGB", (800, 600), "teal"), form)
    assert decode_image(data, CONFIG, target_pixels).shape == expected


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    chunk = (13).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk + (99).to_bytes(4, "big") + b"IDAT"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_decompression_bombs_are_refused_by_their_header(side):
    assert reason(decode_image, png_header(side, side), CONFIG) == "too_many_pixels"


@pytest.mark.parametrize(("size", "expected"), [((201, 1), "extreme_aspect_ratio"), ((1, 201), "extreme_aspect_ratio")])
def test_extreme_aspect_ratio_is_refused(size, expected):
    assert reason(decode_image, encoded(Image.new("RGB", size), "PNG"), CONFIG) == expected


def test_the_largest_allowed_aspect_ratio_is_accepted():
    assert decode_image(encoded(Image.new("RGB", (200, 1)), "PNG"), CONFIG).shape == (1, 200, 3)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.02, 0.6])
def test_truncated_images_are_corrupt(form, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), form)
    assert reason(decode_image, data[: max(12, int(len(data) * kept))], CONFIG) == "corrupt_image"


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"", "empty_file"), (b"<html></html>", "unsupported_format"), (b"\x00" * 64, "unsupported_format")],
)
def test_other_files_are_not_images(data, expected):
    assert reason(decode_image, data, CONFIG) == expected


# --- videos ---------------------------------------------------------------------------------------------------------


def video(num_frames: int, form="mp4", codec="libx264", size=(64, 48), gop=10, shift=0, **options) -> bytes:
    """Frame i is grey 8 * i + 8, with a red top left corner. 10 frames a second; `shift` delays or cuts the start."""
    # To a file: moving the index to the front (faststart) reopens it by name.
    with (
        scheduling_kept(),
        tempfile.NamedTemporaryFile() as file,
        av.open(file.name, "w", format=form, options=options.pop("container", {})) as container,
    ):
        stream = container.add_stream(codec, rate=10, options=options.pop("codec_options", {}))
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = gop
        stream.thread_count = 1
        if "rotation" in options:
            stream.set_display_rotation(**options["rotation"])
        packets = []
        for i in range(num_frames):
            pixels = np.full((size[1], size[0], 3), 8 * i + 8, np.uint8)
            pixels[:16, :16] = (255, 0, 0)
            packets += stream.encode(av.VideoFrame.from_ndarray(pixels))
        for packet in packets + stream.encode():
            ticks = round(shift / (10 * packet.time_base))
            packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
            container.mux(packet)
        container.close()
        return Path(file.name).read_bytes()


def frames_of(data: bytes, config: MediaConfig) -> np.ndarray:
    return decode_video(data, config)[0]


def shown(frames: np.ndarray) -> list[int]:
    """Frame numbers, read back from the greys."""
    return [round((int(frame[-8, -8, 1]) - 8) / 8) for frame in frames]


@given(st.integers(1, 100_000), st.integers(1, 128))
def test_sampling_is_increasing_inside_and_even(num_frames, num_wanted):
    indices = uniform_indices(num_frames, num_wanted).tolist()
    assert len(indices) == min(num_frames, num_wanted)
    assert indices[0] == 0
    assert indices[-1] == num_frames - 1 or num_wanted == 1
    steps = {b - a for a, b in pairwise(indices)}
    assert not steps or (min(steps) >= 1 and max(steps) - min(steps) <= 1)


def test_sampling_positions_are_those_of_the_benchmark():
    assert uniform_indices(23, 8).tolist() == [0, 3, 6, 9, 12, 15, 18, 22]
    assert uniform_indices(23, 8).tolist() == np.linspace(0, 22, 8).astype(int).tolist()


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=60),
    st.integers(1, 1200),
    st.integers(1, 64),
    st.integers(0, 99),
)
def test_sampling_by_rate_takes_what_is_shown_at_each_tick(gaps_ms, rate_per_minute, num_wanted, start_s):
    """Against a clock that asks at each tick which frame is on the screen."""
    starts_ms = [0, *accumulate(gaps_ms)]
    end_ms = starts_ms[-1] + gaps_ms[-1]
    on_screen = []
    tick_ms = Fraction(0)
    while tick_ms < end_ms:
        on_screen.append(bisect_right(starts_ms, tick_ms) - 1)
        tick_ms += Fraction(60_000, rate_per_minute)
    seen = sorted(set(on_screen))
    chosen = [seen[i] for i in uniform_indices(len(seen), num_wanted)]
    times_s = np.array(starts_ms) / 1000 + start_s
    config = MediaConfig(fps=rate_per_minute / 60, frames=num_wanted)
    assert sample_frames(times_s, config).tolist() == chosen


@pytest.mark.parametrize(
    ("fps", "frames", "expected"),
    [
        (None, 8, [0, 3, 6, 9, 12, 15, 18, 22]),
        (2.0, 8, [0, 5, 10, 15, 20]),
        (4.0, 64, [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]),
        (4.0, 4, [0, 7, 15, 22]),
        (1000.0, 64, list(range(23))),
        (0.1, 8, [0]),
        (0.5, 8, [0, 20]),
    ],
)
def test_sampling_of_23_frames_at_10_a_second(fps, frames, expected):
    config = MediaConfig(fps=fps, frames=frames)
    assert sample_frames(np.arange(23) / 10, config).tolist() == expected
    assert shown(frames_of(video(23), config)) == expected
    assert shown(frames_of(video(23, "mpegts", shift=37), config)) == expected
    assert shown(frames_of(video(23, "avi"), config)) == expected  # has no presentation times
    with Decoder(config.model_copy(update={"video_backend": "decord"})) as decoder:
        assert shown(decoder.member("video", video(23)).frames) == expected


def test_a_video_of_no_frames_has_none_to_sample():
    for fps in (None, 2.0):
        assert sample_frames(np.array([]), MediaConfig(fps=fps)).tolist() == []
        assert sample_frames(np.array([3.7]), MediaConfig(fps=fps)).tolist() == [0]


@pytest.mark.parametrize(
    ("form", "codec"),
    [
        ("mp4", "libx264"),
        ("mp4", "libsvtav1"),
        ("matroska", "libx264"),
        ("webm", "libvpx-vp9"),
        ("avi", "mpeg4"),
        ("avi", "libx264"),
        ("mpegts", "libx264"),
        ("mpegts", "mpeg2video"),
        ("mp4", "mjpeg"),
    ],
)
@pytest.mark.parametrize("gop", [4, 100])
def test_frames_are_exact_in_every_container(form, codec, gop):
    frames = frames_of(video(23, form, codec, gop=gop), CONFIG)
    assert frames.shape == (8, 48, 64, 3)
    assert frames.dtype == np.uint8
    assert shown(frames) == [0, 3, 6, 9, 12, 15, 18, 22]


def test_a_video_shorter_than_the_wanted_frames_gives_each_of_its_frames_once():
    assert shown(frames_of(video(5), CONFIG)) == [0, 1, 2, 3, 4]
    assert shown(frames_of(video(1), CONFIG)) == [0]


@pytest.mark.parametrize("form", ["mp4", "matroska", "mpegts"])
def test_a_late_start_time_changes_nothing(form):
    assert shown(frames_of(video(23, form, shift=37), CONFIG)) == [0, 3, 6, 9, 12, 15, 18, 22]


def test_a_recording_that_starts_within_a_group_shows_what_can_be_decoded():
    whole = video(23, "mpegts", gop=10)
    first_key_lost = whole[: 3 * 188] + whole[12 * 188 :]  # the stream's tables, then its later packets
    assert shown(frames_of(first_key_lost, MediaConfig(frames=50))) == list(range(9, 23))
    assert shown(frames_of(first_key_lost, MediaConfig(frames=4))) == [9, 13, 17, 22]


def test_frames_before_the_edit_list_are_not_shown():
    # Negative times make the muxer write an edit list that hides the first five frames.
    assert shown(frames_of(video(23, shift=-5), MediaConfig(frames=3))) == [5, 13, 22]


@pytest.mark.parametrize(
    ("rotation", "corner"),
    [
        ({"degrees": 90}, (-8, 8)),
        ({"degrees": -90}, (8, -8)),
        ({"degrees": 180}, (-8, -8)),
        ({"degrees": 0, "hflip": True}, (8, -8)),
    ],
)
def test_display_matrix_is_applied(rotation, corner):
    frames = frames_of(video(3, rotation=rotation), CONFIG)
    assert frames.shape == ((3, 64, 48, 3) if abs(rotation["degrees"]) == 90 else (3, 48, 64, 3))
    red, green, blue = frames[0][corner].tolist()
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize(
    ("form", "codec", "kept", "options"),
    [
        ("mp4", "libx264", 0.6, {"movflags": "faststart"}),
        ("matroska", "libx264", 0.6, {}),
        ("webm", "libvpx-vp9", 0.6, {}),
        ("avi", "mpeg4", 0.8, {}),
    ],
)
def test_a_file_that_lost_its_end_is_truncated(form, codec, kept, options):
    data = video(23, form, codec, gop=1, container=options)
    assert shown(frames_of(data, CONFIG)) == [0, 3, 6, 9, 12, 15, 18, 22]
    assert reason(decode_video, data[: int(len(data) * kept)], CONFIG) == "truncated_video"


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_an_mp4_that_lost_its_index_is_corrupt(codec):
    data = video(23, codec=codec)
    assert reason(decode_video, data[: int(len(data) * 0.6)], CONFIG) == "corrupt_video"


def test_playlists_that_name_other_files_are_not_opened(tmp_path):
    target = tmp_path / "secret.ts"
    target.write_bytes(video(5, "mpegts"))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\nfile://{target}\n#EXT-X-ENDLIST\n"
    assert reason(decode_video, playlist.encode(), CONFIG) == "corrupt_video"
    assert reason(decode_video, f"ffconcat version 1.0\nfile {target}\n".encode(), CONFIG) == "corrupt_video"


def sound() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame) + stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "config", "expected"),
    [
        (b"", CONFIG, "empty_file"),
        (b"no video " * 99, CONFIG, "corrupt_video"),
        (sound(), CONFIG, "no_video_stream"),
        (video(2), MediaConfig(max_pixels=3000), "too_many_pixels"),
        (video(2, size=(96, 16)), MediaConfig(max_aspect_ratio=5.0), "extreme_aspect_ratio"),
        (video(23), MediaConfig(max_video_frames=22), "too_many_frames"),
        (video(23, "avi"), MediaConfig(max_video_frames=22), "too_many_frames"),
        (video(23), MediaConfig(max_video_s=2.1), "too_long_video"),
        (video(23, "avi"), MediaConfig(max_video_s=2.1), "too_long_video"),
    ],
)
def test_bad_videos_are_named(data, config, expected):
    assert reason(decode_video, data, config) == expected


def test_limits_of_length_are_inclusive_and_count_from_the_first_frame():
    config = MediaConfig(frames=2, max_video_frames=23, max_video_s=2.2)
    for data in (video(23), video(23, shift=600), video(23, "mpegts", shift=600)):
        assert shown(frames_of(data, config)) == [0, 22]


def test_a_clock_that_wraps_is_neither_a_long_video_nor_a_truncated_one():
    wrap_frames = 2**33 / 90_000 * 10
    data = video(23, "mpegts", shift=wrap_frames - 15)
    assert shown(frames_of(data, MediaConfig(max_video_s=2.2))) == [0, 3, 6, 9, 12, 15, 18, 22]


def test_a_cover_picture_is_not_a_video():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        voice, cover = container.add_stream("aac", rate=16000), container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        picture = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))
        for packet in voice.encode(silence) + voice.encode() + cover.encode(picture) + cover.encode():
            container.mux(packet)
    assert reason(decode_video, buffer.getvalue(), CONFIG) == "no_video_stream"


def test_a_codec_that_is_unknown_is_corrupt():
    data = video(3, "matroska").replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/XXX")
    assert reason(decode_video, data, CONFIG) == "corrupt_video"


def test_a_frame_larger_than_its_container_reports_is_refused():
    data = video(2, "matroska", size=(640, 480))
    lie = data.replace(b"\xb0\x82\x02\x80", b"\xb0\x82\x00\x40", 1)
    assert lie != data
    assert reason(decode_video, lie, MediaConfig(max_pixels=64 * 480)) == "too_many_pixels"


@pytest.mark.parametrize("form", ["mp4", "avi"])
def test_frames_come_with_their_times(form: str) -> None:
    """With an index, and where all has to be decoded; in this process, and from the child."""
    expected = pytest.approx([0, 0.3, 0.6, 0.9, 1.2, 1.5, 1.8, 2.2])
    data = video(23, form, shift=37 if form == "mp4" else 0)
    assert decode_video(data, CONFIG)[1] == expected
    with Decoder(CONFIG, isolated=True) as decoder:
        assert decoder.member("video", data).times_s == expected
    assert decode_member("image", encoded(Image.new("RGB", (80, 40)), "JPEG"), CONFIG).times_s == ()


def test_decord_agrees_with_pyav_in_the_child_and_is_refused_outside_it():
    config, data = MediaConfig(video_backend="decord"), video(23)
    with pytest.raises(UserError, match="killable child"):
        decode_video(data, config)
    with Decoder(config) as decoder:
        found = decoder.member("video", data)
        frames, times_s = decode_video(data, CONFIG)
        assert np.abs(found.frames.astype(int) - frames).max() <= 3
        assert found.times_s == tuple(times_s)
        assert reason(decoder.member, "video", video(9, "mpegts")) == "decord_unsupported"
        assert reason(decoder.member, "video", video(9, codec="libsvtav1")) == "decord_unsupported"
        assert reason(decoder.member, "video", video(9, shift=-5)) == "decord_unsupported"
        # Files of which decord shows wrong frames, or fails.
        assert reason(decoder.member, "video", video(9, rotation={"degrees": 90})) == "decord_unsupported"
        assert reason(decoder.member, "video", video(9, "avi")) == "decord_unsupported"
        assert reason(decoder.member, "video", video(9, "mpeg", "mpeg2video")) == "decord_unsupported"
        open_groups = {"codec_options": {"x264-params": "open-gop=1:bframes=3:scenecut=0"}}
        assert reason(decoder.member, "video", video(23, gop=5, **open_groups)) == "decord_unsupported"


# --- documents ------------------------------------------------------------------------------------------------------


def pdf(num_pages: int = 3, width: int = 300, height: int = 400, rotation: int = 0) -> bytes:
    document = pymupdf.open()
    for i in range(num_pages):
        page = document.new_page(width=width, height=height)
        page.insert_text((30, 50), f"page number {i}")
        page.draw_rect(pymupdf.Rect(0, 0, width / 2, height / 2), color=(1, 0, 0), fill=(1, 0, 0), overlay=False)
        page.set_rotation(rotation)
    return document.tobytes(deflate=False)


@pytest.mark.parametrize("config", BACKENDS, ids=lambda config: config.document_backend)
class TestDocuments:
    def test_a_page_has_the_pixel_budget_and_its_own_aspect_ratio(self, config):
        pixels = documents.render_page(pdf(), 1, config)
        height, width, _ = pixels.shape
        assert pixels.dtype == np.uint8
        assert abs(height * width / config.page_pixels - 1) < 0.01
        assert abs(height / width - 4 / 3) < 0.01
        assert pixels[5, 5].tolist() == [255, 0, 0]
        assert pixels[-5, -5].tolist() == [255, 255, 255]

    def test_a_turned_page_is_shown_upright(self, config):
        pixels = documents.render_page(pdf(rotation=90), 0, config)
        assert pixels.shape[1] > pixels.shape[0]
        assert pixels[5, -5].tolist() == [255, 0, 0]

    @pytest.mark.parametrize("box", [b"[0 0 1000000000 900000000]", b"[0 0 3 4]"])
    def test_the_budget_holds_whatever_the_page_box(self, config, box):
        data = pdf().replace(b"[0 0 300 400]", box)
        height, width, _ = documents.render_page(data, 0, config).shape
        assert abs(height * width / config.page_pixels - 1) < 0.01

    @pytest.mark.parametrize("box", [b"[0 0 0 400]", b"[0 0 0 0]", b"[0 0 1e999 9]", b"[700 0 700 400]"])
    def test_a_page_box_that_is_none_is_replaced_by_a_letter_or_refused(self, config, box):
        try:
            height, width, _ = documents.render_page(pdf().replace(b"[0 0 300 400]", box), 0, config).shape
            outcome = round(height / width, 2)
        except BadMedia as bad:
            outcome = bad.reason
        assert outcome in (round(792 / 612, 2), "corrupt_pdf", "extreme_aspect_ratio")

    def test_text_without_end_is_cut(self, config):
        with pymupdf.open() as document:
            document.new_page(width=3000, height=3000).insert_textbox((0, 0, 3000, 3000), "word " * 20_000, fontsize=4)
            [text] = documents.page_texts(document.tobytes(), config)
        assert len(text) == 50_000

    def test_a_ribbon_is_refused(self, config):
        data = pdf().replace(b"[0 0 300 400]", b"[0 0 1 100000]")
        assert reason(documents.render_page, data, 0, config) == "extreme_aspect_ratio"

    def test_pages_and_text(self, config):
        assert [text.strip() for text in documents.page_texts(pdf(2), config)] == ["page number 0", "page number 1"]

    def test_lines_end_in_the_same_way_and_keep_their_hyphens(self, config):
        with pymupdf.open() as document:
            document.new_page().insert_text((50, 60), ["a pipe-", "line, well-known"])
            [text] = documents.page_texts(document.tobytes(), config)
        assert text.strip() == "a pipe-\nline, well-known"

    def test_an_extracted_page_is_alone_and_looks_the_same(self, config):
        single = documents.extract_page(pdf(), 2, config)
        assert [text.strip() for text in documents.page_texts(single, config)] == ["page number 2"]
        np.testing.assert_array_equal(documents.render_page(single, 0, config), documents.render_page(pdf(), 2, config))

    def test_extracted_bytes_are_deterministic(self, config, monkeypatch):
        source = pdf()
        first = documents.extract_page(source, 1, config)
        monkeypatch.setenv("TZ", "Asia/Tokyo")
        assert documents.extract_page(source, 1, config) == first
        assert b"CreationDate" not in first
        assert documents.extract_page(source, 0, config) != first

    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            (b"", "empty_file"),
            (b"<html><body>hello</body></html>", "not_a_pdf"),
            (b" " * 1024 + pdf(), "not_a_pdf"),
            (pdf()[:900], "corrupt_pdf"),
            (b"%PDF-1.7\nno objects\n%%EOF", "corrupt_pdf"),
        ],
    )
    def test_bad_files_are_named(self, config, data, expected, capfd):
        assert reason(documents.page_texts, data, config) == expected
        assert capfd.readouterr() == ("", "")

    def test_a_password_is_named(self, config):
        locked = pymupdf.open(stream=pdf()).tobytes(
            encryption=pymupdf.PDF_ENCRYPT_AES_256, user_pw="open", owner_pw="own"
        )
        assert reason(documents.render_page, locked, 0, config) == "encrypted_pdf"
        # Without pages, PDFium sets no error, and keeps the one of the file before.
        empty = damaged_media.pdf([b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[]/Count 0>>"])
        assert reason(documents.render_page, empty, 0, config) != "encrypted_pdf"

    def test_page_limits(self, config):
        assert reason(documents.render_page, pdf(3), 3, config) == "no_such_page"
        assert reason(documents.page_texts, pdf(4), config.model_copy(update={"max_pages": 3})) == "too_many_pages"


def test_both_back_ends_show_the_same_page():
    one, other = (documents.render_page(pdf(), 0, config).astype(int) for config in BACKENDS)
    assert one.shape == other.shape
    assert np.abs(one - other).mean() < 1


# --- members and samples --------------------------------------------------------------------------------------------


def composed() -> tuple[Sample, dict[str, bytes]]:
    sample = Sample(
        key="000001",
        source="s",
        task="t",
        query=Input("make it blue", (Media("image", "q0.png"),)),
        positive=Input(media=(Media("video", "p0.mp4"),)),
        negatives=(Input(media=(Media("document", "n0.pdf"),)), Input("only text")),
        instruction="Find:",
        target_instruction="Understand:",
    )
    image = encoded(Image.new("RGB", (11, 7), "red"), "PNG")
    return sample, {"q0.png": image, "p0.mp4": video(3), "n0.pdf": pdf(1)}


def test_every_input_of_a_sample_gets_its_pixels():
    sample, members = composed()
    decoded = decode_sample(sample, members, CONFIG, instructions=False)
    assert decoded.sample is sample
    assert decoded.query.text == "make it blue"
    assert decoded.query.visuals[0].frames.shape == (1, 7, 11, 3)
    assert decoded.positive.visuals[0].frames.shape == (3, 48, 64, 3)
    assert decoded.negatives[0].visuals[0].kind == "document"
    assert decoded.negatives[0].visuals[0].frames.shape == (1, 1157, 868, 3)
    assert decoded.negatives[1].visuals == ()


@pytest.mark.parametrize(("on", "query", "targets"), [(True, "Find:", "Understand:"), (False, "", "")])
def test_instructions_go_with_their_inputs(on, query, targets):
    decoded = decode_sample(*composed(), CONFIG, instructions=on)
    assert decoded.query.instruction == query
    assert [part.instruction for part in (decoded.positive, *decoded.negatives)] == [targets] * 3


def test_a_missing_member_and_too_many_bytes_are_named():
    sample, members = composed()
    del members["p0.mp4"]
    assert reason(decode_sample, sample, members, CONFIG, False) == "missing_member"
    assert reason(decode_member, "image", b"x" * 11, MediaConfig(max_bytes=10)) == "too_many_bytes"


def test_isolated_decoding_gives_the_same_pixels_and_reasons():
    sample, members = composed()
    with Decoder(CONFIG, isolated=True) as decoder:
        isolated = decoder.sample(sample, members, instructions=True)
        assert reason(decoder.member, "image", b"nothing") == "unsupported_format"
    plain = decode_sample(sample, members, CONFIG, instructions=True)
    for one, other in zip((isolated.query, isolated.positive), (plain.query, plain.positive), strict=True):
        np.testing.assert_array_equal(one.visuals[0].frames, other.visuals[0].frames)
    assert isolated.negatives[0].instruction == "Understand:"


def test_large_photo_is_decoded_at_a_fraction_of_its_size_and_a_small_one_whole() -> None:
    photo = encoded(Image.new("RGB", (800, 400), (200, 30, 30)), "JPEG")
    config = MediaConfig(image_pixels=200 * 100)
    assert decode_pixels("image", photo, config)[0].shape == (1, 100, 200, 3)
    assert decode_pixels("image", photo, CONFIG)[0].shape == (1, 400, 800, 3)
