"""Pairs of a query and a candidate of evaluated datasets, as units that the engine of `jobs.judging` scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jobs.judging.inputs import Decoded
from jobs.judging.pairs import Int64Array, Keys, compact, divide_pairs
from pipelines.config import DataConfig, MediaConfig
from pipelines.items.decode import ItemDecoder
from pipelines.items.types import Item, content_id
from pipelines.items.units import item_cost, sort_key


@dataclass(frozen=True, slots=True)
class ItemUnit:
    """Pairs of items that are decoded and scored together. Pickles. `pairs` `[P, 2]` are places in both lists."""

    queries: tuple[Item, ...]
    documents: tuple[Item, ...]
    pairs: Int64Array
    keys: Keys

    def __len__(self) -> int:
        return len(self.pairs)

    def only(self, left: Int64Array) -> ItemUnit:
        """Return a unit of these pairs of it."""
        queries, documents, pairs = compact(self.pairs[left])
        return ItemUnit(_chosen(self.queries, queries), _chosen(self.documents, documents), pairs, self.keys[left])


@dataclass(frozen=True)
class ItemPlaces:
    """Where items are. Pickles. `data` is None for items of files. `fingerprints`: split of `data` -> its manifest."""

    media: MediaConfig
    data: DataConfig | None
    fingerprints: dict[str, str]
    instructions: bool

    def for_model(self, visual_pixels: int) -> ItemPlaces:
        """Return the same for a model that takes in at most `visual_pixels` of a visual."""
        return replace(self, media=self.media.for_model(visual_pixels))

    def reader(self) -> ItemPairReader:
        """Return a reader for one process."""
        return ItemPairReader(self)


class ItemPairReader:
    """Decodes units of items in one process."""

    def __init__(self, places: ItemPlaces) -> None:
        self._instructions = places.instructions
        self._decoder = ItemDecoder(places.media, places.data, places.fingerprints)

    def read(self, unit: ItemUnit) -> tuple[Decoded, Decoded]:
        """Return the queries and the documents of a unit, in its order. Those that cannot be decoded are `Rejected`."""
        queries = [asked_item(item, instructions=self._instructions) for item in unit.queries]
        return list(self._decoder.inputs(queries)), list(self._decoder.inputs(unit.documents))


def asked_item(query: Item, *, instructions: bool) -> Item:
    """Return a query as the re-ranker reads it."""
    return query if instructions else replace(query, instruction="")


def pair_key(query: Item, document: Item) -> str:
    """Return 32 hex digits for the contents of a query as it is asked, its instruction, and a document."""
    return content_id([query.content, query.instruction, document.content])


def units_of(pairs: Iterable[tuple[str, Item, Item]]) -> list[ItemUnit]:
    """Return pairs, with their keys, in units: a pure function of the pairs, whatever their order.

    Of pairs with equal keys one is kept.
    """
    by_key: dict[str, tuple[Item, Item]] = {}
    for key, query, document in pairs:
        kept = by_key.setdefault(key, (query, document))
        if (sort_key(query), sort_key(document)) < (sort_key(kept[0]), sort_key(kept[1])):
            by_key[key] = (query, document)
    keys = sorted(by_key)
    queries, documents = (_Side([by_key[key][side] for key in keys]) for side in (0, 1))
    pairs_P2 = np.stack([queries.numbers, documents.numbers], axis=1)
    costs_P2 = np.stack([queries.costs, documents.costs], axis=1)
    names = np.array(keys, dtype="S32")
    units = []
    for places in divide_pairs(pairs_P2, costs_P2):
        asked, found, within = compact(pairs_P2[places])
        units.append(ItemUnit(_chosen(queries.items, asked), _chosen(documents.items, found), within, names[places]))
    return units


class _Side:
    """The distinct queries, or the distinct documents, of pairs: in the order in which they are decoded."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = sorted({item.id: item for item in items}.values(), key=lambda item: (sort_key(item), item.id))
        number_of = {item.id: number for number, item in enumerate(self.items)}
        self.numbers = np.array([number_of[item.id] for item in items], np.int64)
        self.costs = np.array([item_cost(item) for item in items], np.int64)


def _chosen(items: Sequence[Item], places: Int64Array) -> tuple[Item, ...]:
    return tuple(items[place] for place in places.tolist())
