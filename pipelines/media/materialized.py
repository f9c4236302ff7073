"""What training decodes, stored in place of what it would be decoded from: chosen frames, rendered pages.

Frames cost a fraction of decoding a clip, in every epoch; an image of a page pays where rendering is slow (scans, dense
pages) and not where a page holds a few lines. Frames per video and pixels per page are settled at ingest.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import av
from PIL import Image

from pipelines.errors import BadMedia
from pipelines.samples import MediaKind, UInt8Array

SUFFIX: dict[MediaKind, str] = {"video": "avi", "document": "webp"}
_JPEG_QUALITY = 90


def materialize(kind: MediaKind, frames_THWC: UInt8Array, times_s: Sequence[float]) -> bytes:
    """Frames `[T, H, W, 3]` as Motion JPEG, a page `[1, H, W, 3]` as lossless WebP. Equal pixels give equal bytes.

    Frames keep the time between the first and the last of `times_s`; those between become evenly spaced.
    """
    if kind == "document":
        return _page(frames_THWC[0])
    return _motion_jpeg(frames_THWC, _rate(times_s))


def is_page_image(data: bytes) -> bool:
    """Whether a document is a rendered page already."""
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def _page(page_HWC: UInt8Array) -> bytes:
    sink = io.BytesIO()
    try:
        Image.fromarray(page_HWC).save(sink, "WEBP", lossless=True, method=2)
    except ValueError as error:  # the format ends at 16383 pixels a side
        raise BadMedia("extreme_aspect_ratio", str(error)) from error
    return sink.getvalue()


def _rate(times_s: Sequence[float]) -> Fraction:
    """Frames per second, as AVI holds it: two whole numbers."""
    span_s = times_s[-1] - times_s[0]
    return Fraction((len(times_s) - 1) / span_s).limit_denominator(100_000) if span_s > 0 else Fraction(1)


def _motion_jpeg(frames_THWC: UInt8Array, rate: Fraction) -> bytes:
    sink = io.BytesIO()
    with av.open(sink, "w", format="avi", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mjpeg", rate=rate)
        stream.height, stream.width = frames_THWC.shape[1:3]
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
