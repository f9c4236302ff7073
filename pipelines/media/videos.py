"""Videos: file bytes to evenly spaced uint8 RGB frames, with PyAV, or with decord in the sandbox."""

from __future__ import annotations

import io
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
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
from pipelines.media.cache import Pixels
from pipelines.media.containers import is_whole
from pipelines.media.images import check_size
from pipelines.media.libraries import import_optional
from pipelines.media.video_pixels import alpha_decoder, to_rgb, to_square
from pipelines.media.video_scan import Scan, scan_packets
from pipelines.samples import TimeRange, UInt8Array

# Demuxers that read one self-contained file: playlists and scripts could name other files and network addresses.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"
_TICK_TOLERANCE = 1e-6  # in sampling intervals: frame times are rounded
_CLOCK_TOLERANCE_S = 0.0005  # containers round times to milliseconds, and so do ranges


def decode_video(data: bytes, config: MediaConfig) -> Pixels:
    """Return the frames `[T, H, W, 3]` that `sample_frames` chooses, and when each is shown, in seconds from the start.

    Frames are as a player shows them: upright by the display matrix, in square pixels, transparency on white. Raises
    `BadMedia`: empty_file, corrupt_video, truncated_video, no_video_stream, too_long_video, too_many_frames,
    too_many_pixels, extreme_aspect_ratio, decord_unsupported. Raises `UserError` for decord outside the sandbox, or if
    it is not installed.
    """
    (found,) = ScannedVideo(data, config).decode([None])
    if isinstance(found, BadMedia):
        raise found
    return found


class ScannedVideo:
    """A video whose packets were read once, and whose segments are decoded from the key frames before them.

    Raises the errors of `decode_video`, except those that only frames show.
    """

    def __init__(self, data: bytes, config: MediaConfig) -> None:
        if not data:
            raise BadMedia("empty_file")
        self._data, self._config = data, config
        with named_damage(), open_video(data) as container:
            stream = _video_stream(container, config)
            self._aspect = stream.sample_aspect_ratio
            self._scan = scan_packets(container, stream, config, is_whole(data))

    @property
    def length_s(self) -> float:
        """Return when the last frame ends, in seconds from the first one."""
        return self._scan.length_s

    def key_before(self, start_s: float) -> tuple[int, int, float] | None:
        """Return the key frame from which what is shown at a time can be decoded: its `pts` and its time in seconds.

        The first number is the `pts` of the key frame before it, which a seek surely finds. None without an index.
        """
        scan = self._scan
        if scan.is_joined or not scan.pts or not scan.keys:
            return None
        shown = max(0, bisect_right(scan.shown_s, start_s + _CLOCK_TOLERANCE_S) - 1)
        before = bisect_right(scan.keys, scan.pts[shown]) - 1
        if before < 0 or (place := bisect_left(scan.pts, scan.keys[before])) == len(scan.pts):
            return None
        return scan.keys[max(0, before - 1)], scan.keys[before], scan.shown_s[place]

    def decode(self, segments: Sequence[TimeRange | None]) -> Iterator[Pixels | BadMedia]:
        """Yield the frames of each segment in order, or why it has none. `None` is the whole video.

        Segments come in the order of their starts. Each is a function of the file and its range only. Times count from
        the start of the segment. What no seek finds is decoded from the start of the file, once for all segments.
        """
        through: Iterator[Pixels | BadMedia] | None = None
        at = 0  # number of the segment that `through` yields next
        for number, segment in enumerate(segments):
            found: Pixels | BadMedia | None
            try:
                with named_damage():
                    found = self._seek(segment)
            except BadMedia as error:
                found = error
            if found is None:
                if through is None:
                    through, at = self._decode_through(segments[number:]), number
                found = next(islice(through, number - at, None))
                at = number + 1
            yield found

    def _seek(self, segment: TimeRange | None) -> Pixels | BadMedia | None:
        """Return the frames of a segment, None if there is no index or it is wrong."""
        config, scan = self._config, self._scan
        if config.video_backend == "decord":
            pixels, times_s = _decode_decord(self._data, config, scan, segment)
            return to_square(pixels, self._aspect, config), times_s.tolist()
        if scan.is_joined:
            return None
        chosen, times_s = _choose(scan.times_s(len(scan.pts)), config, scan.end_s, segment)
        with open_video(self._data) as container:
            stream = _video_stream(container, config)
            frames = _seek_frames(container, stream, [scan.pts[i] for i in chosen], scan.keys)
        return self._pixels(frames, times_s) if frames else None

    def _decode_through(self, segments: Sequence[TimeRange | None]) -> Iterator[Pixels | BadMedia]:
        done = 0
        try:
            with named_damage():
                for frames, times_s in self._all_through(segments):
                    yield self._pixels(frames, times_s)
                    done += 1
        except BadMedia as error:
            yield from [error] * (len(segments) - done)

    def _all_through(self, segments: Sequence[TimeRange | None]) -> Iterator[tuple[list[Any], npt.NDArray[np.float64]]]:
        """Decode without an index: once to time the frames, and again to keep the chosen positions."""
        with open_video(self._data) as container:
            ticks = [frame.pts for frame in _decoded(container, _video_stream(container, self._config))]
        if not ticks:
            raise BadMedia("corrupt_video", "no frame can be decoded")
        all_times_s, end_s = self._scan.times_of_decoded(ticks)
        choices = [_choose(all_times_s, self._config, end_s, segment) for segment in segments]
        wanted = {position for chosen, _ in choices for position in chosen.tolist()}
        kept: dict[int, Any] = {}
        with open_video(self._data) as container:
            decoded = enumerate(_decoded(container, _video_stream(container, self._config)))
            for chosen, times_s in choices:
                positions = chosen.tolist()
                while positions[-1] not in kept and (item := next(decoded, None)) is not None:
                    if item[0] in wanted:
                        kept[item[0]] = item[1]
                yield [kept[position] for position in positions if position in kept], times_s
                kept = {position: frame for position, frame in kept.items() if position >= positions[0]}

    def _pixels(self, frames: list[Any], times_s: npt.NDArray[np.float64]) -> Pixels | BadMedia:
        if any(frame.is_corrupt for frame in frames):
            # Only damage that FFmpeg reports: it conceals most, and its strict mode rejects sound streams too.
            return BadMedia("corrupt_video", "the decoder had to invent parts of a frame")
        try:
            return to_rgb(frames, self._aspect, self._config), times_s.tolist()
        except BadMedia as error:
            return error


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


