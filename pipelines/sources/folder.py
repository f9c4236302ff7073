"""An ordinary folder of files to samples: media with captions next to them, `captions.jsonl` lists, and PDFs.

    cat.jpg + cat.txt       each line that is not empty is a caption, and each caption is a sample
    captions.jsonl          in any folder, paths relative to it, one object per line:
                              {"file", "caption"}                 text -> medium; "page" for PDFs, from zero
                              {"query_file", "query", "file"}     composed retrieval: medium + text -> medium
                              {"query", "positive"}               text -> text
                              {"query_file", "positive"}          medium -> name of its class
                            each with optional "source", "task", "instruction", "relevance", "split"
    report.pdf              without captions: a passage of each page's own text layer -> that page

A caption of a PDF without "page" belongs to page 0. Hidden files and folders are ignored. Extensions may be upper case,
and names of the same letters are equal in any Unicode form. Texts are UTF-8, or UTF-16 or UTF-32 with a byte order
mark.
"""

from __future__ import annotations

import codecs
import json
import os
import posixpath
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Annotated

from pydantic import Field, FiniteFloat, ValidationError

from pipelines.config import Config, MediaConfig, NonNegativeInt
from pipelines.errors import BadMedia, UserError
from pipelines.instructions import INSTRUCTIONS
from pipelines.media.documents import page_texts
from pipelines.media.files import KINDS, split_page
from pipelines.media.sandbox import Sandbox
from pipelines.samples import (
    SOURCE_PATTERN,
    FileRef,
    Input,
    Media,
    MediaKind,
    RawSample,
    Reference,
    Rejected,
    Sample,
    Split,
    instruction_fields,
)
from pipelines.sources.passages import choose_passages
from pipelines.sources.tree import FolderTree, list_folder
from pipelines.texts import MAX_TEXT_BYTES, bounded_lines, decode_text, encoding_of, lines_of

LIST_NAME = "captions.jsonl"
_MAX_LIST_BYTES = 256 << 20

_TEXT_TO: dict[MediaKind, str] = {"image": "text_image", "document": "text_page", "video": "text_video"}


class _Line(Config):
    """One line of `captions.jsonl`; `_FORMS` says which fields go together."""

    file: str | None = None
    caption: str | None = None
    page: NonNegativeInt | None = None
    query_file: str | None = None
    query: str | None = None
    positive: str | None = None
    source: Annotated[str, Field(pattern=SOURCE_PATTERN)] | None = None
    task: str | None = None
    instruction: str | list[str] | None = None
    relevance: FiniteFloat | None = None
    split: Split | None = None


_UNCAPTIONED = ("no_caption", "empty_caption", "no_text_layer")
_OPTIONS = {"source", "task", "relevance"}  # fields of the sample
_OTHERS = {"instruction", "split"}
_FORMS = (
    {"file", "caption"},
    {"file", "caption", "page"},
    {"query_file", "query", "file"},
    {"query", "positive"},
    {"query_file", "positive"},
)


def caption_line(origin: str) -> str:
    """Return the line of `captions.jsonl` that captions a medium or page, for messages."""
    name, page = split_page(origin)
    fields = {"file": name} | ({} if page is None else {"page": page}) | {"caption": "what it shows"}
    return json.dumps(fields, ensure_ascii=False)


