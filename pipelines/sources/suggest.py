"""Settings for a table that nobody has described yet. They follow from its columns, and from the files near it."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pipelines.errors import BadMedia
from pipelines.media.files import KINDS
from pipelines.samples import CellRef
from pipelines.sources.mapper import selectors_of
from pipelines.sources.media_roots import media_roots
from pipelines.sources.presets import Preset, recognize
from pipelines.sources.selectors import Row, find, parse_selector
from pipelines.sources.table_config import TableSource, with_settings
from pipelines.sources.table_files import is_table
from pipelines.sources.table_rows import read_rows
from pipelines.sources.units import Unit
from pipelines.sources.values import media_values
from pipelines.storage.location import open_store
from pipelines.storage.shard_urls import is_glob
from pipelines.storage.urls import is_local, local_path, plain_path

_QUERY = re.compile(r"(?i)^(query|question|anchor|caption|title|text|prompt|instruction|sentence1|premise)")
_TARGET = re.compile(r"(?i)^(pos|answer|response|target|document|passage|sentence2|hypothesis|description|label|class)")
_QUESTION = re.compile(r"(?i)question")
_NEGATIVE = re.compile(r"(?i)neg")
_ID = re.compile(r"(?i)(^|_)(id|ids|idx|index|key|url|hash|license|split|lang|language|source)$")
_MAX_ROOTS = 60
_MAX_ARCHIVES = 20
_MAX_LISTED = 20_000  # objects of a store: a folder may have millions
_NUM_PATHS = 20
_MAX_ROWS = 1000
_NUM_SPREAD = 50
_Found = tuple[int, str, str]
"""How many of the paths were found, the root, and what is removed from the start of paths."""


def suggest_columns(columns: Sequence[str], rows: Sequence[Row]) -> tuple[Preset | None, dict[str, Any]]:
    """Return the layout of a table, if it is a known one, and the settings of query, positive and negatives.

    The settings are empty if no column could be a query or a positive.
    """
    preset = recognize(columns, rows)
    if preset is not None:
        return preset, {"preset": preset.name}
    columns = [name for name in columns if _is_selector(name)]
    media = [name for name in columns if _holds_media(name, rows)]
    texts = [name for name in columns if name not in media and not _ID.search(name) and _holds_text(name, rows)]
    negatives = [name for name in (*texts, *media) if _NEGATIVE.search(name)]
    texts, media = ([name for name in names if name not in negatives] for names in (texts, media))
    query = _first(texts, rows, _QUERY, avoid=_TARGET)
    if query is None or (len(texts) < 2 and not media):
        return None, {}
    target = _first([name for name in texts if name != query], rows, _TARGET)
    found: dict[str, Any] = {"query": {"text": query}, "positive": {"media": media[0]} if media else {"text": target}}
    if media and target and _QUESTION.search(query) and _TARGET.search(target):
        found = {"query": {"text": query, "media": media[0]}, "positive": {"text": target}}
    if negatives:
        kind = "media" if _holds_media(negatives[0], rows) else "text"
        found["negatives"] = [{kind: f"{negatives[0]}?"}]
    return None, found


def suggest_roots(
    settings: Mapping[str, Any],
    preset: Preset | None,
    table: str,
    units: Sequence[Unit],
    first: Sequence[Row],
    endpoint: str | None,
) -> dict[str, Any]:
    """Return `media_root`, and `rebase` for absolute paths. Both are left out where the media are found without.

    `first` are the first rows of the units.
    """
    written = {key: value for key, value in settings.items() if key != "preset"}
    config = with_settings(preset.settings if preset else {}, TableSource.model_validate({"table": table, **written}))
    selectors = [text for name, text in selectors_of(config).items() if ".media" in name]
    found = list(_paths(selectors, _spread(units, first, endpoint)))
    paths = found[:: max(1, len(found) // _NUM_PATHS)]
    if not paths:
        return {}
    folder = _folder_of(table)
    if is_local(folder) and (root := _root_of_absolute(found)):
        return {} if Path(root).is_relative_to(folder) else {"media_root": root}
    find = _best_on_disk if is_local(folder) else _best_in_store
    count, root, start = find(folder, paths, endpoint)
    if not count or (root == folder and not start):  # where media are looked for anyway
        return {}
    return {"media_root": root} | ({"rebase": {start: ""}} if start else {})


def _spread(units: Sequence[Unit], first: Sequence[Row], endpoint: str | None) -> list[Row]:
    """Return 50 of the first 1,000 rows, evenly, as the first may lack media. Rows of bytes are the first ones."""
    if any(_has_bytes(value) for row in first for value in row.values.values()):
        return list(first)
    found = (row for unit in units for row in read_rows(unit, None, endpoint) if isinstance(row, Row))
    many = list(islice(found, _MAX_ROWS))
    return many[:: max(1, len(many) // _NUM_SPREAD)]


def _has_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_bytes, value.values()))
    return any(map(_has_bytes, value)) if isinstance(value, list) else isinstance(value, bytes)


def _root_of_absolute(values: Sequence[str]) -> str | None:
    """Return the folder that holds all files, if their paths are absolute and any of them is there. Else None."""
    paths = [plain_path(value) for value in values]
    if not all(map(posixpath.isabs, paths)) or not any(Path(path).exists() for path in paths):
        return None
    root = posixpath.commonpath([posixpath.dirname(path) for path in paths])
    return root if root.strip("/") else None


def _folder_of(table: str) -> str:
    """Return the folder of a table, which is itself a folder, a file or a pattern."""
    if is_local(table):
        return str(local_path(table) if local_path(table).is_dir() else local_path(table).parent)
    parts = table.rstrip("/").split("/")
    pattern = next((number for number, part in enumerate(parts) if is_glob(part)), len(parts) - is_table(parts[-1]))
    return "/".join(parts[:pattern])


def _best_on_disk(folder: str, paths: Sequence[str], endpoint: str | None) -> _Found:
    best: _Found = (_num_found(paths, folder, "", endpoint), folder, "")
    for root in _candidates(Path(folder)):
        if best[0] == len(paths):
            break
        for start in _starts(paths[0]):
            best = max(best, (_num_found(paths, root, start, endpoint), root, start), key=lambda one: one[0])
    return best


def _best_in_store(folder: str, paths: Sequence[str], endpoint: str | None) -> _Found:
    """Look in the listings of the folder and of two folders above: an object store does not say what exists."""
    parts = folder.split("/")  # scheme, nothing, bucket, folders
    tops = ["/".join(parts[:number]) for number in range(len(parts), max(3, len(parts) - 2) - 1, -1)]
    best: _Found = (0, folder, "")
    for top in tops:
        names = list(islice(open_store(top, endpoint).walk(), _MAX_LISTED))
        archives = [f"{top}/{name}" for name in names if name.lower().endswith((".zip", ".tar"))][:_MAX_ARCHIVES]
        for start in _starts(paths[0]):
            counts = Counter(root for path in paths for root in _roots_of(path.removeprefix(start), names))
            found = [(count, f"{top}/{root}".rstrip("/"), start) for root, count in sorted(counts.items())]
            found += [(_num_found(paths, archive, start, endpoint), archive, start) for archive in archives]
            best = max([best, *found], key=lambda one: one[0])
        if best[0] == len(paths):
            break
    return best


def _roots_of(path: str, names: Sequence[str]) -> Iterator[str]:
    """Yield the folders in which a listing has a path."""
    return (name[: len(name) - len(path)] for name in names if name == path or name.endswith(f"/{path}"))


def _paths(selectors: Sequence[str], rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        for selector in selectors:
            try:
                values = media_values(find(selector, row), row)
            except BadMedia:
                continue
            yield from (value for value in values if isinstance(value, str))


def _candidates(folder: Path) -> Iterator[str]:
    """Yield places in which media may be: folders above, and folders and archives in each of these."""
    near = [folder, *islice(folder.parents, 2)]
    inside = (path for place in near for path in sorted(place.iterdir()) if not path.name.startswith("."))
    found = (path for path in inside if path.is_dir() or path.name.lower().endswith((".zip", ".tar")))
    yield from map(str, [*near, *islice(found, _MAX_ROOTS)])


def _starts(path: str) -> list[str]:
    """Return what may be removed from the start of a path: nothing, or one folder after the other."""
    parts = path.split("/")
    return ["", *("/".join(parts[:number]) + "/" for number in range(1, len(parts)))]


def _num_found(paths: Sequence[str], root: str, start: str, endpoint: str | None) -> int:
    roots = media_roots([root], {start: ""} if start else {}, endpoint=endpoint)
    count = 0
    for path in paths:
        try:
            roots.find(path)
        except BadMedia:
            continue
        count += 1
    return count


def _holds_media(name: str, rows: Sequence[Row]) -> bool:
    try:
        values = [value for row in rows for value in media_values(find(name, row), row)]
    except BadMedia:
        return False
    return bool(values) and all(isinstance(value, CellRef) or _is_path(value) for value in values)


def _is_path(text: str) -> bool:
    return posixpath.splitext(text)[1].lower() in KINDS and "\n" not in text and len(text) < 500


def _is_selector(name: str) -> bool:
    try:
        parse_selector(name)
    except ValueError:
        return False
    return True


def _holds_text(name: str, rows: Sequence[Row]) -> bool:
    values = [element.value for row in rows if (cell := find(name, row)) for element in cell.elements()]
    return bool(values) and all(isinstance(value, str) for value in values)


def _first(
    names: Sequence[str], rows: Sequence[Row], wanted: re.Pattern[str], avoid: re.Pattern[str] | None = None
) -> str | None:
    """Return the best column of texts: by its name, then one of several words, then one with no name to avoid."""

    def rank(name: str) -> tuple[bool, bool, bool]:
        return not wanted.search(name), not _has_words(name, rows), bool(avoid and avoid.search(name))

    return min(names, key=rank, default=None)


def _has_words(name: str, rows: Sequence[Row]) -> bool:
    values = [element.value for row in rows if (cell := find(name, row)) for element in cell.elements()]
    return 2 * sum(" " in str(value).strip() for value in values) > len(values)
