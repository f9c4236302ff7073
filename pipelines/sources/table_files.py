"""The files of a table: paths, URLs, globs and folders to files of one format, each with the tag of its content."""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pipelines.errors import UserError
from pipelines.storage.location import open_object, open_store
from pipelines.storage.ranged import open_binary
from pipelines.storage.shard_urls import expand_braces, fits_glob, is_glob
from pipelines.storage.store import LocalStore, Store
from pipelines.storage.urls import is_local, local_path

Format = Literal["parquet", "arrow", "jsonl", "json", "csv", "tsv"]
_EXTENSIONS: dict[str, Format] = {
    **{".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow"},
    **{".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv"},
}
_PACKED = (".zst", ".bz2", ".xz", ".zip", ".lz4")
_PART = re.compile(r"-(\d+)-of-(\d+)\.[a-z]+$")
_NOT_TABLES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "rzen-output.json")
_FIRST_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class TableFile:
    """A file of a table. `name` is its path relative to the folder that all files of the table share."""

    url: str
    tag: str
    name: str
    format: Format


def find_table(urls: str | Sequence[str], endpoint: str | None = None, place: str = "table") -> list[TableFile]:
    """Return the files that paths, URLs, globs and folders name, each once, in the order given.

    A folder stands for all tables below it. `{000..099}` and `{a,b}` are expanded. A name with `.gz` is a table of text
    that is unpacked while it is read. Raises `UserError` at once for a file that is missing, for a folder of several
    formats or splits, for missing parts (`train-00000-of-00003.parquet`) and for pointers of Git LFS.
    """
    found: dict[str, str] = {}
    for url in [urls] if isinstance(urls, str) else urls:
        for expanded in expand_braces(url):
            found |= _matching(expanded, endpoint, place)
    shared = _shared_folder([*found])
    files = [TableFile(url, tag, url[len(shared) :], _format_of(url, endpoint)) for url, tag in found.items()]
    formats = {file.format for file in files}
    if len(formats) > 1:
        shown = " ".join(sorted(formats))
        raise UserError(f"{place}={urls}", f"has files of several formats: {shown}", "name one, as in FOLDER/*.jsonl")
    _check_parts(files, place)
    return files


def _shared_folder(urls: Sequence[str]) -> str:
    """Return the start, up to a slash, that all URLs have in common."""
    folders = [f"{url.rpartition('/')[0]}/" for url in urls]
    prefix = os.path.commonprefix(folders)  # noqa: RUF071, as `commonpath` makes one slash of `s3://`
    return prefix[: prefix.rfind("/") + 1]


def extension_of(url: str) -> str:
    """Return the extension that says the format, in lower case, without `.gz`."""
    return posixpath.splitext(url.lower().removesuffix(".gz"))[1]


def is_table(name: str) -> bool:
    """Return whether a file is a table, by its name."""
    return extension_of(name) in _EXTENSIONS and posixpath.basename(name) not in _NOT_TABLES


def absolute(url: str) -> str:
    """Return a URL as it is, and a local path or file:// URL as an absolute path, without a slash at the end."""
    if is_local(url):
        url = os.path.abspath(local_path(url))  # noqa: PTH100, since Path.absolute keeps `..`
    return url.rstrip("/") or "/"


def _matching(url: str, endpoint: str | None, place: str) -> dict[str, str]:
    """Return absolute URL -> tag of the files that a URL without braces names."""
    url = absolute(url)
    store, name = open_object(url, endpoint)
    folder = open_store(url, endpoint)
    if isinstance(store, LocalStore) and not store.exists(name) and is_glob(url):
        return _globbed(url, endpoint, place)
    if store.exists(name):
        if url.lower().endswith(_PACKED):
            raise UserError(f"{place}={url}", "is packed in a way that cannot be read here", "unpack it, or use .gz")
        return {f"{store.url}/{name}" if isinstance(store, LocalStore) else url: store.tag(name)}
    if is_glob(url):
        return _globbed(url, endpoint, place)
    tags = folder.tags()
    if not tags:
        raise UserError(f"{place}={url}", "there is no such file or folder", _beside(url, endpoint))
    return _of_folder(folder, tags, place)


