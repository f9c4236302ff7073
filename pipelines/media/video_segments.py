"""Segments of a video: decoded several at a time, because the file is sent to the sandbox and read once for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.media.cache import Pixels
from pipelines.media.videos import ScannedVideo
from pipelines.samples import TimeRange, UInt8Array

_MOST_BYTES = 256 << 20  # of pixels of one call, after which it ends
_CPU_FRACTION = 0.5  # of `max_cpu_s`, after which a call begins no further segment
_CHILD_REASONS = ("decoder_cpu_limit", "decoder_memory_limit", "decoder_time_limit", "decoder_crashed", "decoder_error")


def video_length(data: bytes, config: MediaConfig) -> float:
    """Return the length of a video in seconds, from its packets. Raises `BadMedia` as `decode_video` does."""
    return ScannedVideo(data, config).length_s


def decode_segments(
    data: bytes, segments: Sequence[TimeRange], config: MediaConfig
) -> tuple[UInt8Array, list[dict[str, Any]]]:
    """Decode the first of these segments, at least one, as many as a call should.

    Return the pixels of all in one row, and for each segment `shape` and `times_s`, or `reason` and `detail`. Raises
    `BadMedia` if the whole video is bad.
    """
    began_s = time.process_time()
    pixels: list[UInt8Array] = []
    results: list[dict[str, Any]] = []
    for found in ScannedVideo(data, config).decode(segments):
        if isinstance(found, BadMedia):
            results.append({"reason": found.reason, "detail": found.detail})
        else:
            frames, times_s = found
            pixels.append(frames.reshape(-1))
            results.append({"shape": frames.shape, "times_s": times_s})
        too_long = time.process_time() - began_s > _CPU_FRACTION * config.max_cpu_s
        if too_long or sum(some.nbytes for some in pixels) > _MOST_BYTES:
            break
    return np.concatenate([np.empty(0, np.uint8), *pixels]), results


def each_segment(
    call: Callable[..., Any], data: bytes, segments: Sequence[TimeRange], config: MediaConfig
) -> Iterator[Pixels | BadMedia]:
    """Yield the frames of each segment in order, or why it has none. `call` runs a function, in a sandbox or here.

    A segment that ends the child is found by decoding it alone, so that it costs no other segment.
    """
    waiting, at_once = list(segments), len(segments)
    while waiting:
        asked = waiting[:at_once]
        try:
            pixels, results = call(decode_segments, data, asked, config)
        except BadMedia as error:
            if error.reason in _CHILD_REASONS and len(asked) > 1:
                at_once = 1
                continue
            yield from [error] * len(asked)
            del waiting[: len(asked)]
            continue
        start = 0
        for one in results:
            if "reason" in one:
                yield BadMedia(one["reason"], one["detail"])
                continue
            stop = start + int(np.prod(one["shape"]))
            yield pixels[start:stop].reshape(one["shape"]), one["times_s"]
            start = stop
        del waiting[: len(results)]