def _choose(
    times_s: npt.NDArray[np.float64], config: MediaConfig, end_s: float | None, segment: TimeRange | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the positions of the frames that show a segment, and when each is shown, from the segment's start.

    The first is the one that a player shows at the start, whenever it came.
    """
    if segment is None:
        chosen = sample_frames(times_s, config, end_s)
        return chosen, times_s[chosen]
    first = max(0, int(np.searchsorted(times_s, segment.start_s + _CLOCK_TOLERANCE_S, "right")) - 1)
    stop = max(first + 1, int(np.searchsorted(times_s, segment.end_s - _CLOCK_TOLERANCE_S, "left")))
    within_s = np.maximum(times_s[first:stop] - segment.start_s, 0.0)
    last_s = segment.end_s if end_s is None else min(end_s, segment.end_s)
    chosen = sample_frames(within_s, config, last_s - segment.start_s)
    return first + chosen, within_s[chosen]


@contextmanager
def named_damage() -> Iterator[None]:
    """Raise `BadMedia` (corrupt_video) for what the libraries raise on damaged files."""
    try:
        yield
    except MemoryError:
        raise
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        # PyAV itself raises IndexError and ValueError on half-written stream headers.
        raise BadMedia("corrupt_video", str(error)) from error


def _decoded_from(container: Any, stream: Any, keys: list[int]) -> Iterator[Any]:
    """Yield frames from the last of these key frames on, or from a little earlier. Nothing if no seek leads there."""
    # Transport streams are sought by the time of decoding, which may lead behind a key frame. The one before does not.
    for key in reversed(keys[-2:]):
        try:
            container.seek(key, stream=stream)
        except av.error.FFmpegError:
            return
        decoder = _decoded(container, stream)
        first = next(decoder, None)
        if first is not None and first.pts is not None and first.pts <= keys[-1]:
            yield first
            yield from decoder
            return


def open_video(data: bytes) -> Any:
    """Open a file with one of the demuxers that read nothing but these bytes."""
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
            decoder = _decoded_from(container, stream, keys[: before + 1])
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


def _decode_decord(
    data: bytes, config: MediaConfig, scan: Scan, segment: TimeRange | None
) -> tuple[UInt8Array, npt.NDArray[np.float64]]:
    """Decode with decord 0.6 (FFmpeg 4.1), which never returns on some files and gives wrong frames for others."""
    if not sandbox.in_sandbox():
        problem = "decord can hang indefinitely and decodes only in the killable child"
        raise UserError("media.video_backend=decord", problem, "use Decoder or Sandbox, or the pyav backend")
    with open_video(data) as container:
        first = next(container.decode(_video_stream(container, config)), None)
    turned = first is not None and SideDataType.DISPLAYMATRIX in first.side_data
    if trap := scan.decord_trap or ("display matrix" if turned else ""):
        raise BadMedia("decord_unsupported", trap)
    decord = import_optional("decord", "media.video_backend", "pyav")
    try:
        reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
        chosen, times_s = _choose(scan.times_s(len(reader)), config, scan.end_s, segment)
        frames: UInt8Array = reader.get_batch(chosen).asnumpy()
    except (RuntimeError, decord.DECORDError) as error:
        raise BadMedia("corrupt_video", str(error).partition("\n")[0]) from error
    return frames, times_s