def _globbed(url: str, endpoint: str | None, place: str) -> dict[str, str]:
    parts = url.split("/")
    depth = next(number for number, part in enumerate(parts) if is_glob(part))
    store = open_store("/".join(parts[:depth]) or ("." if depth == 0 else "/"), endpoint)
    tags = store.tags()
    hits = {f"{store.url}/{path}": tag for path, tag in tags.items() if fits_glob(path, "/".join(parts[depth:]))}
    if not hits:
        names = [path for path in tags if is_table(path)] or list(tags)
        there = f"{store.url} has {_some(names)}" if names else f"there is nothing below {store.url}"
        raise UserError(f"{place}={url}", f"matches no file; {there}", "correct the pattern, in quotes")
    return {hit: tag for hit, tag in hits.items() if not posixpath.basename(hit).startswith(".")}


def _of_folder(folder: Store, tags: dict[str, str], place: str) -> dict[str, str]:
    """Return the tables of a folder. One that `save_to_disk` wrote lists its files itself."""
    if "dataset_dict.json" in tags:
        splits = json.loads(folder.read("dataset_dict.json")).get("splits", [])
        fix = f"name one of its folders, such as {folder.url}/{splits[0]}" if splits else "name one of its folders"
        raise UserError(f"{place}={folder.url}", f"holds the splits {', '.join(splits)}", fix)
    if "state.json" in tags:
        names = [str(entry["filename"]) for entry in json.loads(folder.read("state.json")).get("_data_files", [])]
        if missing := [name for name in names if name not in tags]:
            raise UserError(f"{place}={folder.url}", f"lacks {missing[0]}, which state.json names", "copy it again")
        return {f"{folder.url}/{name}": tags[name] for name in names}
    shown = {path: tag for path, tag in tags.items() if is_table(path) and "/." not in f"/{path}"}
    if not shown:
        known = " ".join(_EXTENSIONS)
        raise UserError(f"{place}={folder.url}", f"holds no table but {_some(list(tags))}", f"name a file with {known}")
    return {f"{folder.url}/{path}": tag for path, tag in shown.items()}


def _format_of(url: str, endpoint: str | None) -> Format:
    """Return the format by the first bytes, or else by the extension. A `.json` file may hold JSON lines."""
    with open_binary(url, endpoint) as file:
        start = file.read(_FIRST_BYTES)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(url, "is a pointer of Git LFS, and not the file", "fetch the file with `git lfs pull`")
    if start.startswith(b"PAR1"):
        return "parquet"
    found = _EXTENSIONS.get(extension_of(url))
    if start.startswith(b"ARROW1"):
        return "arrow"
    if found is None:
        known = " ".join(_EXTENSIONS)
        raise UserError(url, f"has the extension {extension_of(url)!r}", f"name a file with one of {known}")
    if found == "parquet":
        raise UserError(url, f"is no Parquet file: it begins with {start[:8]!r}", "fetch it again")
    return "jsonl" if found == "json" and not url.endswith(".gz") and _has_json_lines(start) else found


def _has_json_lines(start: bytes) -> bool:
    first, newline, rest = start.lstrip(b"\xef\xbb\xbf \r\n\t").partition(b"\n")
    if not newline or not first.startswith(b"{") or not rest.lstrip().startswith(b"{"):
        return False
    try:
        json.loads(first)
    except ValueError:
        return False
    return True


def _check_parts(files: Sequence[TableFile], place: str) -> None:
    """Raise `UserError` if the names of the files count more parts than there are."""
    groups: dict[str, tuple[int, set[int]]] = {}
    for file in files:
        if match := _PART.search(file.name):
            _, numbers = groups.setdefault(file.url[: -len(match[0])] + match[2], (int(match[2]), set()))
            numbers.add(int(match[1]))
    for prefix, (total, numbers) in groups.items():
        absent = sorted(set(range(total)) - numbers)
        if total and absent and len(files) > 1:
            problem = f"has {len(numbers)} of {total} parts: {_some([f'{number:05d}' for number in absent])} missing"
            raise UserError(
                f"{place}={prefix[: -len(str(total))]}*", problem, "fetch the others, or list those you want"
            )


def _beside(url: str, endpoint: str | None) -> str:
    """Return what to do about a file that is missing: the names that are there instead."""
    store, _ = open_object(url, endpoint)
    if not isinstance(store, LocalStore):
        return "check the URL and the endpoint"
    if not store.root.is_dir():
        return f"check the path: {store.root} does not exist"
    return f"{store.root} has {_some(sorted(path.name for path in store.root.iterdir()))}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5:,} more" if len(names) > 5 else shown


FORMATS: tuple[Format, ...] = get_args(Format)
