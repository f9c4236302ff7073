"""Videos: file bytes to uniformly spaced uint8 RGB frames. PyAV by default; decord on request, in the sandbox only."""

from __future__ import annotations

import io
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
from av.video.reformatter import VideoReformatter

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.media import sandbox
from pipelines.media.images import check_size
from pipelines.samples import UInt8Array

# Demuxers that read one self-contained file: playlists and scripts could name other files and network addresses.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"
_TRUNCATION_TOLERANCE = 0.03


def decode_video(data: bytes, config: MediaConfig) -> UInt8Array:
    """`config.frames` frames `[T, H, W, 3]`, uniform over the presentation order, upright by the display matrix.

    A video with fewer frames than that gives all it has, once each and at least one: repeating frames would cost the
    model tokens and add nothing.

    Raises `BadMedia`: empty_file, corrupt_video, truncated_video, no_video_stream, too_many_pixels,
    extreme_aspect_ratio, decord_unsupported; `UserError` for decord outside the sandbox.
    """
    if not data:
        raise BadMedia("empty_file")
    try:
        with _open(data) as container:
            scan = _scan(container, _video_stream(container, config))
        if config.video_backend == "decord":
            return _decode_decord(data, config, scan)
        return _decode_pyav(data, config, scan)
    except MemoryError:
        raise
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        # PyAV itself raises IndexError and ValueError on half-written stream headers.
        raise BadMedia("corrupt_video", str(error)) from error


def uniform_indices(num_frames: int, num_wanted: int) -> npt.NDArray[np.int64]:
    """Increasing, distinct positions in `range(num_frames)`, first and last included: linspace rounded down, as the
    MMEB-V2 protocol samples. All positions where there are no more than `num_wanted`; the first where one is wanted.
    """
    count = min(num_frames, num_wanted)
    return np.arange(count, dtype=np.int64) * (num_frames - 1) // max(count - 1, 1)


@dataclass(frozen=True, slots=True)
class _Scan:
    """What the container says, undecoded. `pts` (shown frames; empty where any is missing) and `keys` (key frames) are
    increasing stream ticks; `decord_trap` names what decord 0.6 gets wrong in this file.
    """

    pts: list[int]
    keys: list[int]
    decord_trap: str


def _open(data: bytes) -> Any:
    return av.open(io.BytesIO(data), options={"format_whitelist": _FORMATS})


def _video_stream(container: Any, config: MediaConfig) -> Any:
    stream = container.streams.best("video")
    if stream is None:
        whole = any(other.codec_context for other in container.streams)
        raise BadMedia("no_video_stream" if whole else "corrupt_video", "no pictures inside")
    # Frame threads change which frames come out after a seek; workers are the parallelism here.
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    check_size(stream.width, stream.height, config)
    return stream


def _scan(container: Any, stream: Any) -> _Scan:
    """One pass over all packets. Raises `BadMedia("truncated_video")` where they end before the declared duration."""
    trap = "" if stream.index_entries else "no index"  # asked before the pass, which builds an index of its own
    if stream.codec_context.codec.canonical_name == "av1":
        trap = "AV1"
    pts: set[int] = set()
    keys: set[int] = set()
    # AVI stores no presentation times, and what FFmpeg makes up for reordered frames is wrong.
    trusted = not (container.format.name == "avi" and stream.codec_context.has_b_frames)
    end_s = 0.0
    for packet in container.demux():
        if packet.size == 0:
            continue
        if packet.pts is not None:
            end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != stream.index:
            continue
        if packet.is_discard:
            trap = "edit list"
        if packet.pts is None:
            trusted = False
            continue
        if packet.is_keyframe:
            keys.add(packet.pts)
        if not packet.is_discard:
            pts.add(packet.pts)
    _check_whole(container, sorted(pts), float(stream.time_base), end_s)
    return _Scan(sorted(pts) if trusted else [], sorted(keys), trap)


