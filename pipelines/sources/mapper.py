"""Rows of a table to samples, by the settings of its source. A function of the row, the settings and the seed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipelines.errors import BadMedia
from pipelines.instructions import INSTRUCTIONS
from pipelines.samples import Input, Media, RawSample, Reference, Rejected, Sample, instruction_fields
from pipelines.sources.mbeir_prompts import MbeirPrompts
from pipelines.sources.media_roots import MediaRoots
from pipelines.sources.placeholders import strip_placeholders
from pipelines.sources.pool import PoolReader
from pipelines.sources.selectors import Cell, Row, find
from pipelines.sources.table_config import FromColumn, FromPrompts, Side, TableSource, Value
from pipelines.sources.values import Part, draw, media_values, number_of, page_of, parsed, resolve, text_of

Role = Literal["query", "positive", "negatives"]
_UNNAMED = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class RowMapper:
    """Makes samples of rows. `config` has no preset left, and its `task` is set."""

    source: str
    config: TableSource
    roots: MediaRoots
    seed: int
    pool: PoolReader | None = None
    prompts: MbeirPrompts | None = None

    def samples(self, row: Row) -> Iterator[RawSample | Rejected]:
        """Yield the samples of a row, or why it gives none.

        Reasons: not_selected, empty_text, no_media, missing_id, missing_file, outside_folder, web_address,
        unreadable_file, empty_file, placeholder_mismatch, unequal_lists, bad_list, not_text, not_a_medium,
        not_a_number, not_utf8, too_long_text, no_prompt.
        """
        try:
            if not self._is_selected(row):
                yield Rejected(row.origin, "not_selected")
                return
            yield from self._made(row)
        except BadMedia as bad:
            yield Rejected(row.origin, bad.reason, bad.detail)

    def _made(self, row: Row) -> Iterator[RawSample | Rejected]:
        config = self.config
        assert config.positive is not None
        assert config.task is not None
        queries = self._parts(config.query, row, "query") if config.query else [Part()]
        positives: list[Part] = []
        for make in self._makers(config.positive, row, "positive"):
            try:
                positives.append(self._stripped(make(), "positive"))
            except BadMedia as bad:  # the other positives of the row can be used
                yield Rejected(row.origin, bad.reason, bad.detail)
        negatives = [part for side in config.negatives or () for part in self._parts(side, row, "negatives")]
        negatives = [part for part in negatives if part not in positives]
        source = self._source(row)
        relevance = number_of(find(config.relevance, row), config.relevance) if config.relevance else None
        target_instruction = self._target_instruction(row)
        for query in queries:
            for positive in positives:
                try:
                    instructions = self._instructions(row, query, positive)
                except BadMedia as bad:  # prompts follow the modality of the positive
                    yield Rejected(row.origin, bad.reason, bad.detail)
                    continue
                files: dict[str, Reference] = {}
                sample = Sample(
                    key="",
                    source=source,
                    task=config.task,
                    query=_input(query, "q", files),
                    positive=_input(positive, "p", files),
                    negatives=tuple(_input(part, "n", files) for part in negatives),
                    **instruction_fields(instructions),
                    target_instruction=target_instruction,
                    origin=row.origin,
                    relevance=relevance,
                )
                yield RawSample(sample, files, config.split if config.query else "uncaptioned")

    def _is_selected(self, row: Row) -> bool:
        def holds(selector: str, values: Value | list[Value]) -> bool:
            cell = find(selector, row)
            found = "" if cell is None else cell.value
            return any(_equal(found, value) for value in (values if isinstance(values, list) else [values]))

        chosen = all(holds(selector, values) for selector, values in self.config.where.items())
        return chosen and not any(holds(selector, values) for selector, values in self.config.unless.items())

    def _source(self, row: Row) -> str:
        if not self.config.split_by:
            return self.source
        value = text_of(find(self.config.split_by, row), self.config.split_by)
        if not value:
            raise BadMedia("empty_text", f"split_by: {self.config.split_by}")
        return f"{self.source}-{_UNNAMED.sub('-', value).strip('-')[:100]}"

    def _instructions(self, row: Row, query: Part, positive: Part) -> Sequence[str]:
        """Return all wordings of the instruction, the main one first."""
        found = self.config.instruction
        if found is None:
            return INSTRUCTIONS.get(self.config.task or "", ("", ""))[:1]
        if isinstance(found, FromPrompts):
            assert self.prompts, "the table was opened"
            cell = find("qid", row)
            return self.prompts.wordings("" if cell is None else str(cell.value), query, positive, self.seed)
        if isinstance(found, FromColumn):
            cell = find(found.column, row)
            cells = cell.elements() if cell is not None and cell.is_list else [cell]
            return [text_of(one, found.column) for one in cells]
        return [found] if isinstance(found, str) else found

    def _target_instruction(self, row: Row) -> str:
        found = self.config.target_instruction
        return _constant(found, row) if found is not None else INSTRUCTIONS.get(self.config.task or "", ("", ""))[1]

    def _parts(self, side: Side, row: Row, role: Role) -> list[Part]:
        """Return the parts that a side gives, without empty negatives. Raises `BadMedia` for a bad one."""
        parts = [self._stripped(make(), role) for make in self._makers(side, row, role)]
        return [part for part in parts if role != "negatives" or part.text or part.media]

    def _makers(self, side: Side, row: Row, role: Role) -> list[Callable[[], Part]]:
        """Return what makes each part of a side: one for `one`, one for each element for `each`."""
        makers = self._of_pool(side, row) if side.id else self._of_columns(side, row, role)
        if not makers and role != "negatives":
            raise BadMedia("missing_id", f"{role}: {side.id} is empty")
        choose = side.choose or ("one" if role == "query" else "each")
        if choose == "one" and makers:
            return [makers[draw(self.seed, role, row.origin) % len(makers)]]
        return makers

    def _of_pool(self, side: Side, row: Row) -> list[Callable[[], Part]]:
        pool = self.pool
        assert pool is not None
        assert side.id is not None
        cell = parsed(find(side.id, row), side.parse)
        ids = [element.value for element in cell.elements() if not element.is_empty] if cell else []
        return [lambda id=str(id): pool.get(id) for id in ids]  # type: ignore[misc]

    def _of_columns(self, side: Side, row: Row, role: Role) -> list[Callable[[], Part]]:
        text = parsed(find(side.text, row), side.parse) if side.text else None
        media = [parsed(find(selector, row), side.parse) for selector in side.media_selectors]
        pages = find(side.page, row) if side.page else None
        self._check_present(side, role, text, media)
        spread = side.choose is not None or role == "negatives"  # over the elements of lists of media
        lists = [len(cell.elements()) for cell in media if cell and cell.is_list and spread]
        lists += [len(cell.elements()) for cell in (text, pages if spread else None) if cell and cell.is_list]
        if len(set(lists)) > 1:
            raise BadMedia("unequal_lists", f"{role}: {' and '.join(map(str, lists))} elements")

        def part(number: int) -> Part:
            values = [value for cell in media for value in media_values(_element(cell, number, spread), row)]
            words = text_of(_element(text, number, True), side.text or "")
            page = page_of(_element(pages, number, spread), side.page or "")
            return Part(words, tuple(resolve(value, self.roots, page) for value in values))

        return [lambda number=number: part(number) for number in range(max(lists, default=1))]  # type: ignore[misc]

    def _check_present(self, side: Side, role: Role, text: Cell | None, media: list[Cell | None]) -> None:
        """Raise `BadMedia` for a part that is empty and may not be. Negatives may lack anything."""
        if role == "negatives":
            return
        if side.text and text is None and "?" not in side.text:
            raise BadMedia("empty_text", f"{role}: {side.text}")
        for selector, cell in zip(side.media_selectors, media, strict=True):
            if cell is None and "?" not in selector:
                raise BadMedia("no_media", f"{role}: {selector}")

    def _stripped(self, part: Part, role: Role) -> Part:
        if role != "negatives" and not part.text and not part.media:
            raise BadMedia("empty_text", f"{role} has neither text nor media")
        if not self.config.strip_tokens:
            return part
        text, count = strip_placeholders(part.text)
        if count and count != len(part.media):
            detail = f"{role}: {count} placeholders in {part.text[:60]!r}, {len(part.media)} media"
            raise BadMedia("placeholder_mismatch", detail)
        return Part(text, part.media)


def _element(cell: Cell | None, number: int, spread: bool) -> Cell | None:
    if cell is None or not cell.is_list or not spread:
        return cell
    elements = cell.elements()
    return elements[number] if number < len(elements) else None


def _input(part: Part, slot: str, files: dict[str, Reference]) -> Input:
    """Return the input, and add its references. Kinds are provisional: members without extension get them when read."""
    media = []
    start = sum(member.startswith(slot) for member in files)
    for number, ref in enumerate(part.media, start):
        media.append(Media("image", f"{slot}{number}"))
        files[f"{slot}{number}"] = ref
    return Input(part.text, tuple(media))


def _constant(found: str | FromColumn, row: Row) -> str:
    return text_of(find(found.column, row), found.column) if isinstance(found, FromColumn) else found


def _equal(found: object, value: Value) -> bool:
    return found == value or str(found).casefold() == str(value).casefold()


def selectors_of(config: TableSource) -> Mapping[str, str]:
    """Return every selector of a source by the setting that has it. A setting with several gets numbers."""
    return _Selectors(config).found


@dataclass
class _Selectors:
    config: TableSource
    found: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.config
        sides = [("query", config.query), ("positive", config.positive)]
        sides += [(f"negatives[{number}]", side) for number, side in enumerate(config.negatives or ())]
        for name, side in sides:
            if side:
                self._add(f"{name}.text", side.text)
                self._add(f"{name}.id", side.id)
                self._add(f"{name}.page", side.page)
                for selector in side.media_selectors:
                    self._add(f"{name}.media", selector)
        for name in ("instruction", "target_instruction"):
            value = getattr(config, name)
            self._add(f"{name}.column", value.column if isinstance(value, FromColumn) else None)
        if isinstance(config.instruction, FromPrompts):
            self._add("instruction.mbeir", "qid")
        self._add("split_by", config.split_by)
        self._add("relevance", config.relevance)
        for name in ("where", "unless"):
            for selector in getattr(config, name):
                self._add(f"{name}.{selector}", selector)

    def _add(self, name: str, selector: str | None) -> None:
        if selector:
            key = name if name not in self.found else f"{name}[{len(self.found)}]"
            self.found[key] = selector