def read_folder(
    path: str, config: MediaConfig, *, follow_links: bool = False, keep_uncaptioned: bool = False
) -> Iterator[RawSample | Rejected]:
    """Yield all samples of a folder and everything that is rejected, in an order that depends on names only.

    First come the lines of every `captions.jsonl`, then every other file. Media are named and not read, except the text
    layers of PDFs without captions, which a sandbox reads. Links to files of the folder are followed. Links to other
    files are rejected, unless `follow_links` asks for them, as download caches need. Links to folders are not followed.
    With `keep_uncaptioned`, media and pages without a caption are samples of the split `uncaptioned`, with an empty
    query. So are the passages of `.txt` and `.md` files that belong to no medium. Keys are empty. `origin` is the path
    in the folder, with `#page=` from zero for PDFs, or with `:` and a line for lists and texts.

    Raises `UserError` at once for a missing path, a file, and a folder without a usable file. Reasons of `Rejected`:
    no_caption, empty_caption, too_long_text, unsupported_format, unreadable, bad_json, missing_file, outside_folder,
    empty_file, empty_text, no_text_layer, and those of `pipelines.media` for PDFs.
    """
    root = Path(path).absolute()
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        fix = f"name a folder of images, videos or PDFs; of a table, `rzen look {path}` prints the spec that reads it"
        raise UserError(str(path), problem, fix)
    tree = list_folder(root, follow_links=follow_links)
    usable = (_kind(name) or _is_list(name) or (keep_uncaptioned and _is_text(name)) for name in tree.sizes)
    if not any(usable):
        known = " ".join(KINDS)
        fix = f"put files with {known} or a {LIST_NAME} into it; of tables, `rzen look {path}` prints the spec"
        raise UserError(str(path), "holds no usable file", fix)
    return _read(tree, config, keep_uncaptioned)


def _read(tree: FolderTree, config: MediaConfig, keep_uncaptioned: bool) -> Iterator[RawSample | Rejected]:
    captioned: set[str] = set()
    for name in filter(_is_list, tree.sizes):
        yield from _read_list(tree, name, captioned)
    captions: dict[str, list[str]] = {}
    for name in filter(_is_caption, tree.sizes):
        captions.setdefault(_stem(name), []).append(name)
    stems = {_stem(name) for name in tree.sizes if _kind(name)}
    with Sandbox(config) as sandbox:
        for name in tree.sizes:
            if _is_list(name):
                continue
            if _kind(name):
                found = _read_medium(tree, name, captions.get(_stem(name), []), name in captioned, config, sandbox)
                yield from _with_uncaptioned(found, tree) if keep_uncaptioned else found
            elif keep_uncaptioned and _is_text(name) and _stem(name) not in stems:
                yield from _read_text(tree, name)
            elif not _is_caption(name):
                yield _unused(tree, name)
            elif _stem(name) not in stems:
                yield Rejected(name, "missing_file", "a caption without a medium of the same name")


def _with_uncaptioned(found: Iterator[RawSample | Rejected], tree: FolderTree) -> Iterator[RawSample | Rejected]:
    """Replace what is rejected only because it has no caption by a sample with an empty query."""
    for item in found:
        if isinstance(item, Rejected) and item.reason in _UNCAPTIONED:
            name, page = split_page(item.origin)
            yield replace(_captioned(tree, name, page, ""), split="uncaptioned")
        else:
            yield item


def _unused(tree: FolderTree, name: str) -> Rejected:
    try:
        tree.check_readable(name)
    except BadMedia as bad:
        return Rejected(name, bad.reason, bad.detail if bad.reason == "outside_folder" else "")
    return Rejected(name, "unsupported_format")


def _read_medium(
    tree: FolderTree, name: str, caption_files: list[str], captioned: bool, config: MediaConfig, sandbox: Sandbox
) -> Iterator[RawSample | Rejected]:
    """Yield the samples of a medium by its `.txt`, or of a PDF by its own text. A list may have used it already."""
    try:
        if caption_files:
            _check_file(tree, name)
            for caption_file in caption_files:
                for caption in _captions(tree, caption_file):
                    yield _captioned(tree, name, None, caption)
        elif not captioned:
            _check_file(tree, name)
            if _kind(name) != "document":
                raise BadMedia("no_caption")
            yield from _read_pdf(tree, name, config, sandbox)
    except BadMedia as bad:
        yield Rejected(name, bad.reason, bad.detail)


