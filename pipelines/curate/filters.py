"""Samples that are left out for what one of their inputs is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.curate.samples import Drop, Samples
from pipelines.curate.settings import FilterRule
from pipelines.curate.tables import Bools

_Found = tuple[str, Bools, npt.NDArray[Any]]
BAD, SMALL, LONG, SHORT_TEXT, LONG_TEXT, LANGUAGE = REASONS = (
    "bad_media",
    "small_media",
    "long_media",
    "short_text",
    "long_text",
    "other_language",
)
_WITH_PIXELS = (b"i", b"v")  # a page has a shape, and no pixels


def find_filtered(samples: Samples, keep: Bools, rule: FilterRule) -> list[Drop]:
    """Return the samples that break a limit of the rule, each with the first one that it breaks."""
    drops: dict[int, Drop] = {}
    for reason, broken, value in _limits(samples, rule):
        for place in np.flatnonzero(broken & np.repeat(keep, 2)).tolist():
            drops.setdefault(place // 2, Drop(place // 2, reason, float(value[place])))
    if rule.bad_media:
        for place, why in samples.media.reasons.items():
            if keep[place // 2]:
                drops[place // 2] = Drop(place // 2, BAD, 0.0, why)
    return list(drops.values())


def _limits(samples: Samples, rule: FilterRule) -> Iterator[_Found]:
    """Yield reason, the inputs that break a limit, and what was measured of each input, `[2 N]`."""
    media, texts = samples.media, samples.texts
    shortest, longest = np.minimum(media.width, media.height), np.maximum(media.width, media.height)
    if rule.min_side_px is not None:
        pixels = np.isin(media.kinds.view("S1").reshape(len(media.kinds), -1)[:, 0], _WITH_PIXELS)
        yield SMALL, pixels & (shortest > 0) & (shortest < rule.min_side_px), shortest
    if rule.max_aspect_ratio is not None:
        ratio = longest / np.maximum(shortest, 1)
        yield LONG, (shortest > 0) & (ratio > rule.max_aspect_ratio), ratio
    has_text = texts.num_chars > 0
    if rule.min_text_chars is not None:
        yield SHORT_TEXT, has_text & (texts.num_chars < rule.min_text_chars), texts.num_chars
    if rule.max_text_chars is not None:
        yield LONG_TEXT, texts.num_chars > rule.max_text_chars, texts.num_chars
    if rule.languages is not None:
        languages = np.array(texts.languages.to_pylist(), np.str_)
        judged = (texts.num_chars >= rule.min_language_chars) & (texts.confidence >= rule.min_language_confidence)
        yield LANGUAGE, judged & ~np.isin(languages, rule.languages), texts.confidence
