"""Over 500 hostile, damaged and merely odd files, each with what may become of it. Seeded: the same files every time.

    corpus()      all of them: `CorpusFile(name, kind, data, outcomes, look)`
    LIMITS        the settings that the outcomes are true for

Odd but good files tell how they must look (`Look`); bad ones tell the one reason, or the few, under which they may be
counted; randomly damaged ones may be used or rejected under any reason of their kind. Sizes are small, times short.
"""

from __future__ import annotations

import io
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.container
import av.logging
import numpy as np
import pymupdf
from PIL import Image

from pipelines.config import MediaConfig
from pipelines.samples import MediaKind, UInt8Array
from pipelines.sources.folder import KINDS
from tests.encoders import CONSTANT, scheduling_kept

LIMITS = MediaConfig(
    frames=4,
    page_pixels=40_000,
    max_pixels=4_000_000,
    max_bytes=24 << 20,
    max_video_s=600.0,
    max_video_frames=300,
    max_pages=500,
    max_cpu_s=1,
    max_memory_bytes=1 << 30,
)
USED = "used"
STOPPED = frozenset({"decoder_cpu_limit", "decoder_memory_limit", "decoder_time_limit", "decoder_crashed"})
_PICTURE = {"too_many_pixels", "extreme_aspect_ratio"}
_ENDLESS = {"decoder_cpu_limit", "decoder_memory_limit"}
_SHORT = {"corrupt_video", "truncated_video"}
# What a file may be counted under that is damaged at random: never decoder_crashed or decoder_error.
DAMAGE: dict[MediaKind, frozenset[str]] = {
    "image": frozenset({"corrupt_image", "unsupported_format"} | _PICTURE),
    "video": frozenset({"no_video_stream", "too_long_video", "too_many_frames"} | _SHORT | _PICTURE | _ENDLESS),
    "document": frozenset({"corrupt_pdf", "not_a_pdf", "encrypted_pdf", "no_such_page"} | {"too_many_pages"} | _ENDLESS)
    | {"extreme_aspect_ratio"},
}
Colour = tuple[int, int, int]
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


@dataclass(frozen=True)
class Look:
    """`shape` is (frames, height, width); `colours` maps (frame, y, x), negative ones from the end, to RGB."""

    shape: tuple[int, int, int]
    colours: dict[tuple[int, int, int], Colour] = field(default_factory=dict)
    tolerance: int = 3
    shape_tolerance: int = 0

    def differences(self, frames: UInt8Array) -> list[str]:
        """What is not as it should be."""
        shape = frames.shape[:3]
        if len(shape) != 3 or max(abs(a - b) for a, b in zip(shape, self.shape, strict=True)) > self.shape_tolerance:
            return [f"shape {shape}, expected {self.shape}"]
        found = {place: tuple(int(value) for value in frames[place]) for place in self.colours}
        return [
            f"{place} is {found[place]}, expected {colour}"
            for place, colour in self.colours.items()
            if max(abs(a - b) for a, b in zip(found[place], colour, strict=True)) > self.tolerance
        ]


@dataclass(frozen=True)
class CorpusFile:
    """One file. `outcomes` are reasons, and `USED` where it may be used; `look` is checked when it is."""

    name: str
    data: bytes
    outcomes: frozenset[str]
    look: Look | None = None

    @property
    def kind(self) -> MediaKind:
        """The kind that `read_folder` takes from the name."""
        return KINDS[Path(self.name).suffix]


def corpus(seed: int = 0) -> list[CorpusFile]:
    """All files. Equal seeds give equal bytes, but for the encrypted documents, whose salt is drawn elsewhere."""
    av.logging.set_level(None)
    files = [*_images(), *_videos(), *_documents(), *_random_damage(seed)]
    assert len({file.name for file in files}) == len(files)
    return files


def good(name: str, data: bytes, look: Look) -> CorpusFile:
    """A file that must be used, and how it must look."""
    return CorpusFile(name, data, frozenset({USED}), look)


def bad(name: str, data: bytes, *reasons: str) -> CorpusFile:
    """A file that must end under one of `reasons`, which may include `USED`."""
    return CorpusFile(name, data, frozenset(reasons))


def _noise(rng: np.random.Generator, height: int, width: int) -> UInt8Array:
    """Blotches: compressible like a photo, and different everywhere."""
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)


# --- images ---------------------------------------------------------------------------------------------------------


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _quarters() -> Image.Image:
    """64 x 48: red and green above, blue and white below."""
    image = Image.new("RGB", (64, 48), WHITE)
    for colour, corner in ((RED, (0, 0)), (GREEN, (32, 0)), (BLUE, (0, 24))):
        image.paste(colour, (*corner, corner[0] + 32, corner[1] + 24))
    return image


def _corners(height: int, width: int, colours: Sequence[Colour], tolerance: int = 3) -> Look:
    """Top left, top right, bottom left, bottom right."""
    places = [(0, 4, 4), (0, 4, -5), (0, -5, 4), (0, -5, -5)]
    return Look((1, height, width), dict(zip(places, colours, strict=True)), tolerance)


_UPRIGHT = _corners(48, 64, (RED, GREEN, BLUE, WHITE), 12)
# What each EXIF orientation shows of a stored image with these four corners.
_EXIF = {
    1: (RED, GREEN, BLUE, WHITE),
    2: (GREEN, RED, WHITE, BLUE),
    3: (WHITE, BLUE, GREEN, RED),
    4: (BLUE, WHITE, RED, GREEN),
    5: (RED, BLUE, GREEN, WHITE),
    6: (BLUE, RED, WHITE, GREEN),
    7: (WHITE, GREEN, BLUE, RED),
    8: (GREEN, WHITE, RED, BLUE),
}


def _images() -> Iterator[CorpusFile]:
    yield from _odd_images()
    yield from _bad_images()


