"""Decoded pixels, stored instead of their files: the frames of a video, the image of a page.

Reading frames costs a fraction of decoding a clip, in every epoch. An image of a page pays off if rendering is slow
(scans, dense pages), but not for a page of a few lines. Ingest fixes the frames per video and the pixels per page.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import av
from PIL import Image

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.media.images import decode_image
from pipelines.media.videos import uniform_indices
from pipelines.samples import MediaKind, UInt8Array

SUFFIX: dict[MediaKind, str] = {"video": "avi", "document": "webp"}
_JPEG_QUALITY = 90


def materialize(kind: MediaKind, frames_THWC: UInt8Array, times_s: Sequence[float]) -> bytes:
    """Encode frames `[T, H, W, 3]` as Motion JPEG, a page `[1, H, W, 3]` as lossless WebP.

    Equal pixels give equal bytes. Frames keep the time between the first and the last of `times_s`. The others become
    evenly spaced.
    """
    if kind == "document":
        return _page(frames_THWC[0])
    return _motion_jpeg(frames_THWC, _rate(times_s))


def join_frames(pictures: Sequence[bytes], config: MediaConfig, materialized: bool) -> bytes:
    """Encode a video that is a folder of pictures as Motion JPEG: all of them, or with `materialized` `config.frames`.

    When they were shown is unknown: one a second is our choice. Raises `BadMedia`: unequal_frames, too_many_frames, and
    the reasons of images.
    """
    if len(pictures) > config.max_video_frames:
        raise BadMedia("too_many_frames", f"{len(pictures)} pictures, at most {config.max_video_frames}")
    kept = uniform_indices(len(pictures), config.frames) if materialized else range(len(pictures))
    frames = [decode_image(pictures[number], config, config.image_pixels) for number in kept]
    shapes = {f"{frame.shape[1]} x {frame.shape[0]}" for frame in frames}
    if len(shapes) != 1:
        raise BadMedia("unequal_frames", f"frames of {', '.join(sorted(shapes)) or 'no picture'}")
    return _motion_jpeg(frames, Fraction(1))


def is_page_image(data: bytes) -> bool:
    """Return whether a document is a rendered page already."""
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def _page(page_HWC: UInt8Array) -> bytes:
    sink = io.BytesIO()
    try:
        Image.fromarray(page_HWC).save(sink, "WEBP", lossless=True, method=2)
    except ValueError as error:  # the format allows 16383 pixels per edge
        raise BadMedia("extreme_aspect_ratio", str(error)) from error
    return sink.getvalue()


def _rate(times_s: Sequence[float]) -> Fraction:
    """Return frames per second as AVI stores it: two whole numbers."""
    span_s = times_s[-1] - times_s[0]
    return Fraction((len(times_s) - 1) / span_s).limit_denominator(100_000) if span_s > 0 else Fraction(1)


def _motion_jpeg(frames_THWC: UInt8Array | Sequence[UInt8Array], rate: Fraction) -> bytes:
    sink = io.BytesIO()
    with av.open(sink, "w", format="avi", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mjpeg", rate=rate)
        stream.height, stream.width = frames_THWC[0].shape[:2]
        stream.pix_fmt = "yuvj420p"
        for number, frame_HWC in enumerate(frames_THWC):
            picture = io.BytesIO()
            Image.fromarray(frame_HWC).save(picture, "JPEG", quality=_JPEG_QUALITY)
            packet = av.Packet(picture.getvalue())
            packet.stream = stream
            packet.time_base = 1 / rate
            packet.pts = packet.dts = number
            packet.is_keyframe = True
            container.mux(packet)
    return sink.getvalue()
