"""Tar files of any writer: entries with checked headers, and members grouped as WebDataset groups them.

    bytes -> entries (USTAR, GNU and PAX long names) -> groups of one key -> samples

Nothing is skipped silently: bytes that belong to no sample become a `Finding`.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from mmap import mmap

BLOCK_BYTES = 512
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # webdataset's own: up to the first dot of the base name
_META = re.compile(r"__[^/]*__($|/)")  # webdataset stores its metadata under such names
_EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_GNU_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_SCAN_BYTES = 1 << 20
_CHECKSUM = slice(148, 156)

Buffer = bytes | mmap


@dataclass(frozen=True, slots=True)
class Entry:
    """A regular file: headers (including those of a long name) from `offset`, bytes from `start`, padding to `end`."""

    name: str
    offset: int
    start: int
    size: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """One header block: name, bytes of content, one byte for the kind of entry."""

    name: str
    size: int
    type: bytes


@dataclass(frozen=True, slots=True)
class Finding:
    """Bytes of no sample: bad_header, truncated, sparse_member, trailing_bytes, no_end_marker, not_a_member."""

    reason: str
    offset: int
    num_bytes: int


@dataclass(slots=True)
class Group:
    """Consecutive members of one key, by extension as written. `problem` is duplicate_member, damaged or empty."""

    key: str
    offset: int
    end: int
    members: dict[str, Entry] = field(default_factory=dict)
    problem: str = ""


class _CutError(Exception):
    """The archive ends within an entry."""


class _SparseError(Exception):
    """A file with holes; the argument is the position of its end."""


def entries(data: Buffer, is_whole: bool = True) -> Iterator[Entry | Finding]:
    """Yield regular files in order. A damaged header costs the bytes up to the next valid one, at a multiple of 512.

    Two blocks of zeros end an archive, or one at the end of the file. Without `is_whole`, `data` is a part of an
    archive and needs no such end.
    """
    position = 0
    while position < len(data):
        if _is_end(data, position):
            if _has_content(data, position):
                yield Finding("trailing_bytes", position, len(data) - position)
            return
        try:
            entry, following = _read_entry(data, position)
            if entry:
                yield entry
        except _CutError:
            yield Finding("truncated", position, len(data) - position)
            return
        except _SparseError as error:
            following = _next_header(data, error.args[0])
            yield Finding("sparse_member", position, following - position)
        except tarfile.HeaderError:
            following = _next_header(data, position + BLOCK_BYTES)
            yield Finding("bad_header", position, following - position)
            if following == len(data):
                return
        position = following
    if is_whole:
        yield Finding("no_end_marker", len(data), 0)


def groups(found: Iterable[Entry | Finding]) -> Iterator[Group | Finding]:
    """Yield samples as WebDataset groups them: a new one begins whenever the key changes."""
    group: Group | None = None
    is_damaged = False
    for item in found:
        if isinstance(item, Finding):
            is_damaged = True
            yield item
            continue
        matched = None if _META.match(item.name) else _KEY.fullmatch(item.name)
        if not matched:
            yield Finding("not_a_member", item.offset, item.end - item.offset)
            continue
        key, extension = matched.groups()
        if group is None or group.key != key:
            if group:
                yield group
            group = Group(key, item.offset, item.end)
        elif is_damaged:
            group.problem = "damaged"
        elif extension in group.members:
            group.problem = "duplicate_member"
        group.members[extension] = item
        group.end = item.end
        is_damaged = False
    if group:
        yield group


def only_group(data: bytes) -> Group:
    """Return the one sample that `data` consists of. Raises `ValueError` for anything else."""
    found = list(groups(entries(data, is_whole=False)))
    group = next((item for item in found if isinstance(item, Group)), None)
    problems = [item.reason for item in found if isinstance(item, Finding) and item.reason != "not_a_member"]
    if group is None or problems or group.problem or sum(isinstance(item, Group) for item in found) != 1:
        if not problems:
            problems = [group.problem if group and group.problem else "not one sample"]
        raise ValueError(", ".join(problems))
    return group


def _read_entry(data: Buffer, position: int) -> tuple[Entry | None, int]:
    """Return the entry whose headers begin at `position`, None unless it is a regular file, and the next position."""
    first = position
    # Extended headers come before the header that they describe. There may be several.
    long_name, long_size, is_sparse = None, None, False
    while True:
        block = data[position : position + BLOCK_BYTES]
        if len(block) != BLOCK_BYTES:
            raise _CutError
        header = read_header(block)
        start = position + BLOCK_BYTES
        if header.type not in (*_EXTENDED, *_GNU_LONG):
            break
        payload = data[start : start + header.size]
        if len(payload) != header.size:
            raise _CutError
        if header.type == tarfile.GNUTYPE_LONGNAME:
            long_name = payload.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            records = _pax_records(payload)
            long_name = records.get("path", long_name)
            long_size = int(records["size"]) if "size" in records else long_size
            is_sparse |= any(name.startswith("GNU.sparse") for name in records)
        position = start + _padded(header.size)
    size = header.size if long_size is None else long_size
    is_regular = header.type in tarfile.REGULAR_TYPES
    has_content = is_regular or header.type not in tarfile.SUPPORTED_TYPES
    end = start + (_padded(size) if has_content else 0)
    if is_sparse or header.type == tarfile.GNUTYPE_SPARSE:
        raise _SparseError(end)
    if has_content and start + size > len(data):
        raise _CutError
    end = min(end, len(data))  # some writers leave the last entry unpadded
    return (Entry(long_name or header.name, first, start, size, end) if is_regular else None), end


def read_header(block: bytes) -> Header:
    """Read a block of 512 bytes as tarfile does, without the fields that are not used here: three times as fast.

    Raises `tarfile.HeaderError` for a wrong checksum, malformed numbers, and a block of zeros.
    """
    total = sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" ")
    stored = _number(block[_CHECKSUM])
    if stored != total:  # some old writers took bytes as signed
        high = sum(byte > 127 for byte in block) - sum(byte > 127 for byte in block[_CHECKSUM])
        if stored != total - 256 * high:
            raise tarfile.HeaderError("bad checksum")
    size, kind = _number(block[124:136]), block[156:157]
    if size < 0:
        raise tarfile.HeaderError("negative size")
    name, prefix = (block[span].partition(b"\0")[0] for span in (slice(100), slice(345, 500)))
    if kind == tarfile.AREGTYPE and name.endswith(b"/"):
        kind = tarfile.DIRTYPE
    if prefix and kind not in tarfile.GNU_TYPES:
        name = prefix + b"/" + name
    return Header(name.decode("utf-8", "surrogateescape"), size, kind)


def _number(field: bytes) -> int:
    """Read octal digits, or base 256, which is for numbers that are too large for them."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - ((field[0] == 0xFF) << 8 * (len(field) - 1))
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError as error:
        raise tarfile.HeaderError("bad number") from error


