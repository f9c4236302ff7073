"""Videos: file bytes to evenly spaced uint8 RGB frames, with PyAV, or with decord in the sandbox."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.media import sandbox
from pipelines.media.containers import is_whole
from pipelines.media.images import check_size
from pipelines.media.libraries import import_optional
from pipelines.media.video_pixels import alpha_decoder, to_rgb, to_square
from pipelines.media.video_scan import Scan, scan_packets
from pipelines.samples import UInt8Array

# Demuxers that read one self-contained file: playlists and scripts could name other files and network addresses.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"
_TICK_TOLERANCE = 1e-6  # in sampling intervals: frame times are rounded


def decode_video(data: bytes, config: MediaConfig) -> tuple[UInt8Array, list[float]]:
    """Return the frames `[T, H, W, 3]` that `sample_frames` chooses, and when each is shown, in seconds from the start.

    Frames are as a player shows them: upright by the display matrix, in square pixels, transparency on white. Raises
    `BadMedia`: empty_file, corrupt_video, truncated_video, no_video_stream, too_long_video, too_many_frames,
    too_many_pixels, extreme_aspect_ratio, decord_unsupported. Raises `UserError` for decord outside the sandbox, or if
    it is not installed.
    """
    if not data:
        raise BadMedia("empty_file")
    try:
        with _open(data) as container:
            stream = _video_stream(container, config)
            aspect, scan = stream.sample_aspect_ratio, scan_packets(container, stream, config, is_whole(data))
        if config.video_backend == "decord":
            pixels, times_s = _decode_decord(data, config, scan)
            return to_square(pixels, aspect, config), times_s.tolist()
        frames, times_s = _decode_pyav(data, config, scan)
        return to_rgb(frames, aspect, config), times_s.tolist()
    except MemoryError:
        raise
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        # PyAV itself raises IndexError and ValueError on half-written stream headers.
        raise BadMedia("corrupt_video", str(error)) from error


def sample_frames(
    times_s: npt.NDArray[np.float64], config: MediaConfig, end_s: float | None = None
) -> npt.NDArray[np.int64]:
    """Choose frames of a video. Return increasing, distinct positions in `times_s`, at least one.

    `times_s` says when each frame is shown and increases. Without `config.fps`, `frames` positions are chosen, uniform
    over their order. With it, the frames shown at the start and after each 1 / fps seconds are chosen, or a uniform
    choice of `frames` of these. The last frame is shown until `end_s`, or as long as the one before it. A video with
    fewer frames gives each once: repeated frames would cost the model tokens and add nothing.
    """
    candidates = np.arange(len(times_s))
    if config.fps is not None and len(times_s) > 1:
        last_s = 2 * times_s[-1] - times_s[-2] if end_s is None else end_s
        starts_s = np.append(times_s, last_s) - times_s[0]
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


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the frames from the current position on."""
    name = alpha_decoder(stream)
    if name is None:
        yield from container.decode(stream)
        return
    decoder = av.CodecContext.create(name, "r")
    decoder.thread_count = 1
    for packet in container.demux(stream):
        yield from decoder.decode(packet if packet.size else None)


def _decode_pyav(data: bytes, config: MediaConfig, scan: Scan) -> tuple[list[Any], npt.NDArray[np.float64]]:
    frames: list[Any] = []
    if not scan.is_joined:
        all_times_s = scan.times_s(len(scan.pts))
        chosen = sample_frames(all_times_s, config, scan.end_s)
        times_s = all_times_s[chosen]
        with _open(data) as container:
            stream = _video_stream(container, config)
            frames = _seek_frames(container, stream, [scan.pts[i] for i in chosen], scan.keys)
    if not frames:
        frames, times_s = _all_through(data, config, scan)
    if any(frame.is_corrupt for frame in frames):
        # Only damage that FFmpeg reports: it conceals most, and its strict mode rejects sound streams too.
        raise BadMedia("corrupt_video", "the decoder had to invent parts of a frame")
    return frames, times_s


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
            decoder = _decoded(container, stream)
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


def _all_through(data: bytes, config: MediaConfig, scan: Scan) -> tuple[list[Any], npt.NDArray[np.float64]]:
    """Decode without an index: once to time the frames, and again to keep the chosen positions."""
    with _open(data) as container:
        ticks = [frame.pts for frame in _decoded(container, _video_stream(container, config))]
    if not ticks:
        raise BadMedia("corrupt_video", "no frame can be decoded")
    times_s, end_s = scan.times_of_decoded(ticks)
    chosen = sample_frames(times_s, config, end_s)
    wanted = set(chosen.tolist())
    with _open(data) as container:
        decoded = _decoded(container, _video_stream(container, config))
        return [frame for position, frame in enumerate(decoded) if position in wanted], times_s[chosen]


def _decode_decord(data: bytes, config: MediaConfig, scan: Scan) -> tuple[UInt8Array, npt.NDArray[np.float64]]:
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
        chosen = sample_frames(times_s, config, scan.end_s)
        frames: UInt8Array = reader.get_batch(chosen).asnumpy()
    except (RuntimeError, decord.DECORDError) as error:
        raise BadMedia("corrupt_video", str(error).partition("\n")[0]) from error
    return frames, times_s[chosen]
