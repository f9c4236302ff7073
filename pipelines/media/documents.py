"""Visual documents: PDF bytes to pages, pixels and text. Pages are counted from zero.

There are two back ends: pypdfium2 (BSD/Apache) and the extra pymupdf (AGPL or commercial). Neither is thread-safe, and
no timeout inside the process stops either. Untrusted files therefore go through `pipelines.media.sandbox`.

Every function raises `BadMedia`: empty_file, not_a_pdf, encrypted_pdf, corrupt_pdf, too_many_pages. Functions that take
a page also raise it with no_such_page.
"""

from __future__ import annotations

import io
import math
import re
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.media import sandbox
from pipelines.media.images import check_aspect
from pipelines.media.libraries import import_optional
from pipelines.media.pdf_layers import remove_hidden_text, settle_conditions
from pipelines.samples import UInt8Array

# Readers accept the marks of begin and end this far into the file (ISO 32000-1 Annex H of Adobe's edition, notes 13
# and 18). Without a check for the first, pymupdf renders HTML as a page. Without the second, it silently repairs half
# a file.
_MARK_WINDOW_BYTES = 1024
# A newspaper page has about 30,000 characters. A malicious page may have gigabytes, and the caller keeps all pages.
_MAX_TEXT_CHARS = 50_000
# Parts of a catalog that a page does not show. They may refer to the other pages, or hold attachments and scripts.
_UNSEEN = ("StructTreeRoot", "Outlines", "Names", "Dests", "PageLabels", "Threads", "Metadata", "OpenAction", "AA")
# Latin and Armenian ligatures, then Hebrew and Arabic letters by their place in a word.
_PRESENTATION_FORMS = re.compile("[\ufb00-\ufdff\ufe70-\ufefc]")
_MAX_KEPT = 16  # documents that a child of the sandbox has open
_MAX_KEPT_BYTES = 64 << 20  # of their files
_THUMBNAIL_POINTS = 800.0  # the longer edge of a page on which single characters are seen
_NO_MEMORY = re.compile(r"\b(m|c|re)alloc\b.*failed")


def render_page(data: bytes, page: int, config: MediaConfig) -> UInt8Array:
    """Render one page `[H, W, 3]` on white, in its own aspect ratio.

    It has about `config.page_pixels` pixels, however large or small its box is. Also raises `BadMedia` with
    extreme_aspect_ratio.
    """
    with _opened(data, config, page) as pdf:
        width, height = pdf.size(page)
        if not (0 < width < math.inf and 0 < height < math.inf):
            raise BadMedia("corrupt_pdf", f"a page of {width:g} x {height:g} points")
        check_aspect(width, height, config)
        return pdf.render(page, math.sqrt(config.page_pixels / (width * height)))


def extract_page(data: bytes, page: int, config: MediaConfig) -> bytes:
    """Return a PDF of this page only, which looks as in its file.

    Equal input gives equal bytes: there are no dates and no random identifier. Also raises `BadMedia` with
    inseparable_page. In the sandbox, the document stays open for its other pages.
    """
    with _extraction(data, config, page) as pdf:
        # A copied page is small and loses what the whole document says: which layers are hidden, values of forms,
        # output intents. The second way keeps all of that.
        for extract in (pdf.copied.copy_page, pdf.copied.remove_other_pages):
            single = extract(page)
            if _looks_equal(pdf.drawn, page, single, config):
                return single
        raise BadMedia("inseparable_page", f"page {page} looks different without the other pages")


def num_pages(data: bytes, config: MediaConfig) -> int:
    """Return the number of pages of a document."""
    with _opened(data, config) as pdf:
        return pdf.count


def page_texts(data: bytes, config: MediaConfig) -> list[str]:
    """Return the text layer of each page, up to 50,000 characters. The document is opened once.

    Ligatures and other presentation forms become the letters that they stand for.
    """
    with _opened(data, config) as pdf:
        return [plain_letters(pdf.text(page)[:_MAX_TEXT_CHARS]) for page in range(pdf.count)]


def plain_letters(text: str) -> str:
    """Replace presentation forms (U+FB00 to U+FDFF, U+FE70 to U+FEFC) by the letters that they stand for.

    Everything else stays: NFKC of the whole text would also change superscripts, fractions and full-width letters.
    """
    return _PRESENTATION_FORMS.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)


def _looks_equal(pdf: _Pdf, page: int, single: bytes, config: MediaConfig) -> bool:
    """Return whether the only page of `single` looks as `page` of `pdf`, with a tenth of the pixels of a page."""
    width, height = pdf.size(page)
    if not _is_drawable(width, height, config):
        return True  # the caller rejects it by its size
    scale = math.sqrt(config.page_pixels / 10 / (width * height))
    with _opened(single, config) as other:
        return np.array_equal(pdf.render(page, scale), other.render(0, scale))


def _is_drawable(width: float, height: float, config: MediaConfig) -> bool:
    is_finite = 0 < width < math.inf and 0 < height < math.inf
    return is_finite and max(width, height) <= config.max_aspect_ratio * min(width, height)


