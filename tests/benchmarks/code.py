"""Print figures about the code at a revision: lines, modules, longest files, words a sentence, comments.

python -m tests.benchmarks.code HEAD~1 HEAD
"""

from __future__ import annotations

import argparse
import io
import subprocess
import tarfile
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.docs.prose import PACKAGES, num_words, passages
from tests.paths import ROOT

FOLDERS = (*PACKAGES, "tests")


@dataclass(frozen=True)
class Lines:
    """Lines of one Python file."""

    total: int
    code: int
    """Lines with code. Docstrings, comments and blank lines are none."""
    comments: int
    """Lines with a comment."""


def count_lines(source: str) -> Lines:
    """Count the lines of a Python file from its tokens."""
    code: set[int] = set()
    comments: set[int] = set()
    statement_starts = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type in {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}:
            statement_starts = True
        elif token.type in {tokenize.NL, tokenize.ENDMARKER}:
            continue
        else:
            # A string that is a whole statement is a docstring.
            docstring = token.type == tokenize.STRING and statement_starts
            statement_starts = False
            if not docstring:
                code.update(range(token.start[0], token.end[0] + 1))
    return Lines(source.count("\n"), len(code), len(comments))


def export(revision: str, folder: Path) -> None:
    """Write the files of a revision into a folder."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", revision], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")


def report(revision: str, root: Path) -> str:
    """Return the figures in Markdown."""
    files = {path: count_lines(path.read_text()) for name in FOLDERS for path in (root / name).rglob("*.py")}
    rows = []
    for name in FOLDERS:
        lines = [counts for path, counts in files.items() if path.relative_to(root).parts[0] == name]
        code, comments = sum(line.code for line in lines), sum(line.comments for line in lines)
        rows.append(f"| {name} | {len(lines)} | {code} | {100 * comments / max(code, 1):.1f} |")
    modules = Counter(path.parent.relative_to(root) for path in files if path.name != "__init__.py")
    ours = {path: counts for path, counts in files.items() if path.relative_to(root).parts[0] != "tests"}
    longest = sorted(ours, key=lambda path: -ours[path].total)[:3]
    fullest = [(folder, count) for folder, count in modules.most_common() if folder.parts[0] != "tests"][:5]
    return "\n".join(
        [
            f"## {revision}",
            "",
            "| folder | modules | lines of code | comments a 100 lines of code |",
            "|---|---:|---:|---:|",
            *rows,
            "",
            "* Longest files: " + ", ".join(f"`{path.relative_to(root)}` {ours[path].total}" for path in longest),
            "* Modules a folder: " + ", ".join(f"`{folder}` {count}" for folder, count in fullest),
            f"* Words a sentence in READMEs: {words_a_sentence(sorted(root.rglob('README.md'))):.1f}",
            f"* Words a sentence in docstrings, help and errors: {words_a_sentence(ours):.1f}",
            "",
        ]
    )


def words_a_sentence(paths: Iterable[Path]) -> float:
    """Return the mean number of words of the sentences in these files."""
    lengths = [num_words(text) for path in paths for passage in passages(path) for text in passage.sentences]
    return sum(lengths) / max(len(lengths), 1)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.code", description=__doc__)
    parser.add_argument("revision", nargs="*", default=["HEAD"], help="revisions of this repository (HEAD)")
    for revision in parser.parse_args().revision:
        with tempfile.TemporaryDirectory() as folder:
            export(revision, Path(folder))
            print(report(revision, Path(folder)))


if __name__ == "__main__":
    main()
