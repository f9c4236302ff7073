"""Decoded frames to RGB as a player shows them: upright, in square pixels, transparency on white."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from av import VideoFrame
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import VideoReformatter

from pipelines.config import MediaConfig
from pipelines.media.images import check_size, on_white
from pipelines.samples import UInt8Array

# WebM stores transparency as a second picture in each packet, which FFmpeg's own decoders of VP8 and VP9 pass over.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


def alpha_decoder(stream: Any) -> str | None:
    """Return the name of the decoder that a transparent WebM needs, or None."""
    is_transparent = stream.metadata.get("alpha_mode", "0") != "0"
    return ALPHA_DECODERS.get(stream.codec_context.codec.canonical_name) if is_transparent else None


def may_be_transparent(stream: Any) -> bool:
    """Return whether the headers say that frames have transparency."""
    form = stream.codec_context.format
    return alpha_decoder(stream) is not None or (form is not None and _has_alpha(form))


def to_rgb(frames: list[VideoFrame], aspect: Fraction | None, config: MediaConfig) -> UInt8Array:
    """Stack frames `[T, H, W, 3]`. `aspect` is the width of a pixel over its height, None if unknown.

    Frames of a different size, which a stream may hold, are scaled to the first. Raises `BadMedia` if square pixels
    make frames too large: too_many_pixels, extreme_aspect_ratio.
    """
    width, height = square_size(frames[0].width, frames[0].height, aspect, config)
    scaler = VideoReformatter()
    stacked: UInt8Array = np.stack([_rgb(scaler, frame, width, height) for frame in frames])
    matrix = frames[0].side_data.get(SideDataType.DISPLAYMATRIX)
    return stacked if matrix is None else _upright(stacked, np.frombuffer(bytes(matrix), np.int32))


def to_square(frames_THWC: UInt8Array, aspect: Fraction | None, config: MediaConfig) -> UInt8Array:
    """Scale RGB frames whose pixels are not square, as `to_rgb` does."""
    height, width = frames_THWC.shape[1:3]
    if square_size(width, height, aspect, config) == (width, height):
        return frames_THWC
    return to_rgb([VideoFrame.from_ndarray(frame) for frame in frames_THWC], aspect, config)


def square_size(width: int, height: int, aspect: Fraction | None, config: MediaConfig) -> tuple[int, int]:
    """Return the size at which a frame is shown. The shorter direction grows, as in players, so that no pixel is lost.

    Raises `BadMedia`: too_many_pixels, extreme_aspect_ratio.
    """
    if aspect is None or aspect <= 0 or aspect == 1:
        return width, height
    shown = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
    check_size(*shown, config)
    return shown


def _has_alpha(form: Any) -> bool:
    # The color table of `pal8` has transparent entries.
    return form.name == "pal8" or any(component.is_alpha for component in form.components)


def _rgb(scaler: VideoReformatter, frame: VideoFrame, width: int, height: int) -> UInt8Array:
    is_transparent = _has_alpha(frame.format)
    scaled = scaler.reformat(frame, width, height, "rgba" if is_transparent else "rgb24")
    pixels = np.asarray(scaled.to_ndarray(), np.uint8)
    return on_white(pixels) if is_transparent else pixels


def _upright(frames: UInt8Array, matrix: npt.NDArray[np.int32]) -> UInt8Array:
    """Apply a display matrix (row-major 3 x 3, shown = stored @ matrix), rounded to quarter turns and mirrorings."""
    across, down = int(matrix[0]), int(matrix[4])
    if abs(int(matrix[1])) > abs(across):
        frames = frames.swapaxes(1, 2)
        across, down = int(matrix[3]), int(matrix[1])
    return np.ascontiguousarray(frames[:, :: -1 if down < 0 else 1, :: -1 if across < 0 else 1])
