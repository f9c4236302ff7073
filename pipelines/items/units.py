"""Items to units of work: what is decoded and embedded together. A pure function of the items."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pipelines.items.types import Item
from pipelines.samples import MediaKind

WINDOW_ITEMS = 250_000
"""Items of one Ray job. More would cost the driver too much memory, fewer would load the model more often."""
UNIT_COST = 1024
COSTS: dict[MediaKind, int] = {"image": 16, "document": 16, "video": 64}
"""A unit is 1024 texts, 64 images or 16 videos: about ten seconds of work, and at most 0.5 GB of patches."""
_SortKey = tuple[int, str, str, int, str, float]


def units(items: Sequence[Item]) -> list[list[Item]]:
    """Return the items in units of limited cost, whatever their order.

    Files go together by modality and length, so that little of a batch is padding. Rows of shards go together by
    position, so that one request reads adjacent ones.
    """
    found: list[list[Item]] = []
    room = 0
    for item in sorted(items, key=sort_key):
        if not found or room < item_cost(item):
            found.append([])
            room = UNIT_COST
        found[-1].append(item)
        room -= item_cost(item)
    return found


def windows(items: Iterable[Item], window_items: int = WINDOW_ITEMS) -> Iterator[list[list[Item]]]:
    """Yield the units of `window_items` items at a time, each item once, also where its id comes again."""
    seen: set[bytes] = set()
    window: list[Item] = []
    for item in items:
        if (id := bytes.fromhex(item.id)) not in seen:  # half the size: there may be ten million
            seen.add(id)
            window.append(item)
        if len(window) == window_items:
            yield units(window)
            window = []
    if window:
        yield units(window)


def item_cost(item: Item) -> int:
    """Return the share of `UNIT_COST` that an item takes."""
    return sum(COSTS[media.kind] for media in item.input.media) or 1


def sort_key(item: Item) -> _SortKey:
    """Return the order in which items are decoded: like ones next to each other, rows of shards by position."""
    row = item.row
    if row is None:
        return (item_cost(item), item.modality, "", len(item.input.text), item.id, 0.0)
    start_s = item.segment.start_s if item.segment else 0.0
    return (item_cost(item), row.split, row.source, row.index, row.role, start_s)
