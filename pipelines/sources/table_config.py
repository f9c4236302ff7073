"""Settings of a source that is a table: which columns are query, positive and negatives, and where its media are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipelines.config import Config, PositiveInt
from pipelines.samples import Split
from pipelines.sources.selectors import SelectorText

Urls = str | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
Value = str | int | float | bool


class Side(Config):
    """Where a query, a positive or negatives come from: text, media, both, or the id of a row of the pool."""

    text: SelectorText | None = None
    """Selector of the text. `name?` may be empty, but a side keeps text or media."""
    media: SelectorText | list[SelectorText] | None = None
    """Selector of bytes, of a path below `media_root`, or of a list of these, which are all shown. A list of selectors
    gives several media, in order."""
    page: SelectorText | None = None
    """Selector of the page of a PDF in `media`, from zero. An empty one, and `null`, is the first page."""
    id: SelectorText | None = None
    """Selector of an id, or of a list of ids, of rows of `pool`. It replaces `text` and `media`."""
    choose: Literal["one", "each"] | None = None
    """What a list gives: `one` element, drawn by the seed and the place of the row, or a sample for `each`. Lists of
    text and media are then pairs. `null`: one of several query texts, a sample for each text or id of a positive, a
    negative for each element. All media of a list are then in one query or positive."""
    parse: Literal["json", "python_list"] | None = None
    """How texts and paths are read that are lists written as a text. Nothing is evaluated."""

    @model_validator(mode="after")
    def _one_way(self) -> Side:
        if self.text is None and self.media is None and self.id is None:
            raise ValueError("names neither text nor media nor id")
        if self.id is not None and (self.text is not None or self.media is not None):
            raise ValueError("has an id, and text or media: the pool gives both")
        if self.page is not None and self.media is None:
            raise ValueError("has a page, and no media")
        return self

    @property
    def media_selectors(self) -> list[str]:
        """All selectors of media."""
        return [self.media] if isinstance(self.media, str) else list(self.media or ())


class Pool(Config):
    """A table of targets, which rows name by an id."""

    table: Urls | None = None
    """Files of the pool, as those of the source. `null`: the table of the source itself."""
    id: SelectorText | None = None
    """Selector of the id. Only a preset may leave it out of a spec."""
    text: SelectorText | None = None
    """Selector of the text."""
    media: SelectorText | list[SelectorText] | None = None
    """Selector of the medium, or a list of them."""
    page: SelectorText | None = None
    """Selector of the page of a PDF in `media`, from zero. An empty one, and `null`, is the first page."""
    media_root: Urls | None = None
    """Where the media of the pool are. `null`: where those of the source are."""


class FromColumn(Config):
    """A text that each row has in a column."""

    column: SelectorText
    """Selector of the text. An empty one is no text."""


class FromPrompts(Config):
    """Prompts by the dataset and the modalities of a row, as in M-BEIR. They are wordings of one instruction."""

    mbeir: str
    """M-BEIR's file `instructions/query_instructions.tsv`: path or URL."""


class TableSource(Config):
    """A source of `ingest` that is a table: Parquet, Arrow, JSON lines, JSON, CSV or TSV.

    A selector is `column`, `column.field`, `column[0]`, `column[*]` or `column[role=user].content`. `#0` is a column by
    its order, and `#2..` are all from there. `a | b` is the first that is not empty, and `name?` may be empty.
    """

    table: Urls
    """Path, glob or URL of the files, a folder of them, or a list. A folder that `save_to_disk` wrote is one, too."""
    preset: str | None = None
    """Name of a known layout, or `auto` for the one that the columns show. Other settings replace those of the preset.
    `null` where neither query nor positive is given: the settings that `rzen look` suggests.
    `pipelines/sources/README.md` lists the presets."""
    media_root: Urls | None = None
    """Folder, URL, zip or tar in which paths of media are looked up, or a list that is tried in order. `null`:
    the folder of the table."""
    rebase: dict[str, str] = Field(default_factory=dict)
    """Start of a path in the table -> what replaces it, such as `/mnt/old/images: images`."""
    query: Side | None = None
    """Where the query comes from."""
    positive: Side | None = None
    """Where the positive comes from."""
    negatives: list[Side] | None = None
    """Where mined negatives come from. Those that a row lacks are left out."""
    instruction: str | Annotated[list[str], Field(min_length=1)] | FromColumn | FromPrompts | None = None
    """Put before the query, in stages with instructions. `{column: prompt}` reads it from each row. A list, in the spec
    or in the column, has several wordings: training draws one in each epoch, and everything else takes the first.
    `null`: that of the task, where rzen knows it."""
    target_instruction: str | FromColumn | None = None
    """Put before the targets, in stages with instructions. `null`: that of the task, where rzen knows it."""
    task: Annotated[str, Field(min_length=1)] | None = None
    """Task of all samples; each task has its own temperature. `null`: by what query and positive of the first rows are,
    such as text_image."""
    split: Split | None = None
    """Split of all samples. `null`: drawn, with `held_out_fraction`."""
    split_by: SelectorText | None = None
    """Selector of a value that names the source: `visrag` becomes `visrag-ArxivQA` and so on. A batch comes from one
    source."""
    where: dict[str, Value | list[Value]] = Field(default_factory=dict)
    """Selector -> value, or list of values: rows with others are counted as `not_selected`."""
    unless: dict[str, Value | list[Value]] = Field(default_factory=dict)
    """Selector -> value, or list of values: rows with these are counted as `not_selected`."""
    limit: PositiveInt | None = None
    """At most this many samples, drawn from all by the seed. The others are counted as `over_limit`."""
    relevance: SelectorText | None = None
    """Selector of a number: how well the positive answers the query. The source is then trained on its order."""
    strip_tokens: bool = True
    """Whether to remove `<image>`, `<|image_1|>`, `<video>` and other placeholders from texts. Their number must be
    that of the media, or the row is counted as `placeholder_mismatch`."""
    pool: Pool | None = None
    """Table of the targets that `id` names."""
    license: str | None = None
    """License of the table. The report and `DATA.md` keep it."""


def with_settings(preset: Mapping[str, Any], config: TableSource) -> TableSource:
    """Return the settings of a preset, with those that the user wrote on top. Pools are merged."""
    own = config.model_dump(exclude_unset=True)
    merged = {**preset, **own}
    if isinstance(preset.get("pool"), Mapping) and isinstance(own.get("pool"), Mapping):
        merged["pool"] = {**preset["pool"], **own["pool"]}
    return TableSource.model_validate(merged)