def _odd_images() -> Iterator[CorpusFile]:
    quarters = _quarters()
    for orientation, colours in _EXIF.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        height, width = (64, 48) if orientation >= 5 else (48, 64)
        look = _corners(height, width, colours, 12)
        yield good(f"exif-orientation-{orientation}.jpg", _encoded(quarters, "JPEG", quality=95, exif=exif), look)
    exif = Image.Exif()
    exif[0x0112] = 6
    for form, suffix in (("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")):
        options = {"lossless": True} if form == "WEBP" else {}
        data = _encoded(quarters, form, exif=exif, **options)
        yield good(f"exif-orientation-6.{suffix}", data, _corners(64, 48, _EXIF[6]))

    sixteen = np.full((8, 16), 32896, np.uint16)
    sixteen[:, :8] = 257
    yield good("16-bit.png", _encoded(Image.fromarray(sixteen), "PNG"), _halves((1, 1, 1), (128, 128, 128)))
    yield good("16-bit.tif", _encoded(Image.fromarray(sixteen), "TIFF"), _halves((1, 1, 1), (128, 128, 128)))
    real = np.where(np.arange(16) < 8, -1.0, 3.0).astype(np.float32) * np.ones((8, 1), np.float32)
    yield good("float.tif", _encoded(Image.fromarray(real), "TIFF"), _halves(BLACK, WHITE))

    glass = Image.new("RGBA", (16, 8), (0, 0, 0, 0))
    glass.paste((*BLUE, 255), (0, 0, 8, 8))
    palette = Image.new("P", (16, 8), 1)
    palette.putpalette([*BLUE, *RED])
    palette.paste(0, (0, 0, 8, 8))
    for form, suffix, options in (("PNG", "png", {}), ("WEBP", "webp", {"lossless": True}), ("GIF", "gif", {})):
        yield good(f"transparency.{suffix}", _encoded(glass, form, **options), _halves(BLUE, WHITE))
    yield good("transparent-colour.png", _encoded(palette, "PNG", transparency=1), _halves(BLUE, WHITE))
    grey = Image.new("LA", (16, 8), (0, 0))
    grey.paste((0, 255), (0, 0, 8, 8))
    yield good("transparent-grey.png", _encoded(grey, "PNG"), _halves(BLACK, WHITE))

    frames = [Image.new("RGB", (16, 8), colour) for colour in (RED, GREEN, BLUE)]
    for form, suffix in (("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png"), ("TIFF", "tif")):
        options = {"lossless": True} if form == "WEBP" else {}
        data = _encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        yield good(f"animation.{suffix}", data, _halves(RED, RED))
    many = [Image.new("P", (1, 1), i % 2) for i in range(3000)]
    data = _encoded(many[0], "GIF", save_all=True, append_images=many[1:])
    yield good("animation-3000-frames.gif", data, Look((1, 1, 1)))

    yield good("cmyk.jpg", _encoded(quarters.convert("CMYK"), "JPEG", quality=95), _UPRIGHT)
    yield good("progressive.jpg", _encoded(quarters, "JPEG", quality=95, progressive=True), _UPRIGHT)
    yield good("palette.png", _encoded(quarters.quantize(8), "PNG"), _UPRIGHT)
    bits = Image.new("1", (16, 8), 1)
    bits.paste(0, (0, 0, 8, 8))
    yield good("one-bit.png", _encoded(bits, "PNG"), _halves(BLACK, WHITE))
    yield good("one-bit.tif", _encoded(bits, "TIFF", compression="group4"), _halves(BLACK, WHITE))
    yield good("two-pictures.jpg", _encoded(quarters, "MPO", save_all=True, append_images=[quarters]), _UPRIGHT)
    yield good("a-png-really.jpg", _encoded(quarters, "PNG"), _UPRIGHT)
    yield good("a-jpeg-really.png", _encoded(quarters, "JPEG", quality=95), _UPRIGHT)
    yield good("trailing-garbage.jpg", _encoded(quarters, "JPEG", quality=95) + bytes(5000), _UPRIGHT)
    yield good("trailing-garbage.png", _encoded(quarters, "PNG") + b"<script>" * 500, _UPRIGHT)
    yield good("large-profile.jpg", _encoded(quarters, "JPEG", quality=95, icc_profile=bytes(300_000)), _UPRIGHT)
    yield good("one-pixel.png", _encoded(Image.new("RGB", (1, 1), RED), "PNG"), Look((1, 1, 1), {(0, 0, 0): RED}))
    yield good("aspect-ratio-200.png", _encoded(Image.new("RGB", (200, 1), RED), "PNG"), Look((1, 1, 200)))
    limit = Image.new("L", (2000, 2000), 255)
    yield good("exactly-the-largest.png", _encoded(limit, "PNG"), Look((1, 2000, 2000), {(0, -1, -1): WHITE}))


def _halves(left: Colour, right: Colour) -> Look:
    return Look((1, 8, 16), {(0, 4, 3): left, (0, 4, -3): right}, tolerance=1)


