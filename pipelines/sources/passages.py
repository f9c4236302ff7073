"""Queries for pages without captions: a passage of the page's own text layer."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

_PASSAGE_WORDS = range(8, 41)
_MIN_PAGE_WORDS = 3
# Full stops and question marks of Latin, Greek, Arabic, Urdu, Ethiopic, Khmer, Burmese and Indic scripts, then of
# Chinese and Japanese, which put no space after them.
_SENTENCE_END = re.compile(r"(?<=[.!?\u037e؟۔።។။।॥])\s+|(?<=[。！？])")
_HYPHENATED = re.compile(r"(?<=([^\W\d_]))[-\u2010]\n(?=([^\W\d_]))")
_SOFT_HYPHEN = re.compile("\u00ad\n?")
# Vowel signs and other marks belong to the letter before them. `\w` leaves them out. Joiners stand within words.
_MARKS = "".join(chr(code) for code in range(0x300, 0x20000) if unicodedata.category(chr(code)).startswith("M"))
_WORD = re.compile(rf"[^\W\d_](?:[^\W\d_]|[\u200c\u200d{_MARKS}]){{2,}}")


def choose_passages(pages: list[str]) -> list[str]:
    """Return, for each page of a document, its most distinctive passage of 8 to 40 words.

    The score of a passage is the sum, over its different words, of 1 / (pages that hold the word). Running heads and
    tables of numbers therefore lose. A page with fewer than 8 words is its own passage. A page with fewer than 3
    different words has the passage "". A word has three letters or more, with their vowel signs. Our choice.
    """
    pages = [_without_hyphens(page) for page in pages]
    vocabularies = [_words(page) for page in pages]
    pages_with = Counter(word for vocabulary in vocabularies for word in vocabulary)

    def score(passage: str) -> float:
        return sum(1 / pages_with[word] for word in sorted(_words(passage)))

    return [
        max(_passages(page), key=score) if len(vocabulary) >= _MIN_PAGE_WORDS else ""
        for page, vocabulary in zip(pages, vocabularies, strict=True)
    ]


def _without_hyphens(page: str) -> str:
    """Join words that are divided between lines."""
    page = _SOFT_HYPHEN.sub("", page)
    return _HYPHENATED.sub(lambda found: "" if found[1].islower() and found[2].islower() else found[0], page)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))


def _passages(page: str) -> list[str]:
    """Return sentences, with short ones joined to the next and long ones cut, or the whole of a short page."""
    passages: list[str] = []
    words: list[str] = []
    for sentence in _SENTENCE_END.split(page):
        words += sentence.split()
        if len(words) >= _PASSAGE_WORDS.start:
            cuts = [words[i : i + _PASSAGE_WORDS[-1]] for i in range(0, len(words), _PASSAGE_WORDS[-1])]
            passages += [" ".join(cut) for cut in cuts if len(cut) in _PASSAGE_WORDS]
            words = []
    return passages or [" ".join(words)]
