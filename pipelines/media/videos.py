"""Videos: file bytes to evenly spaced uint8 RGB frames, with PyAV, or with decord in the sandbox."""

from __future__ import annotations

import io
import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.media import sandbox
from pipelines.media.images import check_size
from pipelines.media.libraries import import_optional
from pipelines.samples import UInt8Array

# Demuxers that read one self-contained file: playlists and scripts could name other files and network addresses.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"
_DECORD_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "flv")
_TRUNCATION_TOLERANCE = 0.03
_TICK_TOLERANCE = 1e-6  # in sampling intervals: frame times are rounded


def decode_video(data: bytes, config: MediaConfig) -> tuple[UInt8Array, list[float]]:
    """Return the frames `[T, H, W, 3]` that `sample_frames` chooses, and when each is shown, in seconds from the start.

    Frames are upright by the display matrix. Raises `BadMedia`: empty_file, corrupt_video, truncated_video,
    no_video_stream, too_long_video, too_many_frames, too_many_pixels, extreme_aspect_ratio, decord_unsupported. Raises
    `UserError` for decord outside the sandbox, or if it is not installed.
    """
    if not data:
        raise BadMedia("empty_file")
    try:
        with _open(data) as container:
            scan = _scan(container, _video_stream(container, config), config)
        if config.video_backend == "decord":
            return _decode_decord(data, config, scan)
        return _decode_pyav(data, config, scan)
    except MemoryError:
        raise
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        # PyAV itself raises IndexError and ValueError on half-written stream headers.
        raise BadMedia("corrupt_video", str(error)) from error


def sample_frames(times_s: npt.NDArray[np.float64], config: MediaConfig) -> npt.NDArray[np.int64]:
    """Choose frames of a video. Return increasing, distinct positions in `times_s`, at least one.

    `times_s` says when each frame is shown and increases. Without `config.fps`, `frames` positions are chosen, uniform
    over their order. With it, the frames shown at the start and after each 1 / fps seconds are chosen, or a uniform
    choice of `frames` of these. The last frame is taken to be shown as long as the one before it. A video with fewer
    frames gives each once: repeated frames would cost the model tokens and add nothing.
    """
    candidates = np.arange(len(times_s))
    if config.fps is not None and len(times_s) > 1:
        starts_s = np.append(times_s, 2 * times_s[-1] - times_s[-2]) - times_s[0]
        next_tick = np.ceil(starts_s * config.fps - _TICK_TOLERANCE)  # the first tick at which the frame is shown
        candidates = np.union1d(0, np.flatnonzero(np.diff(next_tick)))
    return candidates[uniform_indices(len(candidates), config.frames)]


def uniform_indices(num_frames: int, num_wanted: int) -> npt.NDArray[np.int64]:
    """Return increasing, distinct positions in `range(num_frames)`, first and last included.

    They are linspace rounded down, as in the MMEB-V2 protocol. If `num_frames` is at most `num_wanted`, they are all
    positions. If one is wanted, it is the first.
    """
    count = min(num_frames, num_wanted)
    return np.arange(count, dtype=np.int64) * (num_frames - 1) // max(count - 1, 1)


@dataclass(frozen=True, slots=True)
class _Scan:
    """What the container says, without decoding.

    `pts` (shown frames, empty if any is missing) and `keys` (key frames) are increasing stream ticks of `tick_s`
    seconds. `frame_s` is the mean time between frames. `decord_trap` names what decord 0.6 decodes wrongly.
    """

    pts: list[int]
    keys: list[int]
    tick_s: float
    frame_s: float
    decord_trap: str

    def times_s(self, num_frames: int) -> npt.NDArray[np.float64]:
        """Return when each frame is shown: evenly spaced, unless the container has a time for each frame."""
        if self.pts and len(self.pts) == num_frames:
            return np.array([(pts - self.pts[0]) * self.tick_s for pts in self.pts])
        return np.array([i * self.frame_s for i in range(num_frames)])


def _open(data: bytes) -> Any:
    return av.open(io.BytesIO(data), options={"format_whitelist": _FORMATS})


