"""Words that the project's prose avoids, each with what to write."""

from __future__ import annotations

import re

AVOIDED = {
    # Metaphors.
    r"\broads?\b": "pipeline, workflow",
    r"\bstations?\b": "job of a pipeline",
    r"\bhouses?\b": "project, package",
    r"\bdoors?\b": "entry point, command, API",
    r"\bstrangers?\b": "untrusted, user",
    r"\bhostile\b": "untrusted, malicious",
    r"\bkitchens?\b": "builder",
    r"\bboards?\b": "progress display, dashboard",
    r"\beats\b": "uses",
    r"\bleav(?:e|es|ing) word\b": "record",
    r"\b(?:re-training|ticks?)\b": "retraining, retraining run",
    r"\barms?\b": "variant",
    r"\bforeign\b": "external",
    r"\bshards of others\b": "external shards",
    r"\bstirred\b": "mixed",
    # Literary connectives.
    r"\b(?:begun )?anew\b": "again, restarts from scratch",
    r"\bfor good\b": "permanently",
    r"\bfor ever\b": "indefinitely",
    r"\bhangs? on\b": "depends on",
    r"\bin place of\b": "instead of",
    r"\bbeside\b": "next to, in addition to",
    r"\bby choice\b": "optional",
    r"\bheld against\b": "checked against",
    r"\bwithout a word\b": "silently",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\bso many\b": "a number",
    r"\b(?:un)?alike\b": "similar, different",
    r"\b(?:tells?|told)\b": "reports, lists, prints, logs",
    r"\blies\b": "is",
    r"\bof which\b": "two sentences",
    # One spelling.
    r"\bdata sets?\b": "dataset",
    r"\bneighbour\w*": "neighbor",
    r"\b(?:colour|behaviour|favour|honour)\w*": "color, behavior, favor, honor",
    r"\b(?:normal|optim|initial|serial|token|quant|random|summar)is(?:e|es|ed|ing|ation)\b": "-ize",
    r"\b(?:recogn|organ|parallel|material)is(?:e|es|ed|ing|ation)\b": "-ize",
    r"\b(?:centre|grey|catalogue|licence)s?\b": "center, gray, catalog, license",
}


def avoided_words(text: str) -> list[str]:
    """Return a message for each avoided word in the text."""
    found = []
    for pattern, instead in AVOIDED.items():
        found += [f'"{match[0]}": write {instead}' for match in re.finditer(pattern, text, re.IGNORECASE)]
    return found
