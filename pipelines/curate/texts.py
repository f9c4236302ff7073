"""What is compared of texts: pieces, MinHash signatures, words in a row, languages."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from pipelines.imports import import_extra

PIECE_CHARS = 5
NUM_BANDS, BAND_ROWS = 20, 6
"""A pair with a share s of common pieces is proposed with the probability 1 - (1 - s^6)^20: 0.998 for 0.8."""
NUM_PERMUTATIONS = NUM_BANDS * BAND_ROWS
_SEED = 1
_WORDS = re.compile(r"\w+")
# Scripts without spaces between words: each character is one.
_UNSPACED = re.compile(r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")

MinHashes = npt.NDArray[np.uint32]


def normalized(text: str) -> str:
    """Return a text as it is compared: one form of each character, small letters, words with single spaces."""
    return " ".join(words(text))


def words(text: str) -> list[str]:
    """Return the words of a text, without marks, in small letters. In scripts without spaces, characters are words."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return _WORDS.findall(_UNSPACED.sub(r" \1 ", plain))


def pieces(text: str) -> set[str]:
    """Return the distinct pieces of 5 characters of a normalized text. A shorter one is a piece itself."""
    if len(text) <= PIECE_CHARS:
        return {text} if text else set()
    return {text[start : start + PIECE_CHARS] for start in range(len(text) - PIECE_CHARS + 1)}


def jaccard(one: set[str], other: set[str]) -> float:
    """Return the share of common pieces. It is 1 for two empty texts."""
    return len(one & other) / len(one | other) if one or other else 1.0


def min_hashes(texts: Sequence[str]) -> MinHashes:
    """Return MinHash signatures `[N, 120]` of normalized texts. Those of empty texts are all 2^32 - 1.

    The signature of two texts together is the smaller value of both in each place.
    """
    rensa = import_extra("rensa", "curation", "curate")
    if not texts:
        return np.empty((0, NUM_PERMUTATIONS), np.uint32)
    tokens = [[piece.encode("utf-8", "surrogatepass") for piece in sorted(pieces(text))] for text in texts]
    matrix = rensa.RMinHash.digest_matrix_from_token_byte_sets(tokens, NUM_PERMUTATIONS, _SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(texts), NUM_PERMUTATIONS)


def ngram_hashes(text: str, ngram_words: int, min_words: int) -> list[int]:
    """Return 64-bit hashes of all `ngram_words` words in a row of a text, sorted.

    A shorter text gives one hash of the whole, or none if it has fewer than `min_words` words.
    """
    found = words(text)
    if len(found) < ngram_words:
        return [_hash(found)] if len(found) >= min_words else []
    return sorted({_hash(found[start : start + ngram_words]) for start in range(len(found) - ngram_words + 1)})


def _hash(found: Sequence[str]) -> int:
    text = " ".join(found).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def language_of(text: str) -> tuple[str, float]:
    """Return the language of a text as an ISO 639-1 code, and how sure the detector is, from 0 to 1."""
    return _detector()(text)


@cache
def _detector() -> Callable[[str], tuple[str, float]]:
    langid = import_extra("py3langid.langid", "curation", "curate")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    classify: Callable[[str], tuple[str, float]] = identifier.classify
    return classify