def _video_stream(container: Any, config: MediaConfig) -> Any:
    stream = container.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:
        whole = any(other.codec_context for other in container.streams)
        raise BadMedia("no_video_stream" if whole else "corrupt_video", "no pictures inside")
    if stream.codec_context is None:
        raise BadMedia("corrupt_video", "no decoder for its pictures")
    # Frame threads change which frames a seek returns. Several workers decode in parallel instead.
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    check_size(stream.width, stream.height, config)
    return stream


def _scan(container: Any, stream: Any, config: MediaConfig) -> _Scan:
    """Read all packets once. Raises `BadMedia`: truncated_video, too_long_video, too_many_frames.

    A video is truncated if its packets end before the declared duration.
    """
    trap = _decord_trap(container, stream)  # before the pass, which adds index entries
    pts: set[int] = set()
    keys: set[int] = set()
    # AVI stores no presentation times, and FFmpeg's guesses are wrong for reordered frames.
    trusted = not (container.format.name == "avi" and stream.codec_context.has_b_frames)
    start_s = end_s = 0.0
    tick_s, frame_s = float(stream.time_base), 1 / float(stream.average_rate or stream.guessed_rate or 25)
    num_frames, first_pts, last_key_pts = 0, None, -math.inf
    for packet in container.demux():
        if packet.size == 0:
            continue
        if packet.pts is not None and not packet.is_discard:
            start_s = min(start_s, float(packet.pts * packet.time_base))
            end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != stream.index:
            continue
        if packet.is_discard:
            trap = "edit list"
        num_frames += 1
        if num_frames == 1 and not packet.is_keyframe:
            trap = "begins within a group"
        if packet.pts is None:
            trusted = False
            continue
        first_pts = packet.pts if first_pts is None else first_pts
        _check_length(num_frames, (packet.pts - first_pts) * tick_s, config)
        if packet.is_keyframe:
            keys.add(packet.pts)
            last_key_pts = packet.pts
        elif packet.pts < last_key_pts:
            trap = "open GOP"
        if not packet.is_discard:
            pts.add(packet.pts)
    _check_length(num_frames, num_frames * frame_s if not trusted else 0.0, config)
    _check_whole(container, sorted(pts), tick_s, end_s - start_s)
    if not trusted:
        trap = trap or "no presentation times"
    return _Scan(sorted(pts) if trusted else [], sorted(keys), tick_s, frame_s, trap)


def _decord_trap(container: Any, stream: Any) -> str:
    """Return the problem of decord that the headers show, or "". `_scan` finds other problems in the packets."""
    if container.format.name not in _DECORD_FORMATS:
        return f"container {container.format.name}"
    if stream.codec_context.codec.canonical_name == "av1":
        return "AV1"
    return "" if stream.index_entries else "no index"


def _check_length(num_frames: int, length_s: float, config: MediaConfig) -> None:
    if num_frames > config.max_video_frames:
        raise BadMedia("too_many_frames", f"more than {config.max_video_frames}")
    if length_s > config.max_video_s:
        raise BadMedia("too_long_video", f"{length_s:.1f} s > {config.max_video_s:g} s")


def _check_whole(container: Any, shown: list[int], tick_s: float, end_s: float) -> None:
    if container.duration is None:
        return
    duration_s = container.duration / av.time_base
    longest_gap_s = max((b - a for a, b in pairwise(shown)), default=0) * tick_s
    # `end_s` counts from zero and not from a late start, because some muxers count the duration so too. A late start
    # must not look like a missing end. Times before zero, of a transport stream whose clock wraps, do count.
    if duration_s - end_s > max(longest_gap_s, _TRUNCATION_TOLERANCE * duration_s):
        raise BadMedia("truncated_video", f"declares {duration_s:.2f} s, ends at {end_s:.2f} s")


def _decode_pyav(data: bytes, config: MediaConfig, scan: _Scan) -> tuple[UInt8Array, list[float]]:
    all_times_s = scan.times_s(len(scan.pts))
    chosen = sample_frames(all_times_s, config)
    times_s = all_times_s[chosen]
    with _open(data) as container:
        frames = _seek_frames(container, _video_stream(container, config), [scan.pts[i] for i in chosen], scan.keys)
    if not frames:
        frames, times_s = _all_through(data, config, scan)
    if any(frame.is_corrupt for frame in frames):
        # Only damage that FFmpeg reports: it conceals most, and its strict mode rejects sound streams too.
        raise BadMedia("corrupt_video", "the decoder had to invent parts of a frame")
    return _rgb(frames), times_s.tolist()


