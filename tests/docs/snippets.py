"""Extract the fenced code blocks of the Markdown files."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

_MARKDOWN = MarkdownIt("commonmark")
_COMMENT = re.compile(r"<!--\s*(.*?)\s*-->", re.DOTALL)
_SHELL_WORDS = {"&&", "||", "|", ";", ">", "2>&1"}


@dataclass(frozen=True)
class Snippet:
    """A fenced code block."""

    path: Path
    line: int
    language: str
    code: str
    note: str
    """The HTML comment right before the block, such as `not run: needs a cluster`."""

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}"

    @property
    def reason_not_to_run(self) -> str:
        """The stated reason, or nothing when the block is to be run."""
        before, _, reason = self.note.partition(":")
        return reason.strip() if before.strip() == "not run" else ""

    @property
    def spec(self) -> str:
        """The shipped spec that a YAML block changes, from the note `spec: jobs/stage2.yaml`."""
        before, _, path = self.note.partition(":")
        return path.strip() if before.strip() == "spec" else ""


def snippets(root: Path, path: Path) -> list[Snippet]:
    """Return the code blocks of a Markdown file; `path` is relative to `root`."""
    found, note = [], ""
    for token in _MARKDOWN.parse((root / path).read_text()):
        if token.type == "fence" and token.map:
            language = token.info.split()[0] if token.info.strip() else ""
            found.append(Snippet(path, token.map[0] + 1, language, token.content, note))
        comment = _COMMENT.search(token.content) if token.type == "html_block" else None
        note = comment[1] if comment else ""
    return found


def indented_code(text: str) -> list[str]:
    """Return the first line of each indented code block of a Markdown file. Such blocks name no language."""
    return [token.content.splitlines()[0] for token in _MARKDOWN.parse(text) if token.type == "code_block"]


def commands(code: str) -> list[list[str]]:
    """Return the words of each command in a shell block, without prompts, comments and output.

    In a block with prompts, lines without a prompt are output.
    """
    lines = code.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    found = []
    for line in lines:
        words: list[str] = []
        for word in shlex.split(line, comments=True):
            if word in _SHELL_WORDS:
                found.append(words)
                words = []
            else:
                words.append(word)
        found.append(words)
    return [_without_variables(words) for words in found if words]


def _without_variables(words: list[str]) -> list[str]:
    """Drop assignments in front of a command: `RAY_ADDRESS=... rzen run`."""
    start = next((place for place, word in enumerate(words) if "=" not in word), len(words))
    return words[start:]


def examples(code: str) -> list[tuple[str, str]]:
    """Return each command with the output below it, of a block whose commands have the prompt `$ `."""
    found: list[tuple[str, str]] = []
    for line in code.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], ""))
        elif found:
            command, output = found[-1]
            found[-1] = (command, f"{output}{line}\n")
    return found


def paths_in_text(text: str) -> list[str]:
    """Return the paths of files and folders in inline code, such as `rzen/config.py` and `pipelines/media/`."""
    inline = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [path for path in re.findall(r"`([\w.-]+/[\w./-]*)`", inline) if path.endswith(("/", ".py", ".yaml", ".md"))]
