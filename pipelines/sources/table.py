"""A table as a source of samples: opened and checked once, then read by units anywhere.

    open_table(name, settings) -> TableReader: files, columns, preset, media roots and first rows are checked
    reader.units()             -> parts of the files; no row is read
    reader.read(unit)          -> RawSample or Rejected for each row; needs nothing but the reader, which pickles

Nothing holds the bytes of media: samples have references to them.
"""

from __future__ import annotations

import difflib
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.media.signatures import NUM_BYTES, sniff
from pipelines.samples import FileRef, MediaKind, RawSample, Reference, Rejected
from pipelines.sources.mapper import RowMapper, selectors_of
from pipelines.sources.mbeir_prompts import MbeirPrompts
from pipelines.sources.media_roots import MediaRoots, media_roots
from pipelines.sources.pool import PoolReader
from pipelines.sources.presets import choose_preset
from pipelines.sources.references import ReferenceReader
from pipelines.sources.selectors import Row, parse_selector
from pipelines.sources.suggest import suggest_columns, suggest_roots
from pipelines.sources.table_config import FromPrompts, TableSource, with_settings
from pipelines.sources.table_files import TableFile, absolute, find_table
from pipelines.sources.table_rows import list_columns, list_units, read_rows, wanted_columns
from pipelines.sources.units import Unit
from pipelines.sources.values import draw
from pipelines.storage.location import open_object
from pipelines.storage.urls import is_local

LARGE_UNIT_BYTES = 256 << 20
_PROBED_ROWS = 50
_MAX_PROBED_ROWS = 1000
_UNKNOWN = "?"  # the task, until the first rows show it
_PROBED_OBJECTS = 8


@dataclass(frozen=True)
class TableReader:
    """An opened table. It pickles, and `read` depends on the reader and the unit only."""

    mapper: RowMapper
    files: tuple[TableFile, ...]
    preset: str
    endpoint: str | None
    suggested: Mapping[str, Any] = field(default_factory=dict)
    """The settings that nobody wrote."""

    @property
    def name(self) -> str:
        """Name of the source."""
        return self.mapper.source

    def units(self) -> list[Unit]:
        """Return the parts of all files, in order."""
        return [unit for file in self.files for unit in list_units(file, self.endpoint)]

    def unit_id(self, unit: Unit) -> str:
        """Return 32 hex digits that change with whatever changes the samples of a unit."""
        pool = self.mapper.pool
        settings = self.mapper.config.model_dump_json(exclude={"limit", "license"})
        return unit.id(f"{self.name} {self.mapper.seed} {pool.files if pool else ''} {settings}")

    def read(self, unit: Unit) -> Iterator[RawSample | Rejected]:
        """Yield the samples of a unit, and why other rows give none. Settings of `limit` are left to `read_all`."""
        for row in self.rows(unit):
            if isinstance(row, Rejected):
                yield row
            else:
                yield from self.mapper.samples(row)

    def rows(self, unit: Unit) -> Iterator[Row | Rejected]:
        """Yield the rows of a unit with the columns that the settings name."""
        selectors = selectors_of(self.mapper.config).values()
        return read_rows(unit, partial(wanted_columns, selectors), self.endpoint)

    def read_all(self) -> Iterator[RawSample | Rejected]:
        """Yield what all units give, in order. With a `limit`, the samples beyond it are counted as `over_limit`."""
        found = chain.from_iterable(map(self.read, self.units()))
        limit = self.mapper.config.limit
        return found if limit is None else _limited(found, limit, self.mapper.seed)


def open_table(
    name: str,
    config: TableSource,
    *,
    seed: int = 0,
    endpoint: str | None = None,
    follow_links: bool = False,
    keep_uncaptioned: bool = False,
) -> TableReader:
    """Return the reader of a source. The first rows are read, and nothing else.

    With `keep_uncaptioned`, a source may have no query. Its samples are then of the split `uncaptioned`.

    Raises `UserError` for files, columns, presets, media roots and pools that are missing or do not fit: place, value,
    what is there instead, and what to do.
    """
    place = f"sources.{name}"
    files = tuple(find_table(config.table, endpoint, f"{place}.table"))
    columns = [column.name for column in list_columns(files[0], endpoint)]
    rows = _first_rows(files, endpoint)
    suggested: Mapping[str, Any] = {}
    if config.query is None and config.positive is None and config.preset is None:
        suggested = _suggested(place, config, columns, rows, files, endpoint)
        config = with_settings(suggested, config)
    preset, config = _with_preset(place, config, columns, rows, keep_uncaptioned)
    _check_columns(place, selectors_of(config), columns, files[0])
    roots = _roots(place, config.media_root, files, config, endpoint, follow_links)
    pool = _pool(place, config, files, roots, endpoint)
    prompts = _prompts(config, endpoint)
    mapper = RowMapper(name, config.model_copy(update={"task": config.task or _UNKNOWN}), roots, seed, pool, prompts)
    reader = TableReader(mapper, files, preset, endpoint, suggested)
    probe = _probe(reader)
    probe.check(place, roots)
    _check_stored(probe, place, endpoint)
    if config.task is None:
        mapper = replace(mapper, config=config.model_copy(update={"task": probe.task(place)}))
    return replace(reader, mapper=mapper)