def _png(width: int, height: int, depth: int, colour: int, body: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def _inflating(block: bytes, repeats: int) -> bytes:
    """A zlib stream of `block` over and over. Blocks flushed in full do not refer to each other, and so can be copied;
    the checksum at the end is wrong, as nobody gets that far.
    """
    packer = zlib.compressobj(9, wbits=-15)
    packed = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x78\xda" + packed * repeats + b"\x03\x00" + bytes(4)


def _bad_images() -> Iterator[CorpusFile]:
    quarters = _quarters()
    for suffix in ("jpg", "png", "webp", "gif", "bmp", "tif"):
        yield bad(f"zero-length.{suffix}", b"", "empty_file")
    yield bad("too-many-bytes.jpg", _encoded(quarters, "JPEG") + bytes(LIMITS.max_bytes), "too_many_bytes")
    bomb = _inflating(bytes(1 << 20), 50)  # 50 MB of zeros: 20,000 x 20,000 black and white pixels
    yield bad("decompression-bomb.png", _png(20_000, 20_000, 1, 0, bomb), "too_many_pixels")
    yield bad("declares-2-billion-wide.png", _png(2**31 - 1, 1, 8, 2, b""), "too_many_pixels")
    yield bad("declares-60000-squared.png", _png(60_000, 60_000, 16, 6, zlib.compress(b"")), "too_many_pixels")
    yield bad("inflates-further-than-its-size.png", _png(64, 64, 8, 2, bomb), USED, "corrupt_image")
    text = b"Comment\0\0" + _inflating(bytes(1 << 20), 200)
    small = zlib.compress(b"\0\xff\xff\xff")
    yield bad("text-bomb.png", _png(1, 1, 8, 2, small, (b"zTXt", text)), USED, "corrupt_image")
    profile = b"icc\0\0" + _inflating(bytes(1 << 20), 200)
    yield bad("profile-bomb.png", _png(1, 1, 8, 2, small, (b"iCCP", profile)), USED, "corrupt_image")
    yield bad("no-width.png", _png(0, 64, 8, 2, small), "corrupt_image")
    yield bad("unknown-colour-type.png", _png(64, 64, 8, 5, small), "corrupt_image")
    png = _encoded(quarters, "PNG")
    yield bad("wrong-checksum.png", png[:-20] + bytes([png[-20] ^ 255]) + png[-19:], "corrupt_image")
    yield bad("header-only.png", png[:33], "corrupt_image")
    for size, name in (((201, 1), "flat"), ((1, 201), "tall"), ((3000, 10), "ribbon")):
        yield bad(f"aspect-ratio-{name}.png", _encoded(Image.new("RGB", size), "PNG"), "extreme_aspect_ratio")

    jpeg = _encoded(quarters, "JPEG", quality=95)
    size = jpeg.index(b"\xff\xc0") + 5  # height and width in the frame header
    yield bad("declares-65535-squared.jpg", jpeg[:size] + b"\xff\xff\xff\xff" + jpeg[size + 4 :], "too_many_pixels")
    yield bad("no-height.jpg", jpeg[:size] + bytes(2) + jpeg[size + 2 :], "corrupt_image")
    yield bad("no-end.jpg", jpeg[:-200], "corrupt_image")
    yield bad("marker-only.jpg", b"\xff\xd8\xff", "corrupt_image")
    yield bad("scan-bomb.jpg", _scan_bomb(), "decoder_cpu_limit", "corrupt_image", USED)

    gif = _encoded(quarters, "GIF")
    yield bad("declares-65535-squared.gif", gif[:6] + b"\xff\xff\xff\xff" + gif[10:], "too_many_pixels")
    frame = gif.index(b"\x2c") + 5  # size of the first frame, on a small screen
    yield bad(
        "frame-beyond-its-screen.gif", gif[:frame] + b"\xff\xff\xff\xff" + gif[frame + 4 :], *DAMAGE["image"], USED
    )
    webp = _encoded(quarters, "WEBP", lossless=True)
    declares = b"VP8X" + struct.pack("<II", 10, 0) + b"\xfe\x3f\x00\xfe\x3f\x00"
    riff = declares + webp[12:]
    data = b"RIFF" + struct.pack("<I", 4 + len(riff)) + b"WEBP" + riff
    yield bad("declares-16383-squared.webp", data, "too_many_pixels", "corrupt_image", "decoder_memory_limit")
    bmp = _encoded(quarters, "BMP")
    huge = struct.pack("<ii", 2**31 - 1, 2**31 - 1)
    yield bad("declares-2-billion-squared.bmp", bmp[:18] + huge + bmp[26:], "too_many_pixels")
    yield bad("no-width.bmp", bmp[:18] + bytes(8) + bmp[26:], "corrupt_image")
    tiff = _encoded(quarters, "TIFF")
    yield bad("directory-in-itself.tif", _tiff_loop(tiff), USED, "corrupt_image")
    yield bad("directory-beyond-the-end.tif", tiff[:4] + struct.pack("<I", 10**9) + tiff[8:], "corrupt_image")
    wide = _tiff_with(tiff, 256, 100_000)
    yield bad("declares-100000-wide.tif", wide, "extreme_aspect_ratio", "too_many_pixels")

    others: dict[str, bytes] = {
        "html": b"<!DOCTYPE html><html><body>404</body></html>",
        "text": b"this is not a picture",
        "zeros": bytes(4096),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
        "pdf": one_page(),
        "zip": _zip(),
        "mp4": b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41" + bytes(200),
    }
    for name, data in others.items():
        yield bad(f"{name}-really.jpg", data, "unsupported_format")
    yield bad("heic-really.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), "corrupt_image")


def _scan_bomb() -> bytes:
    """A progressive JPEG of 4 megapixels whose last scan comes 3,000 times: a pass over all pixels for each."""
    data = _encoded(Image.new("L", (2000, 2000), 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 3000 + data[-2:]


def _tiff_with(data: bytes, tag: int, value: int) -> bytes:
    """`data` with one entry of its first directory set to another number."""
    start = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, start)[0]
    changed = bytearray(data)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from("<H", data, entry)[0] == tag:
            struct.pack_into("<HII", changed, entry + 2, 4, 1, value)
            return bytes(changed)
    raise AssertionError(f"no tag {tag}")


def _tiff_loop(data: bytes) -> bytes:
    start = struct.unpack_from("<I", data, 4)[0]
    after = start + 2 + 12 * struct.unpack_from("<H", data, start)[0]
    return data[:after] + struct.pack("<I", start) + data[after + 4 :]


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("word/document.xml"), "<w:document/>")
    return buffer.getvalue()


# --- videos ---------------------------------------------------------------------------------------------------------

_RATE = 10
_NUM_FRAMES = 23  # 2.3 s; the four that uniform sampling takes are 0, 7, 14, 22
_SAMPLED = (0, 7, 14, 22)


def clip(
    form: str = "mp4",
    codec: str = "libx264",
    *,
    frames: Sequence[UInt8Array] | int = _NUM_FRAMES,
    times: Sequence[float] | None = None,
    size: tuple[int, int] = (64, 48),
    gop: int = 10,
    shift_s: float = 0.0,
    skip_packets: int = 0,
    rotation: dict[str, Any] | None = None,
    pix_fmt: str = "yuv420p",
    container_options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
    sound: bool = False,
) -> bytes:
    """A video file. Given a number of frames, frame i is grey 8 * i + 8 with a red top left corner.

    `times` (s) are when frames are shown, 10 a second where not given; `shift_s` delays all of them, or cuts the start
    off; `skip_packets` are lost at the front, as by a stream copy that does not begin at a key frame.
    """
    pictures = [_numbered(i, size) for i in range(frames)] if isinstance(frames, int) else frames
    # To a file: moving the index to the front (faststart) reopens it by name.
    with (
        scheduling_kept(),
        tempfile.NamedTemporaryFile() as file,
        av.open(file.name, "w", format=form, options=container_options or {}) as container,
    ):
        container.flags |= av.container.Flags.bitexact.value
        options = CONSTANT.get(codec, {}) | (codec_options or {})
        stream: Any = container.add_stream(codec, rate=_RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000) if times else Fraction(1, _RATE)
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(**rotation)
        voice = container.add_stream("aac", rate=16000) if sound else None
        packets = []
        for i, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts = round(times[i] * 1000) if times else i
            frame.time_base = stream.codec_context.time_base
            packets += stream.encode(frame)
        packets += stream.encode()
        if voice is not None:
            packets = [*_silence(voice), *packets]
        for packet in packets[skip_packets:]:
            ticks = round(Fraction(shift_s).limit_denominator(1000) / packet.time_base)
            packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
            container.mux(packet)
        container.close()
        return Path(file.name).read_bytes()


def _numbered(number: int, size: tuple[int, int]) -> UInt8Array:
    pixels = np.full((size[1], size[0], 3), 8 * number + 8, np.uint8)
    pixels[:16, :16] = RED
    return pixels


def _silence(stream: Any, seconds: float = 3.0) -> list[Any]:
    packets = []
    for i in range(round(seconds * 16000 / 1024)):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, 1024 * i, Fraction(1, 16000)
        packets += stream.encode(frame)
    return packets + stream.encode()


def _sound_only(form: str, codec: str = "aac", cover: bool = False) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        container.flags |= av.container.Flags.bitexact.value
        stream = container.add_stream(codec, rate=16000)
        picture: Any = container.add_stream("mjpeg", rate=1) if cover else None
        if picture is not None:
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
        packets = _silence(stream)
        if picture is not None:
            packets += picture.encode(av.VideoFrame.from_ndarray(_numbered(1, (64, 48)))) + picture.encode()
        for packet in packets:
            container.mux(packet)
    return buffer.getvalue()


def shows(numbers: Sequence[int], width: int = 64, height: int = 48) -> Look:
    """The frames of a numbered clip: their greys, and the red corner at the top left."""
    greys = {(i, -8, -8): (8 * number + 8,) * 3 for i, number in enumerate(numbers)}
    return Look((len(numbers), height, width), greys, tolerance=3)


def _videos() -> Iterator[CorpusFile]:
    yield from _odd_videos()
    yield from _bad_videos()


def _odd_videos() -> Iterator[CorpusFile]:
    whole = shows(_SAMPLED)
    containers = {
        "mp4": ("mp4", "libx264"),
        "mov": ("mov", "libx264"),
        "mkv": ("matroska", "libx264"),
        "webm": ("webm", "libvpx-vp9"),
        "avi": ("avi", "mpeg4"),
    }
    for suffix, (form, codec) in containers.items():
        for gop in (4, 100):
            yield good(f"plain-gop-{gop}.{suffix}", clip(form, codec, gop=gop), whole)
    yield good("vp8.webm", clip("webm", "libvpx"), whole)
    yield good("av1.mp4", clip("mp4", "libsvtav1"), whole)
    yield good("av1.webm", clip("webm", "libsvtav1"), whole)
    quiet = {"x265-params": "log-level=none:pools=1"}
    yield good("hevc-open-gop.mp4", clip("mp4", "libx265", gop=4, codec_options=quiet), whole)
    open_gop = {"x264-params": "open-gop=1:bframes=3:scenecut=0"}
    yield good("h264-open-gop.mp4", clip(gop=5, codec_options=open_gop), whole)
    yield good("reordered-frames-without-times.avi", clip("avi"), whole)
    yield good("motion-jpeg.avi", clip("avi", "mjpeg", pix_fmt="yuvj420p"), whole)
    yield good("ten-bit.mp4", clip(pix_fmt="yuv420p10le"), whole)
    yield good("flash-really.mp4", clip("flv", "flv"), whole)
    yield good("matroska-really.mp4", clip("matroska"), whole)
    yield good("fragmented.mp4", clip(container_options={"movflags": "frag_keyframe+empty_moov"}), whole)
    yield good("index-first.mp4", clip(container_options={"movflags": "faststart"}), whole)
    yield good("sound-first-and-longer.mkv", clip("matroska", sound=True), whole)
    yield good("odd-size.mp4", clip(size=(65, 49), pix_fmt="yuv444p"), shows(_SAMPLED, 65, 49))
    yield good("mpegts-really.mp4", clip("mpegts"), whole)
    yield good("mpeg2-in-mpegts-really.mp4", clip("mpegts", "mpeg2video"), whole)
    yield good("program-stream-really.mp4", clip("mpeg", "mpeg2video"), whole)
    yield good("mpegts-clock-wraps-really.mp4", clip("mpegts", shift_s=2**33 / 90_000 - 1.5), whole)
    for suffix, form in (("mp4", "mp4"), ("mkv", "matroska")):
        yield good(f"starts-at-37-s.{suffix}", clip(form, shift_s=37.0), whole)
    yield good("starts-at-3700-s-in-mpegts-really.mp4", clip("mpegts", shift_s=3700.0), whole)
    yield good("starts-at-3700-s.mkv", clip("matroska", shift_s=3700.0), whole)
    # Negative times make the muxer write an edit list that hides the first five frames.
    yield good("edit-list.mp4", clip(shift_s=-0.5), shows((5, 10, 16, 22)))
    yield good("edit-list.mov", clip("mov", shift_s=-0.5), shows((5, 10, 16, 22)))
    for suffix, form in (("mp4", "mp4"), ("mkv", "matroska"), ("mpegts-really.mp4", "mpegts")):
        # Without B-frames, so that nothing of the first group can be shown.
        data = clip(form, skip_packets=3, codec_options={"x264-params": "bframes=0:scenecut=0"})
        yield good(f"copied-off-a-key-frame.{suffix}", data, shows((10, 14, 18, 22)))
    # Frames close together, then far apart: uniform over the frames, not over the time.
    uneven = [*(0.04 * i for i in range(11)), *(0.4 + 0.3 * i for i in range(1, 13))]
    for suffix, form in (("mp4", "mp4"), ("mkv", "matroska")):
        yield good(f"variable-rate.{suffix}", clip(form, times=uneven), whole)
    yield good("pause-of-a-minute.mkv", clip("matroska", times=[*range(22), 81.0]), whole)
    for suffix, form in (("mp4", "mp4"), ("mov", "mov")):
        for degrees, corner, shape in ((90, (-5, 4), (64, 48)), (180, (-5, -5), (48, 64)), (-90, (4, -5), (64, 48))):
            look = Look((4, *shape), {(0, *corner): (254, 0, 0)}, tolerance=25)
            yield good(f"rotation-{degrees % 360}.{suffix}", clip(form, rotation={"degrees": degrees}), look)
    look = Look((4, 48, 64), {(0, 4, -5): (254, 0, 0)}, tolerance=25)
    yield good("mirrored.mp4", clip(rotation={"degrees": 0, "hflip": True}), look)
    for count in (1, 2, 3):
        yield good(f"frames-{count}.mp4", clip(frames=count), shows(range(count)))
    yield good("frames-1.webm", clip("webm", "libvpx-vp9", frames=1), shows((0,)))
    animation = [Image.fromarray(_numbered(i, (64, 48))) for i in range(5)]
    data = _encoded(animation[0], "GIF", save_all=True, append_images=animation[1:], duration=100)
    yield good("animated-gif-really.mp4", data, Look((4, 48, 64)))


def _bad_videos() -> Iterator[CorpusFile]:
    for suffix in ("mp4", "mov", "mkv", "webm", "avi", "m4v"):
        yield bad(f"zero-length.{suffix}", b"", "empty_file")
    mp4, early = clip(), clip(container_options={"movflags": "faststart"})
    mkv = clip("matroska")
    yield bad("cut-at-60-percent.mp4", mp4[: len(mp4) * 6 // 10], "corrupt_video")
    noisy = _noisy_frames(np.random.default_rng(0))
    for name, form, codec, options in (
        ("cut-at-60-percent-index-first.mp4", "mp4", "libx264", {"movflags": "faststart"}),
        ("cut-at-60-percent.mkv", "matroska", "libx264", {}),
        ("cut-at-60-percent.webm", "webm", "libvpx-vp9", {}),
        ("cut-at-60-percent.avi", "avi", "mpeg4", {}),
    ):
        data = clip(form, codec, frames=noisy, container_options=options)
        yield bad(name, data[: len(data) * 6 // 10], "truncated_video")
    broadcast = clip("mpegts", "mpeg2video", frames=noisy, gop=100)
    hole = broadcast[: 5 * 188] + broadcast[7 * 188 :]  # within the first picture, which the decoder then makes up
    yield bad("packets-lost-mpegts-really.mp4", hole, "corrupt_video")
    moov = mp4.index(b"moov") - 4
    yield bad("no-index.mp4", mp4[:moov], "corrupt_video")
    yield bad("index-alone.mp4", early[: early.index(b"mdat") + 4], "truncated_video", "corrupt_video")
    for suffix, form in (("mp4", "mp4"), ("mkv", "matroska")):
        yield bad(f"sound-only.{suffix}", _sound_only(form), "no_video_stream")
    yield bad("sound-only-mpegts-really.mp4", _sound_only("mpegts"), "no_video_stream")
    yield bad("sound-with-a-cover.m4v", _sound_only("mp4", cover=True), "no_video_stream")
    yield bad("no-frames.mkv", mkv[: mkv.index(b"\x1f\x43\xb6\x75")], "truncated_video", "corrupt_video")
    yield bad("declares-an-hour.mkv", _declares_an_hour(mkv), "truncated_video")
    yield bad("lasts-twenty-minutes.mkv", clip("matroska", times=[50.0 * i for i in range(23)]), "too_long_video")
    yield bad("lasts-twenty-minutes.mp4", clip(times=[50.0 * i for i in range(23)]), "too_long_video")
    for suffix, form in (("mp4", "mp4"), ("avi", "avi")):
        many = clip(form, "mpeg4", frames=[np.zeros((16, 16, 3), np.uint8)] * 301, size=(16, 16))
        yield bad(f"frames-301.{suffix}", many, "too_many_frames")
    for name, size, reason in (
        ("frame-too-large.mp4", (2050, 2000), "too_many_pixels"),
        ("ribbon.mp4", (3232, 16), "extreme_aspect_ratio"),
    ):
        yield bad(name, clip("mp4", "mpeg4", frames=[np.zeros((size[1], size[0], 3), np.uint8)], size=size), reason)
    # The container declares 64 x 48, and the stream another size.
    grown = clip("matroska", frames=[np.zeros((2000, 2050, 3), np.uint8)], size=(2050, 2000))
    lie = grown.replace(struct.pack(">HH", 0xB082, 2050), struct.pack(">HH", 0xB082, 64), 1)
    yield bad("frame-larger-than-declared.mkv", lie, "too_many_pixels")
    yield bad("box-in-box.mp4", _nested_boxes(200_000), "corrupt_video")
    yield bad("box-of-exabytes.mp4", b"\0\0\0\1moov" + b"\x7f" + b"\xff" * 7 + bytes(99), "corrupt_video")
    yield bad("a-billion-samples.mp4", _table_bomb(mp4, b"stts", 10**9), *DAMAGE["video"], USED)
    yield bad("a-billion-sizes.mp4", _table_bomb(mp4, b"stsz", 10**9, skip=4), *DAMAGE["video"], USED)
    yield bad("h264-without-parameters.mkv", re.sub(rb"\x67\x42|\x67\x64", b"\x00\x00", mkv), *DAMAGE["video"], USED)
    yield bad("no-key-frame.mkv", clip("matroska", skip_packets=1, gop=100), "corrupt_video", USED)
    others: dict[str, bytes] = {
        "html": b"<html><body>404 not found</body></html>",
        "zeros": bytes(100_000),
        "text": b"no video " * 999,
        "png": _encoded(_quarters(), "PNG"),
        "jpeg": _encoded(_quarters(), "JPEG"),
        "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        "concat": b"ffconcat version 1.0\nfile /etc/hostname\n",
        "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
        "dash": b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><Period/></MPD>",
        "pdf": one_page(),
        "zip": _zip(),
    }
    for name, data in others.items():
        yield bad(f"{name}-really.mp4", data, "corrupt_video", "no_video_stream")


def _noisy_frames(rng: np.random.Generator, size: tuple[int, int] = (64, 48)) -> list[UInt8Array]:
    return [_noise(rng, size[1], size[0]) for _ in range(_NUM_FRAMES)]


def _declares_an_hour(mkv: bytes) -> bytes:
    place = mkv.index(b"\x44\x89\x88") + 3  # the element of the duration in ms
    return mkv[:place] + struct.pack(">d", 3_600_000.0) + mkv[place + 8 :]


def _nested_boxes(num_bytes: int) -> bytes:
    depth = num_bytes // 8
    return b"\0\0\0\x18ftypisom\0\0\2\0isomavc1" + b"".join(
        struct.pack(">I", 8 * (depth - i)) + b"moov" for i in range(depth)
    )


def _table_bomb(mp4: bytes, box: bytes, count: int, skip: int = 0) -> bytes:
    place = mp4.index(box) + 8 + skip
    return mp4[:place] + struct.pack(">I", count) + mp4[place + 4 :]


# --- documents ------------------------------------------------------------------------------------------------------

_CONTENT = b"1 0 0 rg 0 200 150 200 re f 0 g BT /F 12 Tf 30 100 Td (harmless words on a page) Tj ET\n"
_FONT = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"


def pdf(objects: Sequence[bytes], trailer: bytes = b"", offset: int = 0) -> bytes:
    """Objects 1, 2, ... as a file; the first is the catalogue. `offset` falsifies the cross-reference table."""
    out, places = bytearray(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"), []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n" % number + body + b"\nendobj\n"
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % (place + offset) for place in places)
    out += b"trailer\n<</Size %d/Root 1 0 R%s>>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, trailer, start + offset)
    return bytes(out)


def stream(data: bytes, entries: bytes = b"") -> bytes:
    """A stream object."""
    return b"<<%s/Length %d>>\nstream\n" % (entries, len(data)) + data + b"\nendstream"


def page_objects(
    content: bytes = _CONTENT,
    box: bytes = b"/MediaBox[0 0 300 400]",
    page: bytes = b"",
    resources: bytes = b"",
    *,
    filters: bytes = b"",
    catalogue: bytes = b"",
    more: Sequence[bytes] = (),
) -> list[bytes]:
    """Catalogue, page tree, page, content, font, and `more` from object 6 on."""
    return [
        b"<</Type/Catalog/Pages 2 0 R%s>>" % catalogue,
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R%s/Contents 4 0 R/Resources<</Font<</F 5 0 R>>%s>>%s>>" % (box, resources, page),
        stream(content, filters),
        _FONT,
        *more,
    ]


def one_page(*args: bytes, **options: Any) -> bytes:
    """A file of one page: 300 x 400 points, its upper left quarter red."""
    return pdf(page_objects(*args, **options))


def _sheet(width: float = 3, height: float = 4, red: tuple[int, int] | None = (6, 6)) -> Look:
    """A page of these proportions with the pixel budget; `red` is a red place, and the opposite corner is white."""
    scale = (LIMITS.page_pixels / (width * height)) ** 0.5
    colours = {(0, *red): RED, (0, *(-1 - place for place in red)): WHITE} if red else {}
    return Look((1, round(height * scale), round(width * scale)), colours, tolerance=3, shape_tolerance=1)


def _documents() -> Iterator[CorpusFile]:
    yield from _odd_documents()
    yield from _bad_documents()


def _odd_documents() -> Iterator[CorpusFile]:
    plain = one_page()
    sheet = _sheet()
    yield good("plain.pdf", plain, sheet)
    yield good("deflated.pdf", one_page(zlib.compress(_CONTENT), filters=b"/Filter/FlateDecode"), sheet)
    yield good("rotated-90.pdf", one_page(page=b"/Rotate 90"), _sheet(4, 3, (6, -7)))
    yield good("rotated-180.pdf", one_page(page=b"/Rotate 180"), _sheet(3, 4, (-7, -7)))
    yield good("rotated-270.pdf", one_page(page=b"/Rotate 270"), _sheet(4, 3, (-7, 6)))
    yield good("box-of-a-billion-points.pdf", one_page(box=b"/MediaBox[0 0 900000000 1000000000]"), _sheet(9, 10, None))
    yield good("box-of-three-points.pdf", one_page(box=b"/MediaBox[0 0 3 4]"), _sheet(red=None))
    yield good("box-off-the-origin.pdf", one_page(box=b"/MediaBox[-150 200 150 600]"), _sheet(red=None))
    yield good("box-upside-down.pdf", one_page(box=b"/MediaBox[300 400 0 0]"), sheet)
    yield good("box-of-fractions.pdf", one_page(box=b"/MediaBox[0 0 300.0001 400.00]"), sheet)
    yield good("box-inherited.pdf", _inherited(), sheet)
    yield good("box-missing.pdf", one_page(box=b""), _sheet(612, 792, None))
    yield good("crop-box.pdf", one_page(page=b"/CropBox[0 200 150 400]"), _sheet(red=None))
    yield good("junk-before-the-mark.pdf", b"\n" * 1000 + plain, sheet)
    yield good("junk-after-the-end.pdf", plain + b"\n" * 900, sheet)
    yield good("no-content.pdf", pdf([*page_objects()[:2], b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 400]>>"]),
               Look((1, 231, 173), {(0, 5, 5): WHITE}, 3, 1))  # fmt: skip
    yield good("xref-off-by-seven.pdf", pdf(page_objects(), offset=7), sheet)
    yield good("xref-missing.pdf", re.sub(rb"xref\n0 .*?trailer", b"trailer", plain, count=1, flags=re.DOTALL), sheet)
    yield good("runs-a-script.pdf", one_page(catalogue=b"/OpenAction<</S/JavaScript/JS(while(true){})>>"), sheet)
    yield good("launches-a-program.pdf", one_page(catalogue=b"/OpenAction<</S/Launch/F(/bin/sh)>>"), sheet)
    update = b"6 0 obj\n<<>>\nendobj\ntrailer\n<</Size 7/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n"
    yield good("updated.pdf", plain + update % plain.rindex(b"xref\n0"), sheet)
    yield good("count-too-high.pdf", plain.replace(b"/Count 1", b"/Count 5"), sheet)
    owned = pymupdf.open(stream=plain).tobytes(encryption=pymupdf.PDF_ENCRYPT_AES_256, user_pw="", owner_pw="own")
    yield good("encrypted-without-a-password.pdf", owned, sheet)


def _inherited() -> bytes:
    objects = page_objects(box=b"")
    objects[1] = objects[1].replace(b"/Count", b"/MediaBox[0 0 300 400]/Count")
    return pdf(objects)


def _bad_documents() -> Iterator[CorpusFile]:
    plain = one_page()
    yield bad("zero-length.pdf", b"", "empty_file")
    others: dict[str, bytes] = {
        "html": b"<!DOCTYPE html><html><body>Please log in to download</body></html>",
        "docx": _zip(),
        "png": _encoded(_quarters(), "PNG"),
        "postscript": b"%!PS-Adobe-3.0\nshowpage\n",
        "rtf": b"{\\rtf1 words}",
        "zeros": bytes(5000),
    }
    for name, data in others.items():
        yield bad(f"{name}-really.pdf", data, "not_a_pdf")
    page = b"<html><!-- %PDF-1.7 --><body>I am a page</body></html>\n<!-- %%EOF -->"
    yield bad("html-with-marks-really.pdf", page, "not_a_pdf", "corrupt_pdf")
    yield bad("mark-too-late.pdf", b"\n" * 1100 + plain, "not_a_pdf")
    yield bad("cut-at-60-percent.pdf", plain[: len(plain) * 6 // 10], "corrupt_pdf")
    yield bad("cut-with-an-end.pdf", plain[:200] + b"\n%%EOF\n", "corrupt_pdf")
    yield bad("marks-only.pdf", b"%PDF-1.7\n%%EOF\n", "corrupt_pdf")
    yield bad("no-root.pdf", plain.replace(b"/Root 1 0 R", b"/Root 9 0 R"), "corrupt_pdf", USED)
    yield bad("no-page-tree.pdf", plain.replace(b"/Pages 2 0 R", b"/Pages 9 0 R"), "corrupt_pdf")
    yield bad("no-kids.pdf", plain.replace(b"/Kids[3 0 R]/Count 1", b"/Kids[     ]/Count 0"), "corrupt_pdf")
    yield bad(
        "count-of-two-billion.pdf",
        plain.replace(b"/Count 1", b"/Count 2000000000"),
        "too_many_pages",
        "corrupt_pdf",
        USED,
    )
    yield bad("negative-count.pdf", plain.replace(b"/Count 1", b"/Count -7"), "corrupt_pdf", USED)
    tree = page_objects()
    tree[1] = b"<</Type/Pages/Kids[2 0 R 2 0 R 3 0 R]/Count 3>>"
    yield bad("page-tree-in-itself.pdf", pdf(tree), "corrupt_pdf", "no_such_page", USED)
    yield bad("page-tree-of-30000-levels.pdf", _deep_tree(30_000), "corrupt_pdf", *STOPPED, USED)
    yield bad("pages-200000.pdf", _many_pages(200_000), "too_many_pages")
    yield bad("pages-501.pdf", _many_pages(501), "too_many_pages")
    for password in ("open", "ünïcode"):
        for method in (pymupdf.PDF_ENCRYPT_AES_256, pymupdf.PDF_ENCRYPT_RC4_40):
            locked = pymupdf.open(stream=plain).tobytes(encryption=method, user_pw=password, owner_pw="own")
            yield bad(f"encrypted-{method}-{len(password)}.pdf", locked, "encrypted_pdf")
    yield bad("encrypted-unknown-method.pdf", pdf(page_objects(), b"/Encrypt<</Filter/Own>>"), "encrypted_pdf",
              "corrupt_pdf")  # fmt: skip
    for name, box, reasons in (
        ("ribbon", b"[0 0 1 100000]", ("extreme_aspect_ratio",)),
        ("of-no-width", b"[0 0 0 400]", ("corrupt_pdf", "extreme_aspect_ratio", USED)),
        ("of-nothing", b"[0 0 0 0]", ("corrupt_pdf", USED)),
        ("of-words", b"[a b c d]", ("corrupt_pdf", USED)),
        ("of-two-numbers", b"[0 0]", ("corrupt_pdf", USED)),
        ("not-finite", b"[0 0 1e99 1e99]", ("corrupt_pdf", "extreme_aspect_ratio", USED)),
        ("overflowing", b"[0 0 9" + b"9" * 400 + b" 9]", ("corrupt_pdf", "extreme_aspect_ratio", USED)),
    ):
        yield bad(f"box-{name}.pdf", one_page(box=b"/MediaBox" + box), *reasons)
    yield bad("crop-box-outside.pdf", one_page(page=b"/CropBox[900 900 950 950]"), USED, "corrupt_pdf")
    yield bad("user-unit-of-a-billion.pdf", one_page(page=b"/UserUnit 1000000000"), USED, "corrupt_pdf")

    strokes = _inflating(b"0 0 m 300 400 l S\n" * 100_000, 560)  # a gigabyte of operators in under 2 MB
    flate = b"/Filter/FlateDecode"
    yield bad("inflates-to-a-gigabyte.pdf", one_page(strokes, filters=flate), *STOPPED)
    forms = [b"<</Type/XObject/Subtype/Form/BBox[0 0 300 400]/Resources<</XObject<</X %d 0 R>>>>" % (7 + i)
             for i in range(9)]  # fmt: skip
    towers = [stream(b"/X Do " * 20, form[2:-2] + b">>") for form in forms]
    towers.append(stream(b"0 0 m 300 400 l S\n" * 20, b"/Type/XObject/Subtype/Form/BBox[0 0 300 400]"))
    lots = one_page(b"/X Do " * 20, resources=b"/XObject<</X 6 0 R>>", more=towers)
    yield bad("forms-in-forms.pdf", lots, *STOPPED, USED, "corrupt_pdf")
    selfish = stream(b"/X Do", b"/Type/XObject/Subtype/Form/BBox[0 0 300 400]/Resources<</XObject<</X 6 0 R>>>>")
    yield bad("form-in-itself.pdf", one_page(b"/X Do", resources=b"/XObject<</X 6 0 R>>", more=[selfish]),
              *STOPPED, USED, "corrupt_pdf")  # fmt: skip
    picture = b"/Type/XObject/Subtype/Image/Width 30000/Height 30000/ColorSpace/DeviceRGB/BitsPerComponent 8" + flate
    large = stream(_inflating(bytes(1 << 20), 2600), picture)
    yield bad("picture-of-900-megapixels.pdf", one_page(b"300 0 0 400 0 0 cm /X Do",
              resources=b"/XObject<</X 6 0 R>>", more=[large]), *STOPPED, USED, "corrupt_pdf")  # fmt: skip
    words = _inflating(b"BT /F 1 Tf 3 3 Td (words without end) Tj ET\n" * 10_000, 300)
    yield bad("text-without-end.pdf", one_page(words, filters=flate), *STOPPED)
    nested = zlib.compress(_inflating(b"0 0 m 300 400 l S\n" * 100_000, 560))
    twice = one_page(nested, filters=b"/Filter[/FlateDecode/FlateDecode]")
    yield bad("inflates-twice.pdf", twice, *STOPPED)
    yield bad("saves-without-end.pdf", one_page(b"q " * 500_000), *STOPPED, USED, "corrupt_pdf")
    yield bad("brackets-without-end.pdf", one_page(b"[" * 500_000), *STOPPED, USED, "corrupt_pdf")
    yield bad("dictionary-without-end.pdf", one_page(page=b"/X" + b"<</X" * 100_000), *STOPPED, USED, "corrupt_pdf")
    loop = plain.replace(b"/Root 1 0 R", b"/Prev %d/Root 1 0 R" % plain.rindex(b"xref\n0"))
    yield bad("xref-in-itself.pdf", loop, USED, "corrupt_pdf")
    yield bad("length-is-itself.pdf", re.sub(rb"/Length \d+", b"/Length 4 0 R", plain), USED, "corrupt_pdf")
    yield bad("length-of-exabytes.pdf", re.sub(rb"/Length \d+", b"/Length 9999999999999", plain), USED, "corrupt_pdf")
    yield bad("content-not-deflated.pdf", one_page(b"\xff" * 999, filters=flate), USED, "corrupt_pdf")
    yield bad("filter-unknown.pdf", one_page(filters=b"/Filter/Unheard"), USED, "corrupt_pdf")
    shading = b"/Shading<</S<</ShadingType 1/ColorSpace/DeviceRGB/Function<</FunctionType 4/Domain[0 1 0 1]"
    yield bad("shading-without-function.pdf", one_page(b"/S sh", resources=shading + b">>>>>>"), USED, "corrupt_pdf")


def _many_pages(count: int) -> bytes:
    """Page objects of their own, in a flat tree."""
    kids = b" ".join(b"%d 0 R" % (3 + i) for i in range(count))
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 3 4]>>"
    return pdf(
        [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Count %d/Kids[%s]>>" % (count, kids), *[page] * count]
    )


def _deep_tree(levels: int) -> bytes:
    nodes = [b"<</Type/Pages/Count 1/Parent %d 0 R/Kids[%d 0 R]>>" % (i + 1, i + 3) for i in range(levels)]
    page = b"<</Type/Page/Parent %d 0 R/MediaBox[0 0 300 400]>>" % (levels + 1)
    return pdf([b"<</Type/Catalog/Pages 2 0 R>>", *nodes, page])


# --- random damage --------------------------------------------------------------------------------------------------


def _bases(rng: np.random.Generator) -> dict[str, tuple[bytes, frozenset[str]]]:
    """Healthy files by name, and what may become of each when its end is cut off."""
    photo = Image.fromarray(_noise(rng, 72, 96))
    frames = _noisy_frames(rng)
    image, cut_short = frozenset({"corrupt_image"}), frozenset(_SHORT)
    lost_index = frozenset({"corrupt_video"})
    front = {"movflags": "faststart"}
    quiet = {"x265-params": "log-level=none:pools=1"}
    return {
        "baseline.jpg": (_encoded(photo, "JPEG", quality=90), image),
        "progressive.jpg": (_encoded(photo, "JPEG", quality=90, progressive=True), image),
        "rgb.png": (_encoded(photo, "PNG"), image),
        "lossy.webp": (_encoded(photo, "WEBP", quality=90), image),
        "lossless.webp": (_encoded(photo, "WEBP", lossless=True), image),
        "palette.gif": (_encoded(photo.quantize(128), "GIF"), image),
        "rgb.bmp": (_encoded(photo, "BMP"), image),
        "deflated.tif": (_encoded(photo, "TIFF", compression="tiff_adobe_deflate"), image),
        "plain.pdf": (one_page(), frozenset({"corrupt_pdf"})),
        "packed.pdf": (_packed_pdf(photo), frozenset({"corrupt_pdf"})),
        "h264.mp4": (clip(frames=frames), lost_index),
        "h264-index-first.mp4": (clip(frames=frames, container_options=front), cut_short),
        "h264.mkv": (clip("matroska", frames=frames), cut_short),
        "vp9.webm": (clip("webm", "libvpx-vp9", frames=frames), cut_short),
        "av1.mp4": (clip("mp4", "libsvtav1", frames=frames), lost_index),
        "hevc.mkv": (clip("matroska", "libx265", frames=frames, codec_options=quiet), cut_short),
        "mpeg4.avi": (clip("avi", "mpeg4", frames=frames), cut_short),
        # A transport stream declares no duration, as it is made to be joined at any time.
        "h264-mpegts-really.mp4": (clip("mpegts", frames=frames), cut_short | {USED}),
    }


def _packed_pdf(photo: Image.Image) -> bytes:
    """Three deflated pages with a picture, in object streams."""
    with pymupdf.open() as document:
        for number in range(3):
            page = document.new_page(width=300, height=400)
            page.insert_text((30, 50), f"page {number}")
            page.insert_image(pymupdf.Rect(20, 80, 280, 300), stream=_encoded(photo, "JPEG"))
        return bytes(document.tobytes(deflate=True, use_objstms=1, no_new_id=True))


def _cut(data: bytearray, rng: np.random.Generator) -> None:
    del data[int(len(data) * rng.uniform(0.05, 0.8)) :]


def _flip_bits(data: bytearray, rng: np.random.Generator) -> None:
    for place in rng.integers(0, len(data), rng.integers(1, 5)):
        data[place] ^= 1 << int(rng.integers(8))


def _rot(data: bytearray, rng: np.random.Generator) -> None:
    for place in rng.integers(0, len(data), max(4, len(data) // 100)):
        data[place] = int(rng.integers(256))


def _rot_head(data: bytearray, rng: np.random.Generator) -> None:
    for place in rng.integers(0, min(512, len(data)), 6):
        data[place] = int(rng.integers(256))


def _zero_a_block(data: bytearray, rng: np.random.Generator) -> None:
    start, size = int(rng.integers(len(data))), max(8, len(data) // 8)
    data[start : start + size] = bytes(len(data[start : start + size]))


def _lose_a_block(data: bytearray, rng: np.random.Generator) -> None:
    start = int(rng.integers(len(data) * 7 // 8))
    del data[start : start + max(8, len(data) // 16)]


_Damage = Callable[[bytearray, np.random.Generator], None]
_DAMAGES: dict[str, tuple[_Damage, int]] = {
    "cut": (_cut, 5),
    "bits": (_flip_bits, 6),
    "rot": (_rot, 4),
    "head": (_rot_head, 5),
    "zeros": (_zero_a_block, 3),
    "hole": (_lose_a_block, 3),
}


def _random_damage(seed: int) -> Iterator[CorpusFile]:
    rng = np.random.default_rng(seed)
    for base, (data, cut_outcomes) in _bases(rng).items():
        stem, suffix = base.rsplit(".", 1)
        for damage, (apply, count) in _DAMAGES.items():
            for number in range(count):
                damaged = bytearray(data)
                apply(damaged, rng)
                kind = KINDS[f".{suffix}"]
                outcomes = cut_outcomes if damage == "cut" else DAMAGE[kind] | {USED}
                yield CorpusFile(f"random-{stem}-{damage}-{number}.{suffix}", bytes(damaged), outcomes)
