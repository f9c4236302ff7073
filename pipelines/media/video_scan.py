"""What the packets of a video say, without decoding: when each frame is shown, and whether the file is whole."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.media.video_pixels import may_be_transparent

_DECORD_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "flv")
# Their packets have no duration, or repeat the usual one. The container says when the last frame ends.
_DECLARES_END = ("matroska,webm", "flv", "asf")
_TRUNCATION_TOLERANCE = 0.03
_ROUNDING_S = 0.002  # these containers store whole milliseconds
# FFmpeg's rule for joined streams: the clock steps back, or further ahead than the packets announce.
_STEP_BACK_S = 0.1
_STEP_AHEAD_S = 10.0
_TAGGED_END = re.compile(r"(\d{1,6}):(\d{1,2}):(\d{1,2}(?:\.\d{1,12})?)", re.ASCII)
_MAY_STEP_AHEAD = 0x0200  # AVFMT_TS_DISCONT of libavformat: MPEG streams and Ogg


@dataclass(frozen=True, slots=True)
class Scan:
    """What the packets of a video say.

    `pts` are the shown frames in order, empty if any is missing. `shown_s` says when each is shown, in seconds from the
    first, and `end_s` when the last one ends (None: unknown). `keys` are the key frames, increasing. `pts` and `keys`
    are in units of the stream. `frame_s` is the mean time between frames. The clock of a joined video (`is_joined`)
    starts again within the file, so that no seek is possible. `decord_trap` names what decord 0.6 decodes wrongly.
    `length_s` is `end_s`, or by the number of frames where no times are stored.
    """

    pts: list[int]
    shown_s: list[float]
    end_s: float | None
    keys: list[int]
    frame_s: float
    is_joined: bool
    decord_trap: str
    length_s: float

    def times_s(self, num_frames: int) -> npt.NDArray[np.float64]:
        """Return when each frame is shown: evenly spaced, unless the container has a time for each frame."""
        if self.pts and len(self.pts) == num_frames:
            return np.array(self.shown_s)
        return np.array([i * self.frame_s for i in range(num_frames)])

    def times_of_decoded(self, decoded_pts: list[int | None]) -> tuple[npt.NDArray[np.float64], float | None]:
        """Return when each decoded frame is shown, by its `pts`, and when the last one ends.

        Packets that gave no frame are left out. The frames are evenly spaced if the scan does not have one of them.
        """
        found: list[int] = []
        for pts in decoded_pts:
            try:
                found.append(self.pts.index(pts, found[-1] + 1 if found else 0))  # type: ignore[arg-type]
            except ValueError:
                return self.times_s(len(decoded_pts)), None
        times_s = np.array([self.shown_s[i] for i in found])
        if not found:
            return times_s, None
        return times_s - times_s[0], None if self.end_s is None else self.end_s - float(times_s[0])


def scan_packets(container: Any, stream: Any, config: MediaConfig, is_whole: bool) -> Scan:
    """Read all packets once. Raises `BadMedia`: truncated_video, too_long_video, too_many_frames.

    A video is truncated if its packets end before the declared duration, unless the container shows that it `is_whole`.
    Matroska must also say so of this stream, because its duration may be wrong.
    """
    trap = _header_trap(container, stream)  # before the pass, which adds index entries
    clock = _Clock(container, stream, config)
    start_s = end_s = 0.0
    for packet in container.demux():
        if packet.size == 0:
            continue
        is_picture = packet.stream_index == stream.index
        if packet.pts is not None and not packet.is_discard:
            at_s, tick_s = float(packet.pts * packet.time_base), float(packet.time_base)
            start_s = min(start_s, at_s)
            end_s = max(end_s, at_s + (packet.duration * tick_s if packet.duration else is_picture * clock.frame_s))
        if is_picture:
            clock.add(packet)
        else:
            clock.hear(packet)
    clock.check_untimed()
    if not is_whole or container.format.name == "matroska,webm":
        held_s = _tagged_end_s(stream) if is_whole else 0.0
        _check_whole(container, clock.longest_gap_s(), max(end_s - start_s, held_s))
    return clock.scan(container, stream, trap)


def _header_trap(container: Any, stream: Any) -> str:
    """Return the problem of decord that the headers show, or "". `_Clock` finds other problems in the packets."""
    if container.format.name not in _DECORD_FORMATS:
        return f"container {container.format.name}"
    if stream.codec_context.codec.canonical_name == "av1":
        return "AV1"
    if may_be_transparent(stream):
        return "transparency"
    return "" if stream.index_entries else "no index"


def _check_whole(container: Any, longest_gap_s: float, end_s: float) -> None:
    if container.duration is None:
        return
    duration_s = container.duration / av.time_base
    # `end_s` counts from zero and not from a late start, because some muxers count the duration so too. A late start
    # must not look like a missing end. Times before zero, of a transport stream whose clock wraps, do count.
    if duration_s - end_s > max(longest_gap_s, _TRUNCATION_TOLERANCE * duration_s) + _ROUNDING_S:
        raise BadMedia("truncated_video", f"declares {duration_s:.2f} s, ends at {end_s:.2f} s")


@dataclass(slots=True)
class _Segment:
    """Frames of one clock: ticks at which each is shown -> ticks for which it is shown, 0 if unknown."""

    first_dts: int
    first_pts: int
    earlier_s: float  # length of the segments before
    num_packets: int = 0
    last_key_pts: int | None = None
    shown: dict[int, int] = field(default_factory=dict)


class _Clock:
    """Follows the clock of the pictures, in the order of decoding, through a file in which it may start again."""

    def __init__(self, container: Any, stream: Any, config: MediaConfig) -> None:
        self._config = config
        self._tick_s = float(stream.time_base)
        self.frame_s = 1 / float(stream.average_rate or stream.guessed_rate or 25)
        self._may_step_ahead = bool(container.format.flags & _MAY_STEP_AHEAD)
        # AVI stores no presentation times, and FFmpeg's guesses are wrong for reordered frames.
        self._is_timed = not (container.format.name == "avi" and stream.codec_context.has_b_frames)
        self._num_frames = 0
        self._segments: list[_Segment] = []
        self._keys: set[int] = set()
        self._trap = ""
        self._last_dts: int | None = None
        self._announced_s = 0.0  # when the next packet of any stream is due

    def hear(self, packet: Any) -> None:
        """Take note of another stream: pictures that are far apart belong to one clock if sound goes on between."""
        if packet.dts is not None:
            self._announced_s = float((packet.dts + (packet.duration or 0)) * packet.time_base)

    def add(self, packet: Any) -> None:
        """Take a packet of the pictures. Raises `BadMedia`: too_long_video, too_many_frames."""
        self._num_frames += 1
        if packet.is_discard:
            self._trap = "edit list"
        elif self._num_frames == 1 and not packet.is_keyframe:
            self._trap = "begins within a group"
        if packet.pts is None:
            self._is_timed = False
            self._check_length(0.0)
            return
        segment = self._segment(packet)
        segment.num_packets += 1
        self._check_length(segment.earlier_s + (packet.pts - segment.first_pts) * self._tick_s)
        if packet.is_keyframe:
            self._keys.add(packet.pts)
            segment.last_key_pts = packet.pts
        elif segment.last_key_pts is not None and packet.pts < segment.last_key_pts:
            self._trap = "open GOP"
        if not packet.is_discard:
            segment.shown[packet.pts] = packet.duration or 0

    def _segment(self, packet: Any) -> _Segment:
        dts = packet.pts if packet.dts is None else packet.dts
        if not self._segments or (packet.dts is not None and self._restarts(packet)):
            earlier_s = self._segments[-1].earlier_s + self._length_s(self._segments[-1]) if self._segments else 0.0
            self._segments.append(_Segment(dts, packet.pts, earlier_s))
        self._last_dts = packet.dts
        self._announced_s = (dts + (packet.duration or 0)) * self._tick_s
        return self._segments[-1]

    def _restarts(self, packet: Any) -> bool:
        segment = self._segments[-1]
        if self._may_step_ahead and packet.dts * self._tick_s - self._announced_s > _STEP_AHEAD_S:
            return True
        if packet.is_keyframe and packet.dts <= segment.first_dts and segment.num_packets > 1:
            return True
        return self._last_dts is not None and (self._last_dts - packet.dts) * self._tick_s > _STEP_BACK_S

    def _length_s(self, segment: _Segment) -> float:
        """Return for how long the frames of a segment are shown. One without a duration is shown for `frame_s`."""
        if not segment.shown:
            return 0.0
        last = max(segment.shown)
        last_s = segment.shown[last] * self._tick_s or self.frame_s
        return (last - min(segment.shown)) * self._tick_s + last_s

    def _check_length(self, length_s: float) -> None:
        if self._num_frames > self._config.max_video_frames:
            raise BadMedia("too_many_frames", f"more than {self._config.max_video_frames}")
        if length_s > self._config.max_video_s:
            raise BadMedia("too_long_video", f"{length_s:.1f} s > {self._config.max_video_s:g} s")

    def check_untimed(self) -> None:
        """Raise `BadMedia` (too_long_video) by the number of frames, if they have no times."""
        self._check_length(0.0 if self._is_timed else self._num_frames * self.frame_s)

    def longest_gap_s(self) -> float:
        """Return the longest time between two frames of one clock."""
        gaps = (b - a for segment in self._segments for a, b in pairwise(sorted(segment.shown)))
        return max(gaps, default=0) * self._tick_s

    def scan(self, container: Any, stream: Any, trap: str) -> Scan:
        """Return the result: the frames of all segments, each segment right behind the one before."""
        segments = [segment for segment in self._segments if segment.shown]
        is_joined = len(segments) > 1
        trap = self._trap or ("its clock starts again" if is_joined else trap)
        if not self._is_timed:
            trap, length_s = trap or "no presentation times", self._num_frames * self.frame_s
            return Scan([], [], None, sorted(self._keys), self.frame_s, is_joined, trap, length_s)
        pts: list[int] = []
        shown_s: list[float] = []
        end_s = 0.0
        for segment in segments:
            ordered = sorted(segment.shown)
            pts += ordered
            shown_s += [end_s + (ticks - ordered[0]) * self._tick_s for ticks in ordered]
            last_s = segment.shown[ordered[-1]] * self._tick_s
            if not last_s:
                last_s = (ordered[-1] - ordered[-2]) * self._tick_s if len(ordered) > 1 else self.frame_s
            end_s = shown_s[-1] + last_s
        if segments and not is_joined:
            end_s = max(end_s, _declared_end_s(container, stream, pts[0] * self._tick_s, shown_s[-1]))
        return Scan(pts, shown_s, end_s, sorted(self._keys), self.frame_s, is_joined, trap, end_s)


def _declared_end_s(container: Any, stream: Any, start_s: float, last_s: float) -> float:
    """Return when the container says that the pictures end, in seconds from the first frame, or 0."""
    if container.format.name not in _DECLARES_END:
        return 0.0
    end_s = _tagged_end_s(stream)
    if not end_s and container.duration is not None and len(container.streams) == 1:
        end_s = container.duration / av.time_base
    # Some muxers count from zero, others from the first frame.
    return end_s - start_s if end_s - start_s > last_s else end_s


def _tagged_end_s(stream: Any) -> float:
    """Return the end of one stream of a Matroska file, as muxers note it in a tag, or 0."""
    found = _TAGGED_END.fullmatch(stream.metadata.get("DURATION", ""))
    return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3]) if found else 0.0