def _seek_frames(container: Any, stream: Any, wanted: list[int], keys: list[int]) -> list[Any]:
    """Return the frames shown at `wanted`, each decoded from the key frame before it, or [] if the index is wrong."""
    frames: list[Any] = []
    position: int | None = None
    decoder: Iterator[Any] = iter(())
    for pts in wanted:
        before = bisect_right(keys, pts) - 1
        if before < 0:
            return []
        key = keys[before]
        sought = position is None or key > position
        if sought:
            try:
                container.seek(key, stream=stream)
            except av.error.FFmpegError:
                return []
            decoder = container.decode(stream)
        for frame in decoder:
            # After a seek behind the key frame, pictures would lack their references.
            if frame.pts is None or frame.pts > (key if sought else pts):
                return []
            position, sought = frame.pts, False
            if frame.pts == pts:
                frames.append(frame)
                break
        else:
            return []
    return frames


def _all_through(data: bytes, config: MediaConfig, scan: _Scan) -> tuple[list[Any], npt.NDArray[np.float64]]:
    """Decode without an index: once to count the frames, and again to keep the chosen positions."""
    with _open(data) as container:
        count = sum(1 for _ in container.decode(_video_stream(container, config)))
    if count == 0:
        raise BadMedia("corrupt_video", "no frame can be decoded")
    times_s = scan.times_s(count)
    chosen = sample_frames(times_s, config)
    wanted = set(chosen.tolist())
    with _open(data) as container:
        decoded = container.decode(_video_stream(container, config))
        return [frame for position, frame in enumerate(decoded) if position in wanted], times_s[chosen]


def _rgb(frames: list[Any]) -> UInt8Array:
    """Stack the frames upright. Frames of a different size, which a stream may hold, are scaled to the first."""
    scaler, width, height = VideoReformatter(), frames[0].width, frames[0].height
    stacked: UInt8Array = np.stack([scaler.reformat(frame, width, height, "rgb24").to_ndarray() for frame in frames])
    matrix = frames[0].side_data.get(SideDataType.DISPLAYMATRIX)
    return stacked if matrix is None else _upright(stacked, np.frombuffer(bytes(matrix), np.int32))


def _upright(frames: UInt8Array, matrix: npt.NDArray[np.int32]) -> UInt8Array:
    """Apply a display matrix (row-major 3 x 3, shown = stored @ matrix), rounded to quarter turns and mirrorings."""
    across, down = int(matrix[0]), int(matrix[4])
    if abs(int(matrix[1])) > abs(across):
        frames = frames.swapaxes(1, 2)
        across, down = int(matrix[3]), int(matrix[1])
    return np.ascontiguousarray(frames[:, :: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


def _decode_decord(data: bytes, config: MediaConfig, scan: _Scan) -> tuple[UInt8Array, list[float]]:
    """Decode with decord 0.6 (FFmpeg 4.1), which never returns on some files and gives wrong frames for others."""
    if not sandbox.in_sandbox():
        problem = "decord can hang indefinitely and decodes only in the killable child"
        raise UserError("media.video_backend=decord", problem, "use Decoder or Sandbox, or the pyav backend")
    with _open(data) as container:
        first = next(container.decode(_video_stream(container, config)), None)
    turned = first is not None and SideDataType.DISPLAYMATRIX in first.side_data
    if trap := scan.decord_trap or ("display matrix" if turned else ""):
        raise BadMedia("decord_unsupported", trap)
    decord = import_optional("decord", "media.video_backend", "pyav")
    try:
        reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
        times_s = scan.times_s(len(reader))
        chosen = sample_frames(times_s, config)
        frames: UInt8Array = reader.get_batch(chosen).asnumpy()
    except (RuntimeError, decord.DECORDError) as error:
        raise BadMedia("corrupt_video", str(error).partition("\n")[0]) from error
    return frames, times_s[chosen].tolist()
