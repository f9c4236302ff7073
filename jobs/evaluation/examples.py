"""What models answered, with pictures: query, first five candidates, relevant one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from pipelines.errors import BadMedia
from pipelines.items.decode import ItemDecoder
from pipelines.items.types import Item
from pipelines.samples import UInt8Array
from rzen.evaluation.dataset_scores import DatasetScores
from rzen.evaluation.mixed_pool import MixedScores
from rzen.evaluation.vectors import NONE, IntArray
from rzen.report.hits import Hit, Search
from rzen.report.thumbnails import MAX_HEIGHT_PX, MAX_WIDTH_PX

_TOP = 5


def wrong_answers(scored: DatasetScores, decoder: ItemDecoder, count: int) -> list[Search]:
    """Return the first candidates of `count` queries whose first is wrong, evenly spread over the dataset, and the best
    relevant one where it is not among them.

    The rows of `scored` must be those of the dataset's candidates in their order.
    """
    wrong = np.flatnonzero(scored.by_query["hit@1"] == 0)
    return _searches(scored, decoder, _spread(wrong, count))


def mixed_answers(mixed: Mapping[str, MixedScores], decoder: ItemDecoder, count: int) -> list[Search]:
    """Return what `count` queries of each dataset find in the mixed pool. They are the same for every model."""
    return [
        search for scores in mixed.values() for search in _searches(scores.pool, decoder, _spread(scores.places, count))
    ]


def _spread(numbers: IntArray, count: int) -> list[int]:
    """Return so many of the numbers, from the first to the last."""
    chosen: list[int] = numbers[np.linspace(0, len(numbers) - 1, min(count, len(numbers)), dtype=int)].tolist()
    return chosen


def _searches(scored: DatasetScores, decoder: ItemDecoder, chosen: Sequence[int]) -> list[Search]:
    answers = {number: _answers(scored, number) for number in chosen}
    items = scored.dataset.pick({row for rows in answers.values() for row, _, _, _ in rows})
    return [
        Search(
            scored.dataset.queries[number].item.input.text or scored.dataset.queries[number].item.name,
            [_hit(items[row], rank, score, right, decoder) for row, rank, score, right in rows],
            _thumbnails(scored.dataset.queries[number].item, decoder),
        )
        for number, rows in answers.items()
    ]


def _answers(scored: DatasetScores, number: int) -> list[tuple[int, int, float | None, bool]]:
    """Row, rank, cosine where it is known, and whether it is relevant."""
    mine = scored.relevant.query == number
    right = dict(zip(scored.relevant.row[mine].tolist(), scored.ranked.rank[mine].tolist(), strict=True))
    found: list[tuple[int, int, float | None, bool]] = [
        (row, place + 1, float(scored.ranked.scores[number, place]), row in right)
        for place, row in enumerate(scored.ranked.rows[number, :_TOP].tolist())
        if row != NONE
    ]
    if right and not any(relevant for *_, relevant in found):
        best = min(right, key=lambda row: right[row])
        found.append((best, right[best], None, True))
    return found


def _hit(item: Item, rank: int, score: float | None, relevant: bool, decoder: ItemDecoder) -> Hit:
    return Hit(rank, score, item.input.modality, item.input.text, item.name, _thumbnails(item, decoder), relevant)


def _thumbnails(item: Item, decoder: ItemDecoder) -> list[UInt8Array]:
    """Small, because a page may show a thousand."""
    try:
        frames = decoder.input(item).frames
    except BadMedia:  # it could be read when it was embedded
        return []
    return [_small(frame) for frame in frames]


def _small(frame_HWC: UInt8Array) -> UInt8Array:
    image = Image.fromarray(frame_HWC)
    image.thumbnail((MAX_WIDTH_PX, MAX_HEIGHT_PX))
    return np.asarray(image)