def _padded(size: int) -> int:
    return size + -size % BLOCK_BYTES


def _pax_records(payload: bytes) -> dict[str, str]:
    """Read `LENGTH KEY=VALUE\\n`, repeated. Raises `tarfile.HeaderError`."""
    records = {}
    position = 0
    try:
        while position < len(payload) and payload[position]:
            space = payload.index(b" ", position)
            end = position + int(payload[position:space])
            name, equals, value = payload[space + 1 : end - 1].partition(b"=")
            if not equals or end <= space:
                raise ValueError(name)
            records[name.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
            position = end
        if "size" in records and int(records["size"]) < 0:
            raise ValueError("negative size")
    except ValueError as error:
        raise tarfile.HeaderError("bad extended header") from error
    return records


def _is_end(data: Buffer, position: int) -> bool:
    return not data[position : position + 2 * BLOCK_BYTES].strip(b"\0")


def _has_content(data: Buffer, position: int) -> bool:
    return any(data[start : start + _SCAN_BYTES].strip(b"\0") for start in range(position, len(data), _SCAN_BYTES))


def _next_header(data: Buffer, position: int) -> int:
    """Return where the next valid header begins, from `position` on, or the end of the data."""
    for start in range(position, len(data) - BLOCK_BYTES + 1, BLOCK_BYTES):
        try:
            read_header(data[start : start + BLOCK_BYTES])
            return start
        except tarfile.HeaderError:
            continue
    return len(data)
