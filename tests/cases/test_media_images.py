"""Every kind of PNG and grey TIFF, color profiles, AVIF. Expected values are computed from the written samples."""

import io
import struct
import zlib
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.media.images import decode_image
from tests.cases.measure_media import FILES

CONFIG = MediaConfig()
WIDTH, HEIGHT = 21, 13  # rows do not end with a byte


def packed(values: np.ndarray, bits: int) -> bytes:
    """Rows of samples `[H, N]`, high bits first."""
    as_bits = (values[..., None].astype(np.uint32) >> np.arange(bits - 1, -1, -1)) & 1
    return b"".join(np.packbits(row).tobytes() for row in as_bits.reshape(len(values), -1).astype(np.uint8))


def png(values_HWC: np.ndarray, bits: int, color_type: int, trns: bytes = b"", **chunks: bytes) -> bytes:
    height, width, _ = values_HWC.shape
    rows = packed(values_HWC.reshape(height, -1), bits)
    row_bytes = len(rows) // height
    filtered = b"".join(b"\0" + rows[i * row_bytes : (i + 1) * row_bytes] for i in range(height))

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))]
    parts += [chunk(name.encode(), body) for name, body in chunks.items()]
    parts += [chunk(b"tRNS", trns)] if trns else []
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", zlib.compress(filtered)), chunk(b"IEND", b"")])


def samples(bits: int, channels: int) -> np.ndarray:
    """Values of all sizes, the lowest and the highest included."""
    values = np.random.default_rng(bits).integers(0, 1 << bits, (HEIGHT, WIDTH, channels))
    values[0, 0], values[0, 1] = 0, (1 << bits) - 1
    return values


def shown(values: np.ndarray, bits: int) -> np.ndarray:
    """8-bit values `[H, W, 3]`."""
    return np.repeat(np.rint(values * 255 / ((1 << bits) - 1)), 3 // values.shape[-1], axis=-1)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("transparent", [None, "lowest", "highest", "some"])
def test_grey_png(bits: int, transparent: str | None) -> None:
    values = samples(bits, 1)
    color = {"lowest": 0, "highest": (1 << bits) - 1, "some": int(values[5, 7, 0]), None: 0}[transparent]
    expected = shown(values, bits)
    if transparent:
        expected[values[..., 0] == color] = 255
    trns = struct.pack(">H", color) if transparent else b""
    np.testing.assert_array_equal(decode_image(png(values, bits, 0, trns), CONFIG), expected)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("transparent", [False, True])
def test_rgb_png(bits: int, transparent: bool) -> None:
    values = samples(bits, 3)
    color = values[5, 7]
    values[6, 7] = color
    values[7, 7] = color ^ 1  # differs in the lowest bits only
    expected = shown(values, bits)
    if transparent:
        expected[5:7, 7] = 255
    trns = struct.pack(">3H", *color) if transparent else b""
    found = decode_image(png(values, bits, 2, trns), CONFIG)
    assert np.abs(found - expected).max() <= (1 if bits == 16 else 0)  # PIL takes the upper half of 16 bits


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("transparent", [False, True])
def test_palette_png(bits: int, transparent: bool) -> None:
    values = samples(bits, 1)
    palette = np.random.default_rng(0).integers(0, 256, (1 << bits, 3))
    alpha = np.full(1 << bits, 255) if not transparent else np.arange(1 << bits) * 255 // ((1 << bits) - 1)
    trns = alpha.astype(np.uint8).tobytes() if transparent else b""
    data = png(values, bits, 3, PLTE=palette.astype(np.uint8).tobytes())
    if transparent:  # after the palette
        data = png(values, bits, 3, PLTE=palette.astype(np.uint8).tobytes(), trns=trns)
    opacity = alpha[values] / 255
    expected = palette[values[..., 0]] * opacity + 255 * (1 - opacity)
    assert np.abs(decode_image(data, CONFIG) - expected).max() <= 1


@pytest.mark.parametrize(("color_type", "channels"), [(4, 2), (6, 4)])
@pytest.mark.parametrize("bits", [8, 16])
def test_png_with_alpha(color_type: int, channels: int, bits: int) -> None:
    values = samples(bits, channels)
    scaled = values * 255 / ((1 << bits) - 1)
    opacity = scaled[..., -1:] / 255
    expected = np.repeat(scaled[..., :-1], 4 - channels + 1 if channels == 2 else 1, axis=-1) * opacity
    expected = expected + 255 * (1 - opacity)
    assert np.abs(decode_image(png(values, bits, color_type), CONFIG) - expected).max() <= 2


def test_a_transparent_color_turns_with_its_picture() -> None:
    values = samples(4, 1)
    exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"  # orientation 6
    color = int(values[5, 7, 0])
    expected = shown(values, 4)
    expected[values[..., 0] == color] = 255
    found = decode_image(png(values, 4, 0, struct.pack(">H", color), eXIf=exif), CONFIG)
    np.testing.assert_array_equal(found, np.rot90(expected, -1))


def tiff(
    values: np.ndarray, bits: int, photometric: int, order: str, compression: int = 1, predictor: int = 1
) -> bytes:
    """A grey TIFF of one strip. `order` is < or >."""
    height, width = values.shape
    if predictor == 2:
        values = np.diff(values, axis=1, prepend=0) & ((1 << bits) - 1)
    body = values.astype(f"{order}u{bits // 8}").tobytes() if bits >= 16 else packed(values, bits)
    body = zlib.compress(body) if compression == 8 else body
    tags = {256: width, 257: height, 258: bits, 259: compression, 262: photometric, 273: 8, 277: 1, 278: height}
    tags |= {279: len(body)} | ({317: predictor} if predictor != 1 else {})
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(body))
    return head + body + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [1, 8])
