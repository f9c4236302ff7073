"""Members of zip and tar files, so that media are read by range from where they are."""

from __future__ import annotations

import posixpath
import struct
import tarfile
import zipfile
import zlib
from functools import cache

from pipelines.errors import BadMedia, UserError
from pipelines.samples import ArchiveRef
from pipelines.storage.location import open_object
from pipelines.storage.ranged import open_binary

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field
_ENCRYPTED = 1
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".tar.lz4")


def is_archive(url: str) -> bool:
    """Return whether a path or URL names a zip or tar, a compressed one or a part of one included."""
    return url.lower().endswith((".zip", ".tar", *_COMPRESSED)) or _is_part(url)


def check_archive(url: str, place: str) -> None:
    """Raise `UserError` for an archive that cannot be read by range, with the command that unpacks it."""
    name = posixpath.basename(url)
    if _is_part(url):
        whole = url[: url.lower().rindex(".part")]
        fix = f"unpack it: cat {whole}.part* | tar -xz, then name the folder"
        raise UserError(f"{place}={url}", "is one part of an archive", fix)
    if url.lower().endswith(_COMPRESSED):
        problem = "is compressed, and compressed tars cannot be read by range"
        raise UserError(f"{place}={url}", problem, f"unpack it with `tar -xf {name}`, then name the folder")


@cache
def list_archive(url: str, endpoint: str | None) -> dict[str, ArchiveRef]:
    """Return the members of an archive by their paths, without hidden files and those that a Mac adds.

    Raises `UserError` for an archive that is damaged, and `FileNotFoundError`.
    """
    read = _zip_members if url.lower().endswith(".zip") else _tar_members
    try:
        with open_binary(url, endpoint) as file:
            members = read(url, file)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, struct.error) as error:
        raise UserError(url, f"cannot be read as an archive: {error}", "fetch it again") from error
    return {name: ref for name, ref in members.items() if not _is_hidden(name)}


def read_member(ref: ArchiveRef, endpoint: str | None, max_bytes: int) -> bytes:
    """Return the bytes of a member. Raises `BadMedia`: too_many_bytes, corrupt_archive; `FileNotFoundError`."""
    store, path = open_object(ref.path, endpoint)
    if ref.num_bytes > max_bytes:
        raise BadMedia("too_many_bytes", f"{ref.num_bytes} bytes, at most {max_bytes}")
    start = ref.offset
    if ref.packing != "tar":
        header = store.read_range(path, ref.offset, _LOCAL_HEADER.size)
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        if signature != b"PK\x03\x04":
            raise BadMedia("corrupt_archive", f"{ref.path} has no file at byte {ref.offset}")
        start += _LOCAL_HEADER.size + name_bytes + extra_bytes
    data = store.read_range(path, start, ref.num_bytes)
    return _inflated(data, max_bytes) if ref.packing == "deflated" else data


def _inflated(data: bytes, max_bytes: int) -> bytes:
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = unpacker.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise BadMedia("corrupt_archive", str(error)) from error
    if len(content) > max_bytes:
        raise BadMedia("too_many_bytes", f"more than {max_bytes} bytes")
    if not unpacker.eof:
        raise BadMedia("corrupt_archive", "its compressed bytes end too early")
    return content


def _zip_members(url: str, file: object) -> dict[str, ArchiveRef]:
    packing = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}
    members = {}
    with zipfile.ZipFile(file) as archive:  # type: ignore[call-overload]
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.flag_bits & _ENCRYPTED or info.compress_type not in packing:
                how = "is encrypted" if info.flag_bits & _ENCRYPTED else f"uses compression {info.compress_type}"
                raise UserError(f"{url} {info.filename}", how, "unpack it, then name the folder")
            name = _plain(info.filename)
            kind = packing[info.compress_type]
            members[name] = ArchiveRef(url, name, info.header_offset, info.compress_size, kind)  # type: ignore[arg-type]
    return members


def _tar_members(url: str, file: object) -> dict[str, ArchiveRef]:
    with tarfile.open(fileobj=file, mode="r:") as archive:  # type: ignore[call-overload]
        found = [info for info in archive if info.isfile()]
    return {_plain(info.name): ArchiveRef(url, _plain(info.name), info.offset_data, info.size, "tar") for info in found}


def _plain(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _is_part(url: str) -> bool:
    return ".part" in posixpath.basename(url.lower())
