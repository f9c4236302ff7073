"""Answers a word that is not known with the nearest one that is: kinds, settings, spec files and commands."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that is most similar to an unknown one. None if none is similar."""
    near = difflib.get_close_matches(word, [*known], 1)
    return near[0] if near else None


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "use one of") -> str:
    """Return the fix for a word that is not among the `known` ones: the nearest of them, or all."""
    known = list(known)
    near = nearest(word, known)
    return f"did you mean {near!r}?" if near else f"{otherwise} {', '.join(known)}"