def _first_rows(files: Iterable[TableFile], endpoint: str | None) -> list[Row]:
    found = (row for file in files for unit in list_units(file, endpoint) for row in read_rows(unit, None, endpoint))
    return list(islice((row for row in found if isinstance(row, Row)), _PROBED_ROWS))


def _suggested(
    place: str,
    config: TableSource,
    columns: list[str],
    rows: list[Row],
    files: tuple[TableFile, ...],
    endpoint: str | None,
) -> dict[str, Any]:
    """Return what reads a table, but for what its settings say: preset or columns, and where the media are."""
    preset, settings = suggest_columns(columns, rows)
    if not settings:
        problem = f"no column says what is a query and what is a positive: there are {', '.join(columns)}"
        fix = "write query: {text: COLUMN} and positive: {media: COLUMN}"
        raise UserError(f"{place}.table={files[0].url}", problem, fix)
    if config.media_root is None and not config.rebase:
        table = config.table if isinstance(config.table, str) else config.table[0]
        units = [unit for file in files for unit in list_units(file, endpoint)]
        settings |= suggest_roots(settings, preset, table, units, rows, endpoint)
    return settings


def _with_preset(
    place: str, config: TableSource, columns: list[str], rows: list[Row], keep_uncaptioned: bool
) -> tuple[str, TableSource]:
    if config.preset:
        preset = choose_preset(config.preset, columns, rows, place)
        return preset.name, with_settings(preset.settings, config)
    if keep_uncaptioned and config.query is None and config.positive is not None:
        return "", config
    missing = "query" if config.query is None else "positive"
    if config.query is None or config.positive is None:
        raise UserError(place, f"has no {missing}", f"write {missing}: {{text: COLUMN}}, or name a preset")
    return "", config


def _check_columns(place: str, selectors: Mapping[str, str], columns: list[str], file: TableFile) -> None:
    """Raise `UserError` for a selector none of whose columns exists, with the most similar one."""
    for setting, text in selectors.items():
        selector = parse_selector(text)
        if selector.is_optional or any(path.columns(columns) for path in selector.paths):
            continue
        known = ", ".join(columns)
        wanted = selector.paths[0].column or selector.paths[0].text
        lowered = {column.lower(): column for column in columns}
        near = difflib.get_close_matches(wanted.lower(), lowered, 1)
        fix = f"did you mean {lowered[near[0]]!r}?" if near else f"name one of its columns, or write {text + '?'!r}"
        raise UserError(f"{place}.{setting}={text!r}", f"{file.url} has no such column, but {known}", fix)


def _roots(
    place: str,
    urls: str | list[str] | None,
    files: tuple[TableFile, ...],
    config: TableSource,
    endpoint: str | None,
    follow_links: bool,
) -> MediaRoots:
    given = [urls] if isinstance(urls, str) else urls
    found = given or [files[0].url.removesuffix(files[0].name).rstrip("/") or "/"]
    roots = media_roots(found, config.rebase, endpoint=endpoint, follow_links=follow_links)
    if given:
        roots.check(f"{place}.media_root")
    return roots


def _pool(
    place: str, config: TableSource, files: tuple[TableFile, ...], roots: MediaRoots, endpoint: str | None
) -> PoolReader | None:
    uses = [side for side in (config.query, config.positive, *(config.negatives or ())) if side and side.id]
    if not uses:
        return None
    pool = config.pool
    if pool is None or pool.id is None:
        raise UserError(place, "names targets by id and has no pool", "add pool: {table: FILE, id: COLUMN, ...}")
    own = tuple(find_table(pool.table, endpoint, f"{place}.pool.table")) if pool.table else files
    columns = [column.name for column in list_columns(own[0], endpoint)]
    if pool.table is None and not any(path.columns(columns) for path in parse_selector(pool.id).paths):
        problem = f"names targets by id, and {own[0].url} has no column {pool.id!r} of ids"
        raise UserError(place, problem, f"add pool: {{table: FILE}}, the table of the targets, which has {pool.id!r}")
    media = [pool.media] if isinstance(pool.media, str) else list(pool.media or ())
    selectors = {"id": pool.id} | {name: text for name in ("text", "page") if (text := getattr(pool, name))}
    selectors |= {f"media[{number}]": selector for number, selector in enumerate(media)}
    _check_columns(f"{place}.pool", selectors, columns, own[0])
    if pool.media_root:
        roots = _roots(f"{place}.pool", pool.media_root, own, config, endpoint, roots.follow_links)
    return PoolReader(own, pool, roots, endpoint)


