"""Still images: file bytes to uint8 RGB, in process.

PIL decodes, because cv2 resamples and decodes differently from the image processors of the backbones.
"""

from __future__ import annotations

import io
import math
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.samples import UInt8Array

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
# What PIL's parsers raise on damaged files, in addition to their documented OSError.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
)


def decode_image(data: bytes, config: MediaConfig, target_pixels: int | None = None) -> UInt8Array:
    """Return upright RGB pixels `[H, W, 3]` of an image file: the first frame of an animation, transparency on white.

    The array may be read-only: a copy would cost a tenth of the time.

    `target_pixels` is the size to which the caller will shrink the image. A JPEG at least twice as wide and high is
    then decoded at 1/2, 1/4 or 1/8 of its size, which is cheaper and never below the target.

    Raises `BadMedia`: empty_file, unsupported_format, corrupt_image, too_many_pixels, extreme_aspect_ratio.
    """
    if not data:
        raise BadMedia("empty_file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(image.width, image.height, config)
            if target_pixels is not None:
                _draft(image, target_pixels)
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except Image.DecompressionBombError as error:
        raise BadMedia("too_many_pixels", str(error)) from error
    except UnidentifiedImageError as error:
        # PIL does not identify a file either when its first bytes are right and the rest of the header is missing.
        known = data.startswith(_SIGNATURES)
        raise BadMedia("corrupt_image" if known else "unsupported_format", f"begins with {data[:8]!r}") from error
    except _DAMAGE as error:
        raise BadMedia("corrupt_image", str(error)) from error


def check_size(width: float, height: float, config: MediaConfig) -> None:
    """Raise `BadMedia` for more than `max_pixels`, or for an aspect ratio above `max_aspect_ratio`."""
    if width * height > config.max_pixels:
        raise BadMedia("too_many_pixels", f"{width} x {height} > {config.max_pixels}")
    check_aspect(width, height, config)


def check_aspect(width: float, height: float, config: MediaConfig) -> None:
    """Raise `BadMedia` (extreme_aspect_ratio) if the longer edge is over `max_aspect_ratio` times the shorter one."""
    if max(width, height) > config.max_aspect_ratio * min(width, height):
        raise BadMedia("extreme_aspect_ratio", f"{width:g} x {height:g}, limit {config.max_aspect_ratio:g}")


def on_white(pixels: UInt8Array) -> UInt8Array:
    """Return RGB pixels `[H, W, 3]` of RGBA pixels `[H, W, 4]` on white."""
    image = Image.fromarray(pixels)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def _draft(image: Image.Image, target_pixels: int) -> None:
    scale = math.sqrt(target_pixels / (image.width * image.height))
    if image.format in ("JPEG", "MPO") and scale <= 0.5:
        image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))


def _rgb(image: Image.Image) -> UInt8Array:
    if image.mode.startswith("I;16"):
        # convert("RGB") would clip everything above 255 to white.
        return np.repeat(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        values = np.asarray(image).astype(np.float64)
        low, high = float(values.min()), float(values.max())
        # Our choice: scientific values have no agreed white. They are stretched from their darkest to their brightest.
        return _grey((values - low) * (255 / (high - low) if high > low else 0))
    if image.has_transparency_data:
        return on_white(np.asarray(image.convert("RGBA")))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _grey(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> UInt8Array:
    if not np.isfinite(values).all():
        raise ValueError("pixels that are not numbers")
    return np.repeat(np.rint(values).astype(np.uint8)[:, :, None], 3, axis=2)
