"""Extract the prose of the project: Markdown files, docstrings, help texts and the texts of `UserError`."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

PACKAGES = ("pipelines", "rzen", "jobs", "infra")
CODE = "⟦code⟧"  # one word, whatever the code says
VALUE = "⟦value⟧"  # what an f-string fills in
ABBREVIATIONS = ("e.g.", "i.e.", "et al.", "vs.", "cf.", "Fig.", "Sec.", "Eq.")

_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9⟦])")


@dataclass(frozen=True)
class Passage:
    """A piece of prose and where it is."""

    line: int
    kind: str
    """`markdown`, `docstring`, `help` or `error`."""
    text: str
    """As a reader sees it, with every piece of code as one word."""
    sentences: tuple[str, ...]
    """Sentences of running text; headings and cells of tables are none."""


def files(root: Path) -> list[Path]:
    """Return the Markdown files of the repository and the Python files of its packages, relative to `root`.

    Of the folder `tests`, only READMEs: the others are results that a script has written.
    """
    markdown = [*root.glob("*.md"), *(root / "tests").rglob("README.md")]
    markdown += [path for name in PACKAGES for path in (root / name).rglob("*.md")]
    python = [path for name in PACKAGES for path in (root / name).rglob("*.py")]
    return sorted(path.relative_to(root) for path in (*markdown, *python))


def passages(path: Path) -> list[Passage]:
    """Return the prose of a Markdown or Python file."""
    text = path.read_text()
    if path.suffix == ".md":
        return list(_markdown(text, "markdown", 1))
    return [passage for line, kind, part in _python(ast.parse(text)) for passage in _markdown(part, kind, line)]


def num_words(sentence: str) -> int:
    """Count the words of a sentence. Punctuation between spaces is no word."""
    return sum(any(character.isalnum() for character in word) for word in sentence.split())


def split_sentences(text: str) -> list[str]:
    """Split running text into sentences."""
    for abbreviation in ABBREVIATIONS:
        text = text.replace(f"{abbreviation} ", f"{abbreviation[:-1]} ")
    return [part for part in _SENTENCE_END.split(" ".join(text.split())) if num_words(part)]


def _markdown(text: str, kind: str, first_line: int) -> Iterator[Passage]:
    """Yield a passage for each docstring, help text or error, and for each block of a Markdown file."""
    found: list[Passage] = []
    block = ""
    for token in _MARKDOWN.parse(text):
        if token.type.endswith("_open"):
            block = token.type
        if token.type != "inline":
            continue
        seen = _visible(token)
        running = block not in {"heading_open", "th_open", "td_open"}
        line = first_line + (token.map[0] if token.map else 0)
        found.append(Passage(line, kind, seen, tuple(split_sentences(seen)) if running else ()))
    if kind == "markdown":
        yield from found
    elif found:
        sentences = tuple(sentence for passage in found for sentence in passage.sentences)
        yield Passage(first_line, kind, " ".join(passage.text for passage in found), sentences)


def _visible(token: Token) -> str:
    parts = []
    for child in token.children or ():
        if child.type == "text":
            parts.append(child.content)
        elif child.type == "code_inline":
            parts.append(CODE)
        elif child.type in {"softbreak", "hardbreak"}:
            parts.append(" ")
    return "".join(parts)


def _python(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Yield line, kind and text of public docstrings, attribute docstrings, help texts and `UserError` texts."""
    yield from _docstrings(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        for keyword in node.keywords:
            if keyword.arg in {"help", "short_help", "epilog"} and (text := _literal(keyword.value)):
                yield node.lineno, "help", text
        if isinstance(node.func, ast.Name) and node.func.id == "UserError":
            # The first argument is the place; the problem and the fix are sentences of their own.
            parts = [_literal(argument) for argument in (*node.args[1:], *(k.value for k in node.keywords))]
            if text := ". ".join(part for part in parts if part):
                yield node.lineno, "error", text


def _docstrings(tree: ast.Module | ast.ClassDef) -> Iterator[tuple[int, str, str]]:
    yield from _docstring(tree)
    for before, node in zip([None, *tree.body], tree.body, strict=False):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _docstrings(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield from _docstring(node)
        elif isinstance(before, ast.Assign | ast.AnnAssign) and isinstance(node, ast.Expr):
            # An attribute's docstring is a string on a line of its own after the assignment.
            text = inspect.cleandoc(_literal(node.value)).replace(VALUE, "")
            yield from [(node.lineno, "docstring", text)] if text else ()


def _docstring(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[tuple[int, str, str]]:
    if text := ast.get_docstring(node):
        yield node.body[0].lineno, "docstring", text


def _literal(node: ast.expr) -> str:
    """Return the text of a string or f-string; other expressions give a placeholder, and None gives nothing."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else VALUE for part in node.values]
        return "".join(str(part) for part in parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _literal(node.left) + _literal(node.right)
    return VALUE