def _check_whole(container: Any, shown: list[int], tick_s: float, end_s: float) -> None:
    if container.duration is None:
        return
    duration_s = container.duration / av.time_base
    longest_gap_s = max((b - a for a, b in pairwise(shown)), default=0) * tick_s
    # `end_s` counts from zero and not from the start time: some muxers do so for the duration too, so that a late
    # start must not read as a missing end.
    if duration_s - end_s > max(longest_gap_s, _TRUNCATION_TOLERANCE * duration_s):
        raise BadMedia("truncated_video", f"declares {duration_s:.2f} s, ends at {end_s:.2f} s")


def _decode_pyav(data: bytes, config: MediaConfig, scan: _Scan) -> UInt8Array:
    wanted = [scan.pts[i] for i in uniform_indices(len(scan.pts), config.frames)]
    with _open(data) as container:
        frames = _seek_frames(container, _video_stream(container, config), wanted, scan.keys)
    return _rgb(frames or _all_through(data, config))


def _seek_frames(container: Any, stream: Any, wanted: list[int], keys: list[int]) -> list[Any]:
    """The frames shown at `wanted`, each decoded from the key frame before it; none where the container misleads."""
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
            # Landing after the key frame would show pictures whose references are missing.
            if frame.pts is None or frame.pts > (key if sought else pts):
                return []
            position, sought = frame.pts, False
            if frame.pts == pts:
                frames.append(frame)
                break
        else:
            return []
    return frames


def _all_through(data: bytes, config: MediaConfig) -> list[Any]:
    """Without an index: decode once to count what can be shown, and again to keep the uniform positions."""
    with _open(data) as container:
        count = sum(1 for _ in container.decode(_video_stream(container, config)))
    if count == 0:
        raise BadMedia("corrupt_video", "no frame can be decoded")
    wanted = set(uniform_indices(count, config.frames).tolist())
    with _open(data) as container:
        decoded = container.decode(_video_stream(container, config))
        return [frame for position, frame in enumerate(decoded) if position in wanted]


def _rgb(frames: list[Any]) -> UInt8Array:
    """Stacked and upright. Frames of another size than the first, which a stream may hold, are scaled to it."""
    scaler, width, height = VideoReformatter(), frames[0].width, frames[0].height
    stacked: UInt8Array = np.stack([scaler.reformat(frame, width, height, "rgb24").to_ndarray() for frame in frames])
    matrix = frames[0].side_data.get(SideDataType.DISPLAYMATRIX)
    return stacked if matrix is None else _upright(stacked, np.frombuffer(bytes(matrix), np.int32))


def _upright(frames: UInt8Array, matrix: npt.NDArray[np.int32]) -> UInt8Array:
    """Applies a display matrix (row-major 3 x 3, shown = stored @ matrix) rounded to quarter turns and mirrorings."""
    across, down = int(matrix[0]), int(matrix[4])
    if abs(int(matrix[1])) > abs(across):
        frames = frames.swapaxes(1, 2)
        across, down = int(matrix[3]), int(matrix[1])
    return np.ascontiguousarray(frames[:, :: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


def _decode_decord(data: bytes, config: MediaConfig, scan: _Scan) -> UInt8Array:
    """decord 0.6 (FFmpeg 4.1) never returns on some files and shows wrong frames of others: refused or contained."""
    if not sandbox.inside():
        problem = "decord can hang for ever and decodes only in the killable child"
        raise UserError("media.video_backend=decord", problem, "use Decoder or Sandbox, or the pyav backend")
    if scan.decord_trap:
        raise BadMedia("decord_unsupported", scan.decord_trap)
    import decord

    try:
        reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
        frames: UInt8Array = reader.get_batch(uniform_indices(len(reader), config.frames)).asnumpy()
    except RuntimeError as error:
        raise BadMedia("corrupt_video", str(error).partition("\n")[0]) from error
    return frames
