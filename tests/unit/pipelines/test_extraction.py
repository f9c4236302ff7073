"""Pages extracted one after another: each has the bytes that it has alone, and the document is opened once."""

import pymupdf
import pytest

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.media import documents
from pipelines.media.documents import extract_page
from pipelines.media.sandbox import Sandbox

BACKENDS = ["pymupdf", "pypdfium2"]
CONTENTS = ["text", "links", "annotations", "form"]
ORDER = [2, 0, 1, 1, 0, 2]


def three_pages(content: str) -> bytes:
    """Return a document whose annotations and fields have no appearance yet, so that each library makes one."""
    with pymupdf.open() as document:
        for number in range(3):
            document.new_page(width=300, height=400).insert_text((72, 72), f"page {number}")
        for number, page in enumerate(document):
            if content == "links":
                goal = {"kind": pymupdf.LINK_GOTO, "page": (number + 1) % 3, "from": pymupdf.Rect(10, 10, 50, 50)}
                page.insert_link(goal)
            elif content == "annotations":
                page.add_highlight_annot(pymupdf.Rect(70, 60, 150, 80))
                page.add_freetext_annot(pymupdf.Rect(70, 160, 250, 180), "a remark")
            elif content == "form":
                field = pymupdf.Widget()
                field.field_name, field.field_value = "name", "value"
                field.field_type, field.rect = pymupdf.PDF_WIDGET_TYPE_TEXT, pymupdf.Rect(70, 260, 250, 280)
                page.add_widget(field)
        for xref in range(1, document.xref_length()):
            document.xref_set_key(xref, "AP", "null")
        return document.tobytes()


@pytest.fixture(params=BACKENDS)
def config(request) -> MediaConfig:
    return MediaConfig(document_backend=request.param)


def close_all():
    while documents._kept:
        documents._kept.popitem()[1].close()


@pytest.fixture
def opened(monkeypatch):
    """What is opened, in a process that says that it is a child of the sandbox."""
    found, original = [], documents._open

    def noted(data, config):
        found.append(data)
        return original(data, config)

    monkeypatch.setattr(documents.sandbox, "in_sandbox", lambda: True)
    monkeypatch.setattr(documents, "_open", noted)
    yield found
    close_all()


@pytest.mark.parametrize("content", CONTENTS)
def test_a_page_does_not_depend_on_those_before(config, content):
    data = three_pages(content)
    alone = [extract_page(data, page, config) for page in range(3)]
    assert len(set(alone)) == 3
    with Sandbox(config) as child:
        assert [child.call(extract_page, data, page, config) for page in ORDER] == [alone[page] for page in ORDER]


@pytest.mark.parametrize(("most", "most_bytes", "expected"), [(16, 1 << 20, 2), (1, 1 << 20, 6), (16, 100, 6)])
def test_documents_take_turns(config, opened, monkeypatch, most, most_bytes, expected):
    monkeypatch.setattr(documents, "_MAX_KEPT", most)
    monkeypatch.setattr(documents, "_MAX_KEPT_BYTES", most_bytes)
    files = [three_pages(content) for content in ("text", "annotations")]
    asked = [(data, page) for page in range(3) for data in files]
    found = [extract_page(data, page, config) for data, page in asked]
    assert [opened.count(data) for data in files] == [expected, expected]
    assert len(documents._kept) == {16: 2, 1: 1}[most] * (most_bytes > 100)
    close_all()
    monkeypatch.setattr(documents.sandbox, "in_sandbox", lambda: False)
    assert [extract_page(data, page, config) for data, page in asked] == found


@pytest.mark.parametrize(("content", "expected"), [("text", 2), ("links", 2), ("annotations", 2), ("form", 6)])
def test_a_document_without_a_form_is_opened_for_all_of_its_pages(config, opened, content, expected):
    data = three_pages(content)
    for page in ORDER:
        extract_page(data, page, config)
    assert opened.count(data) == expected


def test_a_document_is_closed_after_an_error(config, opened):
    data = three_pages("text")
    extract_page(data, 0, config)
    with pytest.raises(BadMedia, match="page 3 of 3"):
        extract_page(data, 3, config)
    assert not documents._kept


def test_a_document_of_one_page_is_not_kept(config, opened):
    single = extract_page(three_pages("text"), 0, config)
    close_all()
    extract_page(single, 0, config)
    assert not documents._kept


def test_copies_of_a_document_that_was_drawn_would_show():
    """The planted fault: one handle for both. PDFium stores the appearances that it makes."""
    data = three_pages("annotations")
    with documents._opened(data, MediaConfig(document_backend="pypdfium2")) as pdf:
        before = pdf.copy_page(1)
        pdf.render(1, 1.0)
        assert pdf.copy_page(1) != before
