"""Prose of the project: short sentences, the field's words, docstrings that stand without their signature."""

from functools import cache
from pathlib import Path

import pytest

from tests.docs.prose import Passage, files, num_words, passages, split_sentences
from tests.docs.words import avoided_words
from tests.paths import ROOT

MAX_WORDS = 30
MAX_MEAN_WORDS = 15
MIN_SENTENCES = 5  # the mean of fewer says little
FRAGMENTS = ("Of ", "From ", "To ", "For ")
PENDING = frozenset(Path(__file__).with_name("pending.txt").read_text().split())


def problems(found: list[Passage]) -> list[str]:
    """Return every breach of the rules in the prose of a file, with its line."""
    messages, lengths = [], []
    for passage in found:
        messages += [f"{passage.line}: {message}" for message in avoided_words(passage.text)]
        if passage.kind == "docstring" and passage.text.startswith(FRAGMENTS):
            messages.append(f'{passage.line}: a docstring that starts with "{passage.text.split()[0]}" is a fragment')
        for sentence in passage.sentences:
            lengths.append(num_words(sentence))
            if lengths[-1] > MAX_WORDS:
                messages.append(f"{passage.line}: a sentence of {lengths[-1]} words: {sentence[:80]}...")
    if len(lengths) >= MIN_SENTENCES and sum(lengths) > MAX_MEAN_WORDS * len(lengths):
        messages.append(f"{sum(lengths) / len(lengths):.1f} words a sentence in the mean, of {MAX_MEAN_WORDS} at most")
    return messages


@cache
def problems_by_file() -> dict[str, list[str]]:
    return {str(path): problems(passages(ROOT / path)) for path in files(ROOT)}


def test_prose_is_short_and_plain() -> None:
    found = {path: messages for path, messages in problems_by_file().items() if messages and path not in PENDING}
    assert not found, "\n".join(f"{path}:{message}" for path, messages in found.items() for message in messages)


def test_pending_files_still_fail() -> None:
    fine = sorted(path for path in PENDING if not problems_by_file().get(path))
    assert not fine, f"passes or is gone; take it out of tests/docs/pending.txt: {', '.join(fine)}"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_long_sentences_in_markdown_are_found(tmp_path: Path) -> None:
    long = " ".join(["word"] * 31)
    text = f"# {long}\n\n| a |\n|---|\n| {long} |\n\n```\n{long}\n```\n\nShort one. W{long}.\n\n- {long} `code`\n"
    found = problems(passages(write(tmp_path, "README.md", text)))
    assert [message.partition(" words:")[0] for message in found] == [
        "11: a sentence of 31",
        "13: a sentence of 32",
    ]


def test_words_are_found_in_headings_cells_docstrings_help_and_errors(tmp_path: Path) -> None:
    markdown = "# The road\n\n| beside |\n|---|\n| `beside` |\n"
    assert len(problems(passages(write(tmp_path, "a.md", markdown)))) == 2
    python = '''
"""Beside it."""
class Kept:
    """Kept."""
    field: int
    """In place of it."""
    def _hidden(self):
        """Anew."""
def run(place):
    """Return it."""
    add("--x", help="by choice")
    raise UserError(place, f"{place} for good", "mend it")
'''
    found = problems(passages(write(tmp_path, "a.py", python)))
    assert [message.partition(":")[0] for message in found] == ["2", "6", "11", "12", "12"]


def test_docstrings_that_are_fragments_are_found(tmp_path: Path) -> None:
    python = 'def digest():\n    """Of the whole content."""\ndef other():\n    """Offer it."""\n'
    assert len(problems(passages(write(tmp_path, "a.py", python)))) == 1


def test_a_high_mean_is_found_when_there_are_enough_sentences(tmp_path: Path) -> None:
    sentence = "Word " + " ".join(["word"] * 15) + ". "
    assert problems(passages(write(tmp_path, "a.md", sentence * MIN_SENTENCES)))
    assert not problems(passages(write(tmp_path, "b.md", sentence * (MIN_SENTENCES - 1))))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two? Three!", 3),
        ("In fp32 the error is 1.5 % (e.g. Adam). Second: one more.", 2),
        ("`a.b` is here. `c` too.", 2),
        ("See README.md. It says so.", 2),
    ],
)
def test_sentences_are_split(text: str, expected: int) -> None:
    assert len(split_sentences(text.replace("`c`", "⟦code⟧"))) == expected
