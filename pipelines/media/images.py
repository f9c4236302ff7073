"""Still images: file bytes to uint8 RGB, in process.

PIL decodes, because cv2 resamples and decodes differently from the image processors of the backbones. HEIF needs the
extra `heif`, which adds it to PIL.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from functools import cache

import av
import numpy as np
from PIL import AvifImagePlugin, Image, TiffImagePlugin, UnidentifiedImageError

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.media.color import to_srgb
from pipelines.media.sandbox import exclude_from_cpu_limit
from pipelines.media.signatures import is_heif
from pipelines.samples import UInt8Array

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
_AVIF = (b"ftypavif", b"ftypavis")
_ORIENTATION = 0x0112  # of Exif
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_WHITE_IS_ZERO = 0
_PNG_BIT_DEPTH = 24  # its place in the file; the color type follows
_PNG_GREY, _PNG_RGB = 0, 2
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # several workers decode in parallel instead
# Kinds of grey that PIL can read and does not list, by byte order, photometric interpretation, bits. `_grey` inverts
# those in which zero is white.
for _order, _bits, _mode, _raw_mode in (
    *((order, 12, "I;16", "I;12") for order in (b"II", b"MM")),
    *(
        (b"II", 16, "I;16", "I;16"),
        (b"MM", 16, "I;16B", "I;16B"),
        (b"II", 32, "I", "I;32N"),
        (b"MM", 32, "I", "I;32BS"),
    ),
):
    for _photometric in (_WHITE_IS_ZERO, 1):
        _kind = (_order, _photometric, (1,), 1, (_bits,), ())
        TiffImagePlugin.OPEN_INFO.setdefault(_kind, (_mode, _raw_mode))
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

    Colors are sRGB: an embedded ICC profile is applied.

    The array may be read-only: a copy would cost a tenth of the time.

    `target_pixels` is the size to which the caller will shrink the image. A JPEG at least twice as wide and high is
    then decoded at 1/2, 1/4 or 1/8 of its size, which is cheaper and never below the target.

    Raises `BadMedia`: empty_file, unsupported_format, corrupt_image, too_many_pixels, extreme_aspect_ratio.
    """
    if not data:
        raise BadMedia("empty_file")
    try:
        with open_image(data) as image:
            check_size(image.width, image.height, config)
            if target_pixels is not None:
                _draft(image, target_pixels)
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                _read_planes_whole(image)
            return _upright(image, data)
    except Image.DecompressionBombError as error:
        raise BadMedia("too_many_pixels", str(error)) from error
    except UnidentifiedImageError as error:
        # PIL does not identify a file either when its first bytes are right and the rest of the header is missing.
        known = data.startswith(_SIGNATURES) or data[4:12] in _AVIF or is_heif(data)
        raise BadMedia("corrupt_image" if known else "unsupported_format", f"begins with {data[:8]!r}") from error
    except _DAMAGE as error:
        raise BadMedia("corrupt_image", str(error)) from error


def open_image(data: bytes) -> Image.Image:
    """Open an image file with PIL, which has then read its header. Raises what PIL raises, and `BadMedia` for HEIF.

    Without the extra `heif`, that is unsupported_format.
    """
    return Image.open(io.BytesIO(data), formats=_heif() if is_heif(data) else FORMATS)


@cache
def _heif() -> tuple[str, ...]:
    """Add HEIF to PIL."""
    try:
        with exclude_from_cpu_limit():
            import pillow_heif
    except ImportError as error:
        raise BadMedia("unsupported_format", "a HEIF picture; run `pip install 'rzen[heif]'` to read it") from error
    # Depth maps and thumbnails would be decoded, too.
    pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
    return ("HEIF",)


def opened_pixels(image: Image.Image, config: MediaConfig) -> UInt8Array:
    """Return the pixels of an image that is open already, as `decode_image` does. The image stays as it is.

    Raises `BadMedia`: corrupt_image, too_many_pixels, extreme_aspect_ratio.
    """
    try:
        check_size(image.width, image.height, config)
        return _upright(image, b"")
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