def test_grey_tiff(bits: int, photometric: int, order: str, compression: int) -> None:
    values = samples(bits, 1)[..., 0]
    expected = shown(values[..., None], bits)
    found = decode_image(tiff(values, bits, photometric, order, compression), CONFIG)
    np.testing.assert_array_equal(found, expected if photometric == 1 else 255 - expected)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("photometric", [0, 1])
def test_grey_tiff_with_a_predictor(bits: int, photometric: int) -> None:
    values = samples(bits, 1)[..., 0]
    expected = shown(values[..., None], bits)
    found = decode_image(tiff(values, bits, photometric, "<", 8, 2), CONFIG)
    np.testing.assert_array_equal(found, expected if photometric == 1 else 255 - expected)


def test_stretched_values_of_a_tiff_are_inverted_where_zero_is_white() -> None:
    values = np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH) * 1000
    dark_first = decode_image(tiff(values, 32, 1, "<"), CONFIG)
    np.testing.assert_array_equal(decode_image(tiff(values, 32, 0, "<"), CONFIG), 255 - dark_first)
    assert dark_first[0, 0].tolist() == [0, 0, 0]


# --- color profiles -------------------------------------------------------------------------------------------------


def profile(name: str) -> bytes:
    return Image.open(FILES / name).info["icc_profile"]


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_profiles_of_every_format_are_applied(form: str) -> None:
    """Adobe RGB (200, 30, 60) is sRGB (233, 23, 57) by ImageMagick 6.9.11."""
    options = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}.get(form, {"quality": 100, "subsampling": "4:4:4"})
    image = Image.new("RGB", (32, 16), (200, 30, 60))
    data = encoded(image, form, icc_profile=profile("icc_adobe_rgb.jpg"), **options)
    assert np.abs(decode_image(data, CONFIG).astype(int) - (233, 23, 57)).max() <= 3


def test_transparency_is_kept_by_profiles() -> None:
    image = Image.new("RGBA", (32, 16), (200, 30, 60, 255))
    image.paste((200, 30, 60, 0), (0, 0, 16, 16))
    pixels = decode_image(encoded(image, "PNG", icc_profile=profile("icc_channels_swapped.png")), CONFIG)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert np.abs(pixels[0, -1].astype(int) - (57, 23, 201)).max() <= 1


def test_a_profile_of_srgb_changes_nothing() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(decode_image(encoded(noise, "PNG", icc_profile=srgb), CONFIG), np.asarray(noise))


@pytest.mark.parametrize("bad", [b"no profile", b"", None])
def test_a_profile_that_cannot_be_used_is_ignored(bad: bytes | None) -> None:
    image = Image.new("L", (32, 16), 77)
    data = encoded(image, "PNG", icc_profile=profile("icc_adobe_rgb.jpg") if bad is None else bad)
    assert decode_image(data, CONFIG)[0, 0].tolist() == [77] * 3


# --- AVIF -----------------------------------------------------------------------------------------------------------


def test_avif_is_decoded_upright_on_white() -> None:
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = decode_image(encoded(image, "AVIF", quality=100, exif=exif), CONFIG)
    assert pixels.shape == (40, 20, 3)
    assert np.abs(pixels[5, 10].astype(int) - (255, 0, 0)).max() <= 3
    assert np.abs(pixels[-5, 10].astype(int) - 255).max() <= 3


@pytest.mark.parametrize(("subsampling", "difference"), [("4:2:0", 6), ("4:4:4", 2)])  # filters of colors differ
def test_avif_looks_as_ffmpeg_shows_it(subsampling: str, difference: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    smooth = Image.fromarray(noise).resize((96, 64), Image.Resampling.BICUBIC)
    data = encoded(smooth, "AVIF", quality=90, subsampling=subsampling)
    with av.open(io.BytesIO(data)) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.abs(decode_image(data, CONFIG).astype(int) - frame).mean() < difference


@pytest.mark.parametrize("kept", [0.1, 0.6, 0.95])
def test_a_cut_avif_is_corrupt(kept: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(noise, "AVIF")
    with pytest.raises(BadMedia, match="corrupt_image"):
        decode_image(data[: int(len(data) * kept)], CONFIG)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [3, 4])
def test_a_tiff_of_one_plane_for_each_color(bits: int, order: str, channels: int) -> None:
    values = samples(bits, channels)
    planes = [values[..., i].astype(f"{order}u{bits // 8}").tobytes() for i in range(channels)]
    starts = [8 + len(planes[0]) * i for i in range(channels)]
    lists = {258: [bits] * channels, 273: starts, 279: [len(plane) for plane in planes]}
    tags = {256: WIDTH, 257: HEIGHT, 259: 1, 262: 2, 277: channels, 278: HEIGHT, 284: 2} | (
        {338: 2} if channels == 4 else {}
    )
    body = b"".join(planes)
    for tag, numbers in lists.items():
        tags[tag] = 8 + len(body)
        body += struct.pack(f"{order}{channels}I", *numbers)
    entries = [
        struct.pack(f"{order}HHII", tag, 4, channels if tag in lists else 1, value)
        for tag, value in sorted(tags.items())
    ]
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(body))
    data = head + body + struct.pack(f"{order}H", len(tags)) + b"".join(entries) + bytes(4)
    scaled = values * 255 / ((1 << bits) - 1)
    opacity = scaled[..., 3:] / 255 if channels == 4 else 1
    expected = scaled[..., :3] * opacity + 255 * (1 - opacity)
    assert np.abs(decode_image(data, CONFIG) - expected).max() <= 2
