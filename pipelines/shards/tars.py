"""Tar files of any writer: entries with checked headers, and members grouped as WebDataset groups them.

    bytes -> entries (USTAR, GNU and PAX long names) -> groups of one key -> samples

Hard links have the bytes of the member that they name. Nothing but folders is skipped silently: bytes that belong to no
sample become a `Finding`.
"""

from __future__ import annotations

import re
import tarfile
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from mmap import mmap

from pipelines.shards.tar_headers import BLOCK_BYTES, link_name, pax_records, read_header

_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # webdataset's own: up to the first dot of the base name
# Metadata under names of their own: webdataset's, those of archives made on a Mac, attributes that an old tar wrote as
# files. Names that begin with a dot are hidden files, such as AppleDouble's `._a.jpg`, and have no key.
_META = re.compile(r"__[^/]*__($|/)|(.*/)?(__MACOSX|PaxHeaders?(\.\d+)?)/|(.*/)?\.[^/]*$")
_HARMLESS = ("not_a_member", "link")  # findings that damage no sample around them
_MAX_LINK_BYTES = 256 << 20
_EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_GNU_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_SCAN_BYTES = 1 << 20

Buffer = bytes | mmap


@dataclass(frozen=True, slots=True)
class Entry:
    """A regular file: headers (including those of a long name) from `offset`, bytes from `start`, padding to `end`.

    A hard link has its bytes in another entry, whose headers begin at `link_offset`.
    """

    name: str
    offset: int
    start: int
    size: int
    end: int
    link_offset: int | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """Bytes of no sample: bad_header, truncated, sparse_member, trailing_bytes, no_end_marker, not_a_member, link.

    A `link` is symbolic, or a hard link to a file that the archive does not have before it.
    """

    reason: str
    offset: int
    num_bytes: int


@dataclass(slots=True)
class Group:
    """Consecutive members of one key, by extension as written. `problem` is duplicate_member, damaged or empty.

    The bytes from `offset` to `end` hold all that the sample needs: hard links may refer to entries before the first
    member. `problem` is then link_too_far for more than 256 MB (our choice).
    """

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
    regular: dict[str, Entry] = {}
    while position < len(data):
        if _is_end(data, position):
            if _has_content(data, position):
                yield Finding("trailing_bytes", position, len(data) - position)
            return
        try:
            found, following = _read_entry(data, position)
            if isinstance(found, _Link):
                yield _resolved(found, regular, position, following)
            elif isinstance(found, Entry):
                regular[_plain_path(found.name)] = found
                yield found
            elif found:
                yield found
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
            is_damaged |= item.reason not in _HARMLESS
            yield item
            continue
        matched = None if _META.match(item.name) else _KEY.fullmatch(item.name)
        if not matched:
            yield Finding("not_a_member", item.offset, item.end - item.offset)
            continue
        key, extension = matched.groups()
        key = normalized(key)
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
        if item.link_offset is not None:
            group.offset = min(group.offset, item.link_offset)
            if group.end - group.offset > _MAX_LINK_BYTES:
                group.problem = "link_too_far"
        is_damaged = False
    if group:
        yield group


def only_group(data: bytes) -> Group:
    """Return the one sample that `data` consists of. Raises `ValueError` for anything else."""
    found = list(groups(entries(data, is_whole=False)))
    group = next((item for item in found if isinstance(item, Group)), None)
    problems = [item.reason for item in found if isinstance(item, Finding) and item.reason not in _HARMLESS]
    if group is None or problems or group.problem or sum(isinstance(item, Group) for item in found) != 1:
        if not problems:
            problems = [group.problem if group and group.problem else "not one sample"]
        raise ValueError(", ".join(problems))
    return group


def last_group(data: bytes, key: str) -> Group:
    """Return the sample `key`, which `data` ends with. Others may come before it only if it has hard links to them.

    Raises `ValueError` for anything else.
    """
    found = [item for item in groups(entries(data, is_whole=False)) if isinstance(item, Group)]
    is_linked = any(entry.link_offset is not None for group in found[-1:] for entry in group.members.values())
    group = found[-1] if is_linked and len(found) > 1 else only_group(data)
    if group.problem or group.key != normalized(key):
        raise ValueError(group.problem or f"the index says {key!r}, the shard {group.key!r}")
    return group


def normalized(name: str) -> str:
    """Return a name in Unicode's form C. A Mac stores the same letters as several characters."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


@dataclass(frozen=True, slots=True)
class _Link:
    """A link in an archive. `target` is empty for a symbolic one."""

    name: str
    target: str


def _resolved(link: _Link, regular: dict[str, Entry], offset: int, end: int) -> Entry | Finding:
    target = regular.get(_plain_path(link.target)) if link.target else None
    if target is None:
        return Finding("link", offset, end - offset)
    needed = target.offset if target.link_offset is None else target.link_offset
    entry = Entry(link.name, offset, target.start, target.size, end, needed)
    regular[_plain_path(link.name)] = entry
    return entry


def _plain_path(name: str) -> str:
    return name.removeprefix("./")


def _read_entry(data: Buffer, position: int) -> tuple[Entry | _Link | Finding | None, int]:
    """Return what begins at `position`, with None for a folder and a finding for a device, and the next position."""
    first = position
    # Extended headers come before the header that they describe. There may be several.
    long_name, long_link, long_size, is_sparse = None, None, None, False
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
        elif header.type == tarfile.GNUTYPE_LONGLINK:
            long_link = payload.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            records = pax_records(payload)
            long_name = records.get("path", long_name)
            long_link = records.get("linkpath", long_link)
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
    name = long_name or header.name
    if header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        target = long_link or link_name(block)
        return _Link(name, target if header.type == tarfile.LNKTYPE else ""), end
    if is_regular:
        return Entry(name, first, start, size, end), end
    return (None if header.type == tarfile.DIRTYPE else Finding("not_a_member", first, end - first)), end


def _padded(size: int) -> int:
    return size + -size % BLOCK_BYTES


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