def _read_text(tree: FolderTree, name: str) -> Iterator[RawSample | Rejected]:
    """Yield the passages of a text, which are parted by empty lines, with the line where each begins."""
    try:
        _check_file(tree, name)
        lines = _text_lines(tree, name)
    except BadMedia as bad:
        yield Rejected(name, bad.reason, bad.detail)
        return
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    found = False
    for is_text, group in groupby(numbered, key=lambda line: bool(line[1])):
        if is_text:
            found = True
            passage = list(group)
            text = "\n".join(line for _, line in passage)
            sample = _sample("text_text", Input(), Input(text), {}, f"{name}:{passage[0][0]}")
            yield replace(sample, split="uncaptioned")
    if not found:
        yield Rejected(name, "empty_text")


def _text_lines(tree: FolderTree, name: str) -> list[str]:
    if (tree.sizes[name] or 0) > MAX_TEXT_BYTES:
        raise BadMedia("too_long_text", f"{name}: {tree.sizes[name]} bytes, at most {MAX_TEXT_BYTES}")
    try:
        return list(lines_of(decode_text(tree.read(name))))
    except UnicodeDecodeError as error:
        raise BadMedia("unreadable", f"{name}: {error}") from error


def _captions(tree: FolderTree, name: str) -> list[str]:
    captions = [line.strip() for line in _text_lines(tree, name) if line.strip()]
    if not captions:
        raise BadMedia("empty_caption", name)
    return captions


def _read_pdf(tree: FolderTree, name: str, config: MediaConfig, sandbox: Sandbox) -> Iterator[RawSample | Rejected]:
    if (tree.sizes[name] or 0) > config.max_bytes:
        raise BadMedia("too_many_bytes", f"{tree.sizes[name]} > {config.max_bytes}")
    texts = sandbox.call(page_texts, tree.read(name), config)
    for page, passage in enumerate(choose_passages(texts)):
        if passage:
            yield _captioned(tree, name, page, passage)
        else:
            yield Rejected(f"{name}#page={page}", "no_text_layer")


def _read_list(tree: FolderTree, name: str, captioned: set[str]) -> Iterator[RawSample | Rejected]:
    """Yield the samples of one `captions.jsonl`, and add every file that it names to `captioned`."""
    try:
        _check_file(tree, name)
        for number, line in enumerate(_list_lines(tree.root / name), start=1):
            if line is not None and not line.strip():
                continue
            origin = f"{name}:{number}"
            try:
                if line is None:
                    raise BadMedia("too_long_text", f"more than {MAX_TEXT_BYTES} bytes")
                yield _listed(tree, posixpath.dirname(name), _parse(line), origin, captioned)
            except BadMedia as bad:
                yield Rejected(origin, bad.reason, bad.detail)
    except BadMedia as bad:
        yield Rejected(name, bad.reason, bad.detail)


def _list_lines(path: Path) -> Iterator[bytes | None]:
    """Yield the lines in UTF-8, None for those that are too long. Only other encodings are read as a whole."""
    with path.open("rb") as lines:
        if encoding_of(lines.read(4)).startswith("utf-8"):
            lines.seek(0)
            yield from bounded_lines(lines)
            return
        if os.fstat(lines.fileno()).st_size > _MAX_LIST_BYTES:
            raise BadMedia("too_long_text", f"a list of more than {_MAX_LIST_BYTES} bytes must be in UTF-8")
    try:
        yield from (line.encode() for line in decode_text(path.read_bytes()).split("\n"))
    except UnicodeError as error:
        raise BadMedia("unreadable", str(error)) from error


