"""Kind and extension of a medium from its first bytes: names in tables are often wrong, and cells have none."""

from __future__ import annotations

from pipelines.samples import MediaKind

NUM_BYTES = 1024
"""First bytes of a file that decide."""
_AVIF = (b"avif", b"avis")
_HEIF = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs")
_HEIF_OR_AVIF = (b"mif1", b"msf1")
_MAX_BRANDS_BYTES = 256
_TS_PACKET = 188
_STARTS: tuple[tuple[bytes, MediaKind, str], ...] = (
    (b"\xff\xd8\xff", "image", ".jpg"),
    (b"\x89PNG", "image", ".png"),
    (b"GIF8", "image", ".gif"),
    (b"BM", "image", ".bmp"),
    (b"II*\x00", "image", ".tiff"),
    (b"MM\x00*", "image", ".tiff"),
    (b"FLV", "video", ".flv"),
    (b"OggS", "video", ".ogv"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "video", ".wmv"),
    (b"\x00\x00\x01\xba", "video", ".mpg"),
    (b"\x00\x00\x01\xb3", "video", ".mpg"),
)


def sniff(data: bytes) -> tuple[MediaKind, str] | None:
    """Return kind and extension, such as `image` and `.jpg`. None for a format that no decoder here reads."""
    for start, kind, extension in _STARTS:
        if data.startswith(start):
            return kind, extension
    if data[:4] == b"RIFF":
        return {b"WEBP": ("image", ".webp"), b"AVI ": ("video", ".avi")}.get(data[8:12])  # type: ignore[return-value]
    if is_heif(data):
        return "image", ".heic"
    if data[4:8] == b"ftyp":
        return _of_brand(data[8:12])
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "video", ".webm" if b"webm" in data[:64] else ".mkv"
    if b"%PDF-" in data[:NUM_BYTES]:
        return "document", ".pdf"
    for first in (0, 4):  # of a transport stream, with time stamps in the second form
        if len(data) > _TS_PACKET + 2 * first and data[first] == data[first + _TS_PACKET + first] == 0x47:
            return "video", ".m2ts" if first else ".ts"
    return None


def is_heif(data: bytes) -> bool:
    """Return whether a file begins as a HEIF picture, such as the photos of phones, and not as AVIF or a video."""
    brand = data[8:12]
    if data[4:8] != b"ftyp" or brand not in _HEIF + _HEIF_OR_AVIF:
        return False
    # A general brand leaves the codec to the brands that follow.
    end = min(int.from_bytes(data[:4]), _MAX_BRANDS_BYTES)
    others = {data[start : start + 4] for start in range(16, end, 4)}
    return brand in _HEIF or not others.intersection(_AVIF)


def _of_brand(brand: bytes) -> tuple[MediaKind, str]:
    if brand in _AVIF + _HEIF_OR_AVIF:
        return "image", ".avif"
    if brand.startswith(b"3g"):
        return "video", ".3gp"
    return "video", ".mov" if brand == b"qt  " else ".mp4"