def _upright(image: Image.Image, data: bytes) -> UInt8Array:
    """Return RGB pixels of an image. `data` are the bytes of its file, empty if they are not known."""
    image.load()  # PNG may have its Exif data after the pixels
    upright = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    shown = _rgb(image, data)
    return np.asarray(Image.fromarray(shown).transpose(upright)) if upright is not None else shown


def _draft(image: Image.Image, target_pixels: int) -> None:
    scale = math.sqrt(target_pixels / (image.width * image.height))
    if image.format in ("JPEG", "MPO") and scale <= 0.5:
        image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))


def _read_planes_whole(image: TiffImagePlugin.TiffImageFile) -> None:
    """Correct PIL, which reads uncompressed planes of 16-bit values as if they had 8 bits."""
    if image.tag_v2.get(_BITS_PER_SAMPLE, (8,))[0] != 16:
        return
    order = "L" if image.tag_v2.prefix == b"II" else "B"
    for number, tile in enumerate(image.tile):
        if tile.codec_name == "raw" and isinstance(tile.args, tuple) and tile.args[0] in ("R", "G", "B", "A"):
            image.tile[number] = tile._replace(args=(f"{tile.args[0]};16{order}", *tile.args[1:]))


def _rgb(image: Image.Image, data: bytes) -> UInt8Array:
    profile, alpha = image.info.get("icc_profile"), _transparent_color(image, data)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _grey(image)
    elif alpha is None and image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))
    image.info.pop("transparency", None)  # PIL would convert it too
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    image = to_srgb(image, profile)
    if alpha is None:
        return np.asarray(image)
    return on_white(np.dstack([np.asarray(image), alpha]))


def _grey(image: Image.Image) -> Image.Image:
    """Return an 8-bit image of grey values that PIL keeps with more bits. Its own conversion would clip them."""
    is_tiff, values = image.format == "TIFF", np.asarray(image)
    bits, photometric = 16, 1
    if is_tiff:
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits, photometric = int(tags.get(_BITS_PER_SAMPLE, (16,))[0]), int(tags.get(_PHOTOMETRIC, 1))
    if image.mode in ("I", "F"):
        # Our choice: scientific values have no agreed white. They are stretched from their darkest to their brightest.
        values = values.astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("pixels that are not numbers")
        low, high = float(values.min()), float(values.max())
        greys = np.rint((values - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)
    else:
        most = (1 << min(bits, 16)) - 1
        greys = ((np.minimum(values, most).astype(np.uint32) * 255 + most // 2) // most).astype(np.uint8)
    return Image.fromarray(~greys if photometric == _WHITE_IS_ZERO else greys)


def _transparent_color(image: Image.Image, data: bytes) -> UInt8Array | None:
    """Return alpha `[H, W]` of a PNG in which one color is transparent, or None. PIL compares it with scaled values."""
    if not data or image.format != "PNG" or (color := image.info.get("transparency")) is None:
        return None
    bit_depth, color_type = data[_PNG_BIT_DEPTH], data[_PNG_BIT_DEPTH + 1]
    most = (1 << bit_depth) - 1
    if color_type == _PNG_GREY:
        scale = 1 if bit_depth in (1, 8, 16) else 255 // most
        is_color = np.asarray(image).astype(np.uint16) == (color & most) * scale
    elif color_type != _PNG_RGB:
        return None
    elif bit_depth == 8:
        is_color = (np.asarray(image) == np.bitwise_and(color, most)).all(axis=-1)
    else:
        # PIL keeps the upper halves of 16-bit colors. FFmpeg compares all bits.
        (frame,) = av.CodecContext.create("png", "r").decode(av.Packet(data))[:1]
        is_color = frame.to_ndarray(format="rgba64be")[..., 3] == 0
    return np.where(is_color, 0, 255).astype(np.uint8)