class _Pdf(Protocol):
    """An open document. `size` is in points after the page's own rotation; `render` scales points to pixels."""

    count: int
    errors: tuple[type[Exception], ...]

    def is_constant(self) -> bool:
        """Return whether copies of pages do not depend on which pages were copied before."""

    def size(self, page: int) -> tuple[float, float]: ...
    def render(self, page: int, scale: float) -> UInt8Array: ...
    def text(self, page: int) -> str: ...
    def copy_page(self, page: int) -> bytes: ...
    def remove_other_pages(self, page: int) -> bytes: ...
    def close(self) -> None: ...


@contextmanager
def _opened(data: bytes, config: MediaConfig, page: int = 0) -> Iterator[_Pdf]:
    with closing(_open(data, config)) as pdf, _checked(pdf, config, page):
        yield pdf


def _open(data: bytes, config: MediaConfig) -> _Pdf:
    if not data:
        raise BadMedia("empty_file")
    if b"%PDF-" not in data[:_MARK_WINDOW_BYTES]:
        raise BadMedia("not_a_pdf", f"begins with {data[:8]!r}")
    if b"%%EOF" not in data[-_MARK_WINDOW_BYTES:]:
        raise BadMedia("corrupt_pdf", "the end is missing")
    return _Mupdf(data) if config.document_backend == "pymupdf" else _Pdfium(data)


@contextmanager
def _checked(pdf: _Pdf, config: MediaConfig, page: int) -> Iterator[None]:
    """Raise `BadMedia` for a page that the document does not have, and for errors of the library in the block."""
    try:
        if pdf.count < 1:
            raise BadMedia("corrupt_pdf", "no pages")
        if pdf.count > config.max_pages:
            raise BadMedia("too_many_pages", f"{pdf.count} > {config.max_pages}")
        if not 0 <= page < pdf.count:
            raise BadMedia("no_such_page", f"page {page} of {pdf.count}")
        yield
    except pdf.errors as error:
        raise _bad(error) from error


@dataclass(frozen=True, slots=True)
class _Extraction:
    """A document that pages are copied from, and one to compare them with.

    They are one if only one page is extracted. A document that has been drawn has more than its file says, as the
    appearance of annotations. A later copy would have it, too.
    """

    copied: _Pdf
    drawn: _Pdf

    def close(self) -> None:
        self.copied.close()
        if self.drawn is not self.copied:
            self.drawn.close()


# Back end and content -> an open document, the one used last at the end. Opening a manual of 1,600 pages takes 0.2 s,
# and copying a page 4 ms. Samples are shuffled before their pages are extracted, so that documents take turns.
_kept: OrderedDict[tuple[str, bytes], _Extraction] = OrderedDict()


@contextmanager
def _extraction(data: bytes, config: MediaConfig, page: int) -> Iterator[_Extraction]:
    """Open a document, or take the one that is open."""
    key = config.document_backend, data
    pdf = _kept.pop(key, None) or _open_for_extraction(data, config)
    is_kept = False
    try:
        with _checked(pdf.drawn, config, page):
            yield pdf
            is_kept = pdf.drawn is not pdf.copied and pdf.copied.is_constant()
    finally:
        if is_kept:
            _keep(key, pdf)
        else:
            pdf.close()


def _open_for_extraction(data: bytes, config: MediaConfig) -> _Extraction:
    """Open a document twice if it is kept: in the sandbox only, which has one thread."""
    copied = _open(data, config)
    is_kept = sandbox.in_sandbox() and copied.count > 1 and copied.is_constant()
    return _Extraction(copied, _open(data, config) if is_kept else copied)


def _keep(key: tuple[str, bytes], pdf: _Extraction) -> None:
    _kept[key] = pdf
    while len(_kept) > _MAX_KEPT or sum(len(data) for _, data in _kept) > _MAX_KEPT_BYTES:
        _kept.popitem(last=False)[1].close()


def _bad(error: Exception) -> Exception:
    """Return `MemoryError` for an allocation beyond the sandbox's limit, which MuPDF reports like a broken file."""
    return MemoryError(str(error)) if _NO_MEMORY.search(str(error)) else BadMedia("corrupt_pdf", str(error))