def _parse(line: bytes) -> _Line:
    try:
        parsed = _Line.model_validate_json(line.removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadMedia("bad_json", ": ".join([*map(str, first["loc"]), first["msg"]])) from error
    fields = {field for field, value in parsed if value is not None} - _OPTIONS - _OTHERS
    if fields not in _FORMS:
        forms = " or ".join("+".join(sorted(form)) for form in _FORMS)
        raise BadMedia("bad_json", f"has {'+'.join(sorted(fields)) or 'nothing'}, needs {forms}")
    return parsed


def _listed(tree: FolderTree, folder: str, line: _Line, origin: str, captioned: set[str]) -> RawSample:
    query_file = _resolve(tree, folder, line.query_file)
    file = _resolve(tree, folder, line.file)
    captioned.update(name for name in (query_file, file) if name)
    texts = [text.strip() for text in (line.caption, line.query, line.positive) if text is not None]
    if not all(texts):
        raise BadMedia("empty_caption")
    if file is None and query_file:
        query, query_ref = _medium(tree, "q0", query_file)
        pair = _sample("image_class", Input(media=(query,)), Input(texts[0]), {query.member: query_ref}, query_file)
    elif file is None:
        pair = _sample("text_text", Input(texts[0]), Input(texts[1]), {}, origin)
    elif query_file is None:
        pair = _captioned(tree, file, line.page, texts[0])
    else:
        (query, query_ref), (target, target_ref) = _medium(tree, "q0", query_file), _medium(tree, "p0", file)
        files: dict[str, Reference] = {query.member: query_ref, target.member: target_ref}
        pair = _sample("image_text_image", Input(texts[0], (query,)), Input(media=(target,)), files, file)
    options = {name: getattr(line, name) for name in _OPTIONS if getattr(line, name) is not None}
    if line.instruction is not None:
        options |= instruction_fields([line.instruction] if isinstance(line.instruction, str) else line.instruction)
    return replace(pair, sample=replace(pair.sample, **options), split=line.split)


def _resolve(tree: FolderTree, folder: str, name: str | None) -> str | None:
    """Return a path of a list relative to the root, as the folder writes it.

    Only its text is checked: no file outside the root is accessed.
    """
    if name is None:
        return None
    resolved = posixpath.normpath(posixpath.join(folder, name))
    if posixpath.isabs(resolved) or resolved == ".." or resolved.startswith("../"):
        raise BadMedia("outside_folder", name)
    return tree.spelled(resolved)


def _captioned(tree: FolderTree, name: str, page: int | None, caption: str) -> RawSample:
    medium, ref = _medium(tree, "p0", name, page)
    origin = name if ref.page is None else f"{name}#page={ref.page}"
    return _sample(_TEXT_TO[medium.kind], Input(caption), Input(media=(medium,)), {medium.member: ref}, origin)


def _medium(tree: FolderTree, slot: str, name: str, page: int | None = None) -> tuple[Media, FileRef]:
    kind = _kind(name)
    if kind is None:
        raise BadMedia("unsupported_format", name)
    if page is not None and kind != "document":
        raise BadMedia("bad_json", f"{name} has no pages")
    _check_file(tree, name)
    ref = FileRef(str(tree.root / name), (page or 0) if kind == "document" else None)
    return Media(kind, slot + posixpath.splitext(name)[1].lower()), ref


def _sample(form: str, query: Input, positive: Input, files: dict[str, Reference], origin: str) -> RawSample:
    instruction, target_instruction = INSTRUCTIONS[form]
    sample = Sample(
        key="",
        source=form,
        task=form,
        query=query,
        positive=positive,
        instruction=instruction,
        target_instruction=target_instruction,
        origin=origin,
    )
    return RawSample(sample, files)


def _check_file(tree: FolderTree, name: str) -> None:
    if name not in tree.sizes:
        raise BadMedia("missing_file", name)
    tree.check_readable(name)
    if tree.sizes[name] == 0:
        raise BadMedia("empty_file", name)


def _is_list(name: str) -> bool:
    return posixpath.basename(name).lower() == LIST_NAME


def _is_caption(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() == ".txt"


def _is_text(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in (".txt", ".md")


def _stem(name: str) -> str:
    """Return what a medium and its captions have in common."""
    return unicodedata.normalize("NFC", posixpath.splitext(name)[0])


def _kind(name: str) -> MediaKind | None:
    return KINDS.get(posixpath.splitext(name)[1].lower())