def _prompts(config: TableSource, endpoint: str | None) -> MbeirPrompts | None:
    if not isinstance(config.instruction, FromPrompts):
        return None
    prompts = MbeirPrompts(absolute(config.instruction.mbeir), endpoint)
    prompts.check()
    return prompts


@dataclass
class _Probe:
    """What the first rows give."""

    samples: list[RawSample]
    rejected: list[Rejected]
    kinds: dict[str, MediaKind]

    def check(self, place: str, roots: MediaRoots) -> None:
        """Raise `UserError` if no row gives a sample, unless the rows were not selected."""
        reasons = Counter(item.reason for item in self.rejected)
        if self.samples or not reasons or "not_selected" in reasons:
            return
        reason, count = reasons.most_common(1)[0]
        first = next(item for item in self.rejected if item.reason == reason)
        problem = f"none of the first {len(self.rejected)} rows can be used: {reason} {count}, as in {first.origin}"
        fix = "see the settings with `rzen look`"
        if reason in ("missing_file", "outside_folder"):
            fix = f"correct media_root or rebase: media are looked for in {', '.join(roots.urls)}{roots.hint()}"
        elif reason == "web_address":
            fix = "then read the tars that it writes with `rzen index`"
        raise UserError(place, f"{problem} ({first.detail})", fix)

    def task(self, place: str) -> str:
        """Return the task of the first sample, by the kinds of query and positive."""
        if not self.samples:
            problem = f"has no task, and none of the first {len(self.rejected):,} rows is selected to show it"
            raise UserError(place, problem, "write task: text_image, or another name")
        sample = self.samples[0].sample
        query = ["text"] if self.samples[0].split == "uncaptioned" else self._kinds("q", sample.query.text)
        return "_".join([*query, *self._kinds("p", sample.positive.text)])

    def _kinds(self, slot: str, text: str) -> list[str]:
        names = {"image": "image", "video": "video", "document": "page"}
        found = [names[kind] for member, kind in self.kinds.items() if member.startswith(slot)]
        return [*dict.fromkeys(found), *(["text"] if text else [])]


def _probe(reader: TableReader) -> _Probe:
    """Map the first 50 rows, or as many as one good sample needs, up to 1,000: rows without media may come first."""
    probe = _Probe([], [], {})
    units = (unit for file in reader.files for unit in list_units(file, reader.endpoint))
    rows = (row for unit in units for row in reader.rows(unit))
    for number, row in enumerate(islice(rows, _MAX_PROBED_ROWS), start=1):
        for item in [row] if isinstance(row, Rejected) else reader.mapper.samples(row):
            if isinstance(item, Rejected):
                probe.rejected.append(item)
            else:
                probe.samples.append(item)
        if number >= _PROBED_ROWS and probe.samples:
            break
    if probe.samples and reader.mapper.config.task == _UNKNOWN:
        with ReferenceReader(MediaConfig(), reader.endpoint) as files:
            for member, ref in probe.samples[0].files.items():
                probe.kinds[member] = kind_of_reference(ref, files) or "image"
    return probe


def _check_stored(probe: _Probe, place: str, endpoint: str | None) -> None:
    """Raise `UserError` if an object store has none of the first media: a folder there is listed by nobody."""
    refs = [ref for raw in probe.samples for ref in raw.files.values() if isinstance(ref, FileRef)]
    stored = [ref for ref in refs if not is_local(ref.path)][:_PROBED_OBJECTS]
    found = (open_object(ref.path, endpoint) for ref in stored)
    if stored and not any(store.exists(path) for store, path in found):
        problem = f"none of the first {len(stored)} media is there, such as {stored[0].path}"
        raise UserError(place, problem, "correct media_root or rebase")


def kind_of_reference(ref: Reference, reader: ReferenceReader) -> MediaKind | None:
    """Return the kind of a medium by its bytes. None for one that cannot be read or has an unknown format."""
    try:
        data = reader.read(ref)
    except BadMedia:
        return None
    if isinstance(data, list):
        return "video"
    found = sniff(data[:NUM_BYTES])
    return found[0] if found else None


def _limited(found: Iterable[RawSample | Rejected], limit: int, seed: int) -> Iterator[RawSample | Rejected]:
    """Yield `limit` samples, drawn by seed and place, in their order. Memory holds these only."""
    kept: list[tuple[int, int, RawSample]] = []
    for number, item in enumerate(found):
        if isinstance(item, Rejected):
            yield item
            continue
        entry = (-draw(seed, "limit", f"{item.sample.origin} {number}"), number, item)
        if len(kept) < limit:
            heapq.heappush(kept, entry)
        else:
            yield Rejected(heapq.heappushpop(kept, entry)[2].sample.origin, "over_limit")
    for _, _, item in sorted(kept, key=lambda entry: entry[1]):
        yield item