class _Mupdf:
    """The extra `pymupdf`, which is the default if it is installed."""

    def __init__(self, data: bytes) -> None:
        pymupdf = import_optional("pymupdf", "media.document_backend", "pypdfium2")
        # The library writes to stderr, once per damaged object.
        pymupdf.TOOLS.mupdf_display_errors(False)
        pymupdf.TOOLS.mupdf_display_warnings(False)
        self._mu: Any = pymupdf
        self._data = data
        self.errors: tuple[type[Exception], ...] = (RuntimeError, ValueError, IndexError, pymupdf.mupdf.FzErrorBase)
        try:
            self._document = pymupdf.open(stream=data, filetype="pdf")
            if not self._document.is_pdf:
                raise BadMedia("not_a_pdf")
            if self._document.needs_pass:
                raise BadMedia("encrypted_pdf")
            self.count: int = self._document.page_count
            settle_conditions(self._document)
        except self.errors as error:
            raise _bad(error) from error

    def is_constant(self) -> bool:
        # A copy joins the form's fields, and a repair finds objects that were not seen before.
        return not (self._document.is_form_pdf or self._document.is_repaired)

    def size(self, page: int) -> tuple[float, float]:
        box = self._document[page].rect
        return box.width, box.height

    def render(self, page: int, scale: float) -> UInt8Array:
        pixmap = self._document[page].get_pixmap(
            matrix=self._mu.Matrix(scale, scale), colorspace=self._mu.csRGB, alpha=False
        )
        return np.frombuffer(bytearray(pixmap.samples_mv), np.uint8).reshape(pixmap.height, pixmap.width, 3)

    def text(self, page: int) -> str:
        return str(self._document[page].get_text("text"))

    def copy_page(self, page: int) -> bytes:
        with self._mu.open() as single:
            # Fields are looked for on all pages of the document, in Python.
            has_fields = bool(self._document.is_form_pdf)
            single.insert_pdf(self._document, from_page=page, to_page=page, links=False, widgets=has_fields)
            return self._saved(single)

    def remove_other_pages(self, page: int) -> bytes:
        with self._mu.open(stream=self._data, filetype="pdf") as single:
            settle_conditions(single)
            single.select([page])
            for name in _UNSEEN:
                single.xref_set_key(single.pdf_catalog(), name, "null")
            return self._saved(single)

    def _saved(self, document: Any) -> bytes:
        options = {"garbage": 3, "deflate": True, "no_new_id": True, "encryption": self._mu.PDF_ENCRYPT_NONE}
        return bytes(document.tobytes(**options))

    def close(self) -> None:
        self._document.close()


class _Pdfium:
    """pypdfium2: permissive license, faster to import and to render."""

    def __init__(self, data: bytes) -> None:
        with sandbox.exclude_from_cpu_limit():
            import pypdfium2

        self._pdfium: Any = pypdfium2
        self.errors: tuple[type[Exception], ...] = (pypdfium2.PdfiumError,)
        # A file without pages sets no error, so that PDFium would give the one of the file before.
        pypdfium2.raw.FPDF_LoadMemDocument(b"", 0, None)
        try:
            self._document = pypdfium2.PdfDocument(data)
        except pypdfium2.PdfiumError as error:
            locked = error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD
            raise BadMedia("encrypted_pdf" if locked else "corrupt_pdf", str(error)) from error
        self._data = data
        self.count = len(self._document)
        self._has_form = self._document.get_formtype() != pypdfium2.raw.FORMTYPE_NONE
        if self._has_form:
            self._document.init_forms()

    def is_constant(self) -> bool:
        return not self._has_form

    def size(self, page: int) -> tuple[float, float]:
        width, height = self._document[page].get_size()
        return float(width), float(height)

    def render(self, page: int, scale: float) -> UInt8Array:
        bitmap = self._document[page].render(scale=scale, rev_byteorder=True)
        return np.array(bitmap.to_numpy()[:, :, :3])

    def _thumbnail(self, page: Any) -> UInt8Array:
        return np.array(page.render(scale=_THUMBNAIL_POINTS / max(1.0, *page.get_size())).to_numpy())

    def text(self, page: int) -> str:
        if self._has_form:
            # The values of fields become text of the page, as in the other library. The page has to be loaded again.
            with closing(self._document[page]) as form:
                form.flatten()
        found = remove_hidden_text(self._pdfium, lambda: self._document[page], self._thumbnail)
        text = str(found.get_textpage().get_text_range())
        # PDFium writes U+FFFE for a hyphen at the end of a line. The other library writes the hyphen and the line end.
        return text.replace("\ufffe", "-\n").replace("\r\n", "\n")

    def copy_page(self, page: int) -> bytes:
        single = self._pdfium.PdfDocument.new()
        single.import_pages(self._document, pages=[page])
        return self._saved(single)

    def remove_other_pages(self, page: int) -> bytes:
        single = self._pdfium.PdfDocument(self._data)
        for other in reversed(range(self.count)):
            if other != page:
                del single[other]
        return self._saved(single)

    def _saved(self, document: Any) -> bytes:
        buffer = io.BytesIO()
        document.save(buffer, flags=self._pdfium.raw.FPDF_REMOVE_SECURITY)
        document.close()
        return _without_stamps(buffer.getvalue())

    def close(self) -> None:
        self._document.close()


def _without_stamps(data: bytes) -> bytes:
    """Overwrite PDFium's creation date and file ID with constants of the same length, which keeps all offsets."""
    data = re.sub(rb"/CreationDate\(D:[^)]*\)(?=/Creator\(PDFium\))", lambda found: b" " * len(found[0]), data)
    body, mark, trailer = data.rpartition(b"/ID[<")
    ids, bracket, end = trailer.partition(b"]")
    return body + mark + re.sub(rb"[0-9A-F]", b"0", ids) + bracket + end
