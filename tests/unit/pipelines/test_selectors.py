"""Selectors and placeholders: which value of a row is meant, and what is removed from texts."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.sources.placeholders import strip_placeholders
from pipelines.sources.selectors import Row, find, parse_selector

VALUES = {
    "text": "a cat",
    "empty": "  ",
    "none": None,
    "image": {"bytes": b"x", "path": "1.png"},
    "meta.title": "dotted",
    "meta": {"title": "nested"},
    "tags": ["one", "two", "three"],
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}],
    "groups": [[{"content": "a"}, {"content": "b"}], [{"content": "c"}]],
    "passages": [{"text": "first"}, {"text": "second"}, {"title": "no text"}],
}
ROW = Row(VALUES, tuple(VALUES), "t:1")


def value(selector: str):
    cell = find(selector, ROW)
    if cell is None:
        return None
    return [part.value for part in cell.parts] if cell.parts is not None else cell.value


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("text", "a cat"),
        ("image.bytes", b"x"),
        ("meta.title", "dotted"),  # the column of this name comes first
        ("tags[0]", "one"),
        ("tags[-1]", "three"),
        ("tags[3]", None),
        ("tags", ["one", "two", "three"]),
        ("messages[1].content", "Which?"),
        ("messages[role=user].content", "Which?"),
        ("messages[role=system].content", "Be brief."),
        ("messages[role=assistant].content?", None),
        ("passages.text", ["first", "second"]),
        ("groups[*][-1].content", ["b", "c"]),
        ("groups[0].content", ["a", "b"]),
        ("#0", "a cat"),
        ("#6", ["one", "two", "three"]),
        ("empty | none | text", "a cat"),
        ("gone | text", "a cat"),
        ("empty", None),
        ("gone?", None),
        ("text.field", None),
    ],
)
def test_a_selector_finds_its_value(selector, expected):
    assert value(selector) == expected


def test_all_columns_from_a_place_on():
    row = Row({"q": "1", "p": "2", "n1": "3", "n2": ""}, ("q", "p", "n1", "n2", "n3"), "t:1")
    assert [cell.value for cell in find("#2..", row).elements()] == ["3"]
    assert find("#4..", row) is None


def test_the_way_leads_to_the_value():
    assert find("image.bytes", ROW).way == ("image", "bytes")
    assert [cell.way for cell in find("groups[*][-1].content", ROW).elements()] == [
        ("groups", 0, 1, "content"),
        ("groups", 1, 0, "content"),
    ]


@pytest.mark.parametrize("text", ["", "|", "a.", "a[", "a[x]", "#", "a..b", "a | ", "[0]", "a?b", "f(x)[1"])
def test_what_is_no_selector_is_refused(text):
    with pytest.raises(ValueError, match=r"selector|step"):
        parse_selector(text)


@given(st.text(max_size=30))
def test_parsing_any_text_gives_a_selector_or_a_value_error(text):
    with suppress(ValueError):
        assert parse_selector(text).paths
        find(text, ROW)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|image_1|>\nRepresent the picture.", ("Represent the picture.", 1)),
        ("<image>\nWhat is it?", ("What is it?", 1)),
        ("Compare <image> and <image>.", ("Compare and .", 2)),
        ("<video>Describe it", ("Describe it", 1)),
        ("<|vision_start|><|image_pad|><|vision_end|>A", ("A", 1)),
        ("<|image_pad|><|image_pad|><|image_pad|>A", ("A", 1)),
        ("<|video_pad|> then <|image_pad|>", ("then", 2)),
        ("a < b and <b>bold</b>  twice", ("a < b and <b>bold</b>  twice", 0)),
        ("<images>", ("<images>", 0)),
    ],
)
def test_placeholders_are_removed_and_counted(text, expected):
    assert strip_placeholders(text) == expected
