"""Layouts of published datasets: the columns by which each is recognized, and the settings that read it.

The more special layout comes first. A preset with `looks` is recognized if these columns look so in the first rows.
Rows keep all positives of their lists, each in a sample of its own. Only MegaPairs draws, one of its instructions.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.errors import UserError
from pipelines.sources.selectors import Row, find

_NONE = {"instruction": "", "target_instruction": ""}
_BRACKET = r"\s*\[\s*(['\"]|\])"
_CAPTIONING = r"(?is).*\b(describe|description|caption|narrat|detail|happening|summar)"
_LAST = "[-1].content"


@dataclass(frozen=True)
class Preset:
    """A layout. `about` says which data have it, `settings` are those of a source."""

    name: str
    about: str
    columns: tuple[str, ...]
    settings: Mapping[str, Any]
    without: tuple[str, ...] = ()
    """Columns that it does not have."""
    looks: Mapping[str, str] = field(default_factory=dict)
    """Selector -> pattern of all values in the first rows."""
    by_name: bool = False
    """Whether it is used only if a spec names it, because other layouts have the same columns."""

    def fits(self, columns: Sequence[str], rows: Sequence[Row]) -> bool:
        """Return whether a table is recognized as one of this layout."""
        if self.by_name or not {*self.columns} <= {*columns} or {*self.without} & {*columns}:
            return False
        return all(_looks(selector, pattern, rows) for selector, pattern in self.looks.items())


def _looks(selector: str, pattern: str, rows: Sequence[Row]) -> bool:
    cells = [cell for row in rows if (cell := find(selector, row)) and not cell.is_empty]
    return bool(cells) and all(isinstance(cell.value, str) and re.match(pattern, cell.value) for cell in cells)


def _mmeb(**negatives: str) -> dict[str, Any]:
    return {
        "query": {"text": "qry?", "media": "qry_image_path?"},
        "positive": {"text": "pos_text?", "media": "pos_image_path?"},
        "negatives": [{"text": "neg_text?", "media": "neg_image_path?", **negatives}],
        **_NONE,  # the instruction is part of `qry`
    }


def _pairs(query: str, positive: str, **more: Any) -> dict[str, Any]:
    return {"query": {"text": query}, "positive": {"text": positive}, "task": "text_text", **more}


def _ms_swift() -> dict[str, Any]:
    return {
        "query": {"text": f"messages{_LAST}", "media": "images?"},
        "positive": {"text": f"positive_messages[*]{_LAST}?", "media": "positive_images?", "choose": "each"},
        "negatives": [{"text": f"negative_messages[*]{_LAST}?", "media": "negative_images?"}],
        "instruction": {"column": "messages[role=system].content?"},
        "target_instruction": "",
        "unless": {"label?": 0},
    }


PRESETS: tuple[Preset, ...] = (
    Preset(
        "mme5",
        "mmE5: MMEB with negatives as texts of Python lists",
        ("qry", "qry_image_path", "pos_text", "pos_image_path"),
        _mmeb(parse="python_list"),
        looks={"neg_text | neg_image_path": _BRACKET},
    ),
    Preset(
        "mmeb",
        "MMEB-train: texts and paths of pictures of query, positive and negative",
        ("qry", "qry_image_path", "pos_text", "pos_image_path"),
        _mmeb(),
    ),
    Preset(
        "megapairs",
        "MegaPairs: picture and instruction to picture, with hard negatives",
        ("q_img", "q_text", "t_img", "hns"),
        {
            "query": {"text": "q_text", "media": "q_img", "choose": "one"},
            "positive": {"media": "t_img"},
            "negatives": [{"media": "hns?"}],
            "task": "image_text_image",
        },
    ),
    Preset(
        "mbeir",
        "M-BEIR, query files: targets are in a pool, pool.table",
        ("qid", "query_txt", "query_img_path", "pos_cand_list"),
        {
            "query": {"text": "query_txt?", "media": "query_img_path?"},
            "positive": {"id": "pos_cand_list.did | pos_cand_list"},
            "negatives": [{"id": "neg_cand_list.did? | neg_cand_list?"}],
            "pool": {"id": "did", "text": "txt?", "media": "img_path?"},
            **_NONE,
        },
    ),
    Preset(
        "vdr",
        "vdr-multilingual: query to page, with negatives as ids of other rows",
        ("id", "query", "image", "negatives"),
        {
            "query": {"text": "query"},
            "positive": {"media": "image"},
            "negatives": [{"id": "negatives?"}],
            "pool": {"id": "id", "media": "image"},
            "task": "text_page",
        },
    ),
    Preset(
        "colpali",
        "ColPali: query to page",
        ("query", "image", "answer"),
        {"query": {"text": "query"}, "positive": {"media": "image"}, "task": "text_page"},
    ),
    Preset(
        "colpali_answer",
        "ColPali as VLM2Vec trains on it: page and question to answer",
        ("query", "image", "answer"),
        {"query": {"text": "query", "media": "image"}, "positive": {"text": "answer"}, "task": "page_text_text"},
        by_name=True,
    ),
    Preset(
        "visrag",
        "VisRAG: query to page, a source for each value of `source`",
        ("query", "image", "source"),
        {
            "query": {"text": "query"},
            "positive": {"media": "image"},
            "split_by": "source",
            "task": "text_page",
        },
    ),
    Preset(
        "llava_hound_caption",
        "LLaVA-Hound, captions: text to video",
        ("video", "conversations"),
        {"query": {"text": "conversations[1].value"}, "positive": {"media": "video"}, "task": "text_video"},
        looks={"conversations[0].value": _CAPTIONING},
    ),
    Preset(
        "llava_hound_back",
        "LLaVA-Hound, captions: video to text",
        ("video", "conversations"),
        {"query": {"media": "video"}, "positive": {"text": "conversations[1].value"}, "task": "video_text"},
        by_name=True,
    ),
    Preset(
        "llava_hound_qa",
        "LLaVA-Hound, questions: video and question to answer",
        ("video", "conversations"),
        {
            "query": {"text": "conversations[0].value", "media": "video"},
            "positive": {"text": "conversations[1].value"},
            "task": "video_text_text",
        },
    ),
    Preset(
        "cc3m",
        "CC3M of U-MARVEL: caption to picture",
        ("h5v", "instruct_ans"),
        {"query": {"text": "instruct_ans[0]"}, "positive": {"media": "h5v"}, "task": "text_image"},
    ),
    Preset(
        "sharegpt4v",
        "ShareGPT4V of U-MARVEL: caption to picture",
        ("image", "txt"),
        {"query": {"text": "txt"}, "positive": {"media": "image"}, "task": "text_image"},
    ),
    Preset(
        "pixelprose",
        "PixelProse of MoCa: caption to picture, as bytes in a list",
        ("text", "images"),
        {"query": {"text": "text"}, "positive": {"media": "images[0]"}, "task": "text_image"},
    ),
    Preset(
        "nli",
        "SimCSE NLI: texts with an entailed and a contradicting one",
        ("sent0", "sent1"),
        _pairs("sent0", "sent1", negatives=[{"text": "hard_neg?"}]),
    ),
    Preset(
        "flag_embedding",
        "FlagEmbedding: a query with lists of positives and negatives",
        ("query", "pos"),
        _pairs("query", "pos", negatives=[{"text": "neg?"}], instruction={"column": "prompt?"}),
    ),
    Preset(
        "ms_swift",
        "ms-swift embedding: conversations, with pictures for each",
        ("messages", "positive_messages"),
        _ms_swift(),
    ),
    Preset(
        "tevatron",
        "tevatron: targets are in a corpus, pool.table",
        ("query_id", "positive_document_ids"),
        {
            "query": {"text": "query_text? | query?", "media": "query_image?"},
            "positive": {"id": "positive_document_ids"},
            "negatives": [{"id": "negative_document_ids?"}],
            "pool": {"id": "docid", "text": "text?", "media": ["image?", "video?"]},
        },
    ),
    Preset(
        "sentence_pairs",
        "sentence-transformers, graded pairs of texts",
        ("sentence1", "sentence2", "score"),
        _pairs("sentence1", "sentence2", relevance="score"),
    ),
    Preset(
        "anchor",
        "sentence-transformers with the names anchor and positive",
        ("anchor", "positive"),
        _pairs("anchor", "positive", negatives=[{"text": "#2..?"}]),
        without=("score", "label"),
    ),
    Preset(
        "sentence_transformers",
        "sentence-transformers: the order of columns counts, from the third on they are negatives",
        (),
        _pairs("#0", "#1", negatives=[{"text": "#2..?"}]),
        by_name=True,
    ),
)


def choose_preset(name: str, columns: Sequence[str], rows: Sequence[Row], place: str) -> Preset:
    """Return the preset of a name, or with `auto` the first that fits the table.

    Raises `UserError` for an unknown name and for a table of no known layout.
    """
    if name != "auto":
        by_name = {preset.name: preset for preset in PRESETS}
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, 1)
            fix = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(by_name)}"
            raise UserError(f"{place}.preset={name!r}", "is not a preset", fix)
        return by_name[name]
    found = recognize(columns, rows)
    if found is None:
        problem = f"is a table of no known layout: its columns are {', '.join(columns)}"
        raise UserError(place, problem, "write query: {text: COLUMN} and positive: {media: COLUMN}")
    return found


def recognize(columns: Sequence[str], rows: Sequence[Row]) -> Preset | None:
    """Return the first preset that fits a table."""
    return next((preset for preset in PRESETS if preset.fits(columns, rows)), None)
