"""Segments of videos: their ranges, what is decoded of them, their ids, and clips of them for players."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import av
import numpy as np
import pytest

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.items.listing import ListedShard, row_item
from pipelines.items.segments import Segmentation
from pipelines.media import video_segments
from pipelines.media.decode import Decoder
from pipelines.media.video_clip import cut_video
from pipelines.media.video_segments import decode_segments, each_segment, video_length
from pipelines.samples import Input, Media, Sample, TimeRange, UInt8Array, Visual, clock_time
from tests.vectors import damaged, scenes

MEDIA = MediaConfig(frames=4)
RED, GREEN, BLUE, YELLOW, CYAN = (250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)
COLORS = [RED, GREEN, BLUE, YELLOW, CYAN]
FORMS = [
    ("mp4", "libx264"),
    ("avi", "mpeg4"),
    ("webm", "libvpx-vp9"),
    ("mpegts", "mpeg2video"),
    ("matroska", "libx264"),
]


def ranges(*times: float) -> list[TimeRange]:
    return [TimeRange(start_s, end_s) for start_s, end_s in pairwise(times)]


def color(frames: UInt8Array) -> tuple[int, ...]:
    """The color of frames that have one, at steps of 50."""
    assert np.ptp(frames.reshape(-1, 3), axis=0).max() <= 12
    return tuple((np.round(frames.reshape(-1, 3).mean(0) / 50) * 50).astype(int).tolist())


@pytest.mark.parametrize(
    ("length_s", "seconds", "overlap_s", "expected"),
    [
        (30.0, 30.0, 0.0, []),
        (40.0, 30.0, 0.0, []),  # the last ten seconds belong to the only segment, which is the video
        (45.0, 30.0, 0.0, [(0, 30), (30, 45)]),
        (74.9, 30.0, 0.0, [(0, 30), (30, 74.9)]),
        (75.0, 30.0, 0.0, [(0, 30), (30, 60), (60, 75)]),
        (90.0, 30.0, 0.0, [(0, 30), (30, 60), (60, 90)]),
        (90.0004, 30.0, 0.0, [(0, 30), (30, 60), (60, 90)]),
        (65.0, 30.0, 10.0, [(0, 30), (20, 50), (40, 65)]),
        (54.0, 30.0, 10.0, [(0, 30), (20, 54)]),
        (0.7, 0.3, 0.1, [(0, 0.3), (0.2, 0.5), (0.4, 0.7)]),
    ],
)
def test_a_short_last_segment_belongs_to_the_one_before(
    length_s: float, seconds: float, overlap_s: float, expected: list[tuple[float, float]]
) -> None:
    found = Segmentation(seconds, overlap_s).divide(length_s)
    assert [(one.start_s, one.end_s) for one in found] == expected


def test_times_are_written_as_players_write_them() -> None:
    assert [clock_time(one) for one in (0, 9.5, 90, 3605, 36_000.25, 59.9996)] == [
        "0:00",
        "0:09.5",
        "1:30",
        "1:00:05",
        "10:00:00.25",
        "1:00",
    ]
    assert str(TimeRange(750, 780)) == "12:30-13:00"


@pytest.mark.parametrize(("form", "codec"), FORMS)
@pytest.mark.parametrize("trusted", [True, False])
def test_a_segment_shows_what_is_shown_in_its_range_and_nothing_else(form: str, codec: str, trusted: bool) -> None:
    data = scenes(COLORS, 2, form, codec)
    with Decoder(MEDIA, trusted=trusted) as decoder:
        assert decoder.video_length(data) == pytest.approx(10)
        found = list(decoder.segments(data, ranges(0, 2, 4, 6, 8, 10)))
    assert [color(one.frames) for one in found if isinstance(one, Visual)] == COLORS
    for one in found:
        assert isinstance(one, Visual)
        assert one.frames.shape == (4, 48, 64, 3)
        assert one.times_s == pytest.approx([0, 0.6, 1.2, 1.9])


def test_what_is_on_the_screen_at_the_start_is_shown() -> None:
    """A frame is shown until the next one comes, also into a segment in which none begins."""
    sink = io.BytesIO()
    with av.open(sink, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for at_s, shown in ((0, RED), (1, GREEN), (9, BLUE)):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), shown, np.uint8), format="rgb24")
            frame.pts = at_s
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with Decoder(MEDIA, trusted=True) as decoder:
        first, second, third = decoder.segments(sink.getvalue(), ranges(0, 4, 8, 10))
    assert isinstance(first, Visual)
    assert isinstance(second, Visual)
    assert isinstance(third, Visual)
    assert [color(frame[None]) for frame in first.frames] == [RED, GREEN]
    assert (color(second.frames), second.times_s) == (GREEN, (0.0,))
    assert ([color(frame[None]) for frame in third.frames], third.times_s) == ([GREEN, BLUE], (0.0, 1.0))


def test_frames_per_second_hold_within_a_segment() -> None:
    media = MediaConfig(frames=8, fps=1.0)
    with Decoder(media, trusted=True) as decoder:
        (found,) = decoder.segments(scenes(COLORS, 2), ranges(1, 7))
    assert isinstance(found, Visual)
    assert [color(frame[None]) for frame in found.frames] == [RED, GREEN, GREEN, BLUE, BLUE, YELLOW]
    assert found.times_s == pytest.approx([0, 1, 2, 3, 4, 5])


def test_a_joined_video_that_cannot_be_sought_has_the_same_segments() -> None:
    data = scenes(COLORS[:2], 2, "mpegts", "mpeg2video") + scenes(COLORS[2:], 2, "mpegts", "mpeg2video")
    assert video_length(data, MEDIA) == pytest.approx(10)
    with Decoder(MEDIA, trusted=True) as decoder:
        found = list(decoder.segments(data, ranges(0, 2, 4, 6, 8, 10)))
    assert [color(one.frames) for one in found if isinstance(one, Visual)] == COLORS
    assert cut_video(data, TimeRange(2, 4), MEDIA) is None


@pytest.mark.parametrize("limit", ["_MOST_BYTES", "_CPU_FRACTION"])
def test_a_call_ends_at_its_limits_and_the_next_one_goes_on(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    data, wanted = scenes(COLORS, 2), ranges(0, 2, 4, 6, 8, 10)
    whole = decode_segments(data, wanted, MEDIA)
    assert len(whole[1]) == 5
    monkeypatch.setattr(video_segments, limit, 0)
    calls: list[int] = []

    def call(function: Callable[..., Any], *args: Any) -> Any:
        calls.append(len(args[1]))
        return function(*args)

    found = list(each_segment(call, data, wanted, MEDIA))
    assert calls == [5, 4, 3, 2, 1]
    assert [color(one[0]) for one in found if not isinstance(one, BadMedia)] == COLORS


def test_a_segment_that_ends_the_child_costs_no_other() -> None:
    data, wanted = scenes(COLORS, 2), ranges(0, 2, 4, 6, 8, 10)

    def call(function: Callable[..., Any], data: bytes, segments: Sequence[TimeRange], config: MediaConfig) -> Any:
        if wanted[2] in segments:
            raise BadMedia("decoder_cpu_limit")
        return function(data, segments, config)

    found = list(each_segment(call, data, wanted, MEDIA))
    assert [isinstance(one, BadMedia) for one in found] == [False, False, True, False, False]


def test_damage_costs_the_segments_that_show_it() -> None:
    data = damaged(scenes(COLORS, 2, "matroska", "ffv1"), 4.4, 5.8)
    for wanted in (ranges(0, 2, 4, 6, 8, 10), ranges(4, 6), ranges(4, 6, 8)):
        with Decoder(MEDIA) as decoder:
            found = list(decoder.segments(data, wanted))
        for segment, one in zip(wanted, found, strict=True):
            if segment.start_s == 4:
                assert isinstance(one, BadMedia)
                assert one.reason == "corrupt_video"
            else:
                assert isinstance(one, Visual)
                assert color(one.frames) == COLORS[round(segment.start_s / 2)]
    with Decoder(MEDIA) as decoder, pytest.raises(BadMedia, match="truncated_video"):
        decoder.video_length(scenes(COLORS, 2, "matroska")[:1200])


def test_the_id_of_a_segment_depends_on_the_content_and_the_range() -> None:
    def item(sha256: str, segment: TimeRange | None, shard: str = "a") -> Any:
        sample = Sample(
            "1",
            shard,
            "t",
            Input(),
            Input(media=(Media("video", "p0.mp4"),)),
            target_sha256=sha256,
            target_instruction="x",
        )
        return row_item(ListedShard("train", shard, "t", 0, 1, "d"), 0, sample, "positive", segment)

    one = item("a" * 64, TimeRange(0, 30))
    assert one.id == item("a" * 64, TimeRange(0, 30), shard="b").id
    assert (one.name, one.segment) == ("a/1 0:00-0:30", TimeRange(0, 30))
    others = [item("b" * 64, TimeRange(0, 30)), item("a" * 64, TimeRange(0, 31)), item("a" * 64, None)]
    assert len({one.id, *(other.id for other in others)}) == 4
    assert len({one.content, *(other.content for other in others)}) == 4


@pytest.mark.parametrize(("form", "codec"), FORMS)
def test_a_clip_of_a_segment_plays_it(form: str, codec: str) -> None:
    found = cut_video(scenes(COLORS, 2, form, codec), TimeRange(4, 6), MEDIA)
    assert found is not None
    pixels, told = found
    assert told["media_type"] == ("video/webm" if form == "webm" else "video/mp4")
    assert told["end_s"] - told["start_s"] == pytest.approx(2)
    with Decoder(MEDIA, trusted=True) as decoder:
        (shown,) = decoder.segments(pixels.tobytes(), [TimeRange(told["start_s"], told["end_s"])])
    assert isinstance(shown, Visual)
    assert color(shown.frames) == BLUE
