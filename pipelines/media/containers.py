"""Whether a video file is whole, by the sizes that its container stores: the declared duration alone misleads.

A file may declare more time than its packets cover, although nothing is missing: the last picture is held, or the
packets have no durations.
"""

from __future__ import annotations

import struct

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_FILE_SIZE = 40  # its place in the file properties, after two identifiers and a size
_ASF_HEADER_BYTES = 1 << 16
_FLV_TAG_BYTES = 11


def is_whole(data: bytes) -> bool:
    """Return whether the file reaches the end that its container stores. False for containers that store none."""
    try:
        if data.startswith(_EBML):
            return _whole_matroska(data)
        if data.startswith(_ASF_HEADER):
            return _whole_asf(data)
        return data.startswith(b"FLV") and _whole_flv(data)
    except (IndexError, struct.error):
        return False


def _whole_matroska(data: bytes) -> bool:
    position = len(_EBML)
    size, width = _vint(data, position)
    position += width + size
    if data[position : position + 4] != _SEGMENT:
        return False
    size, width = _vint(data, position + 4)
    is_unknown = size == (1 << 7 * width) - 1  # a recording that was not finished
    return not is_unknown and position + 4 + width + size <= len(data)


def _vint(data: bytes, position: int) -> tuple[int, int]:
    """Return a variable-size integer of EBML, and its bytes. The leading zeros of its first byte say how many."""
    width = 9 - data[position].bit_length()
    value = int.from_bytes(data[position : position + width], "big")
    return value & (1 << 7 * width) - 1, width


def _whole_asf(data: bytes) -> bool:
    properties = data.find(_ASF_FILE_PROPERTIES, 0, _ASF_HEADER_BYTES)
    if properties < 0:
        return False
    num_bytes: int = struct.unpack_from("<Q", data, properties + _ASF_FILE_SIZE)[0]
    return 0 < num_bytes <= len(data)


def _whole_flv(data: bytes) -> bool:
    """Return whether the file ends with the size of its last tag, and that tag with it."""
    tag_bytes = int.from_bytes(data[-4:], "big")
    tag = len(data) - 4 - tag_bytes
    return tag > 0 and int.from_bytes(data[tag + 1 : tag + 4], "big") == tag_bytes - _FLV_TAG_BYTES
