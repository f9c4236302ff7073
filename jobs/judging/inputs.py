"""The inputs of a unit, decoded: queries from the dataset of the table, documents from its pools."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np

from jobs.judging.pairs import OWN, Int64Array, PairUnit, Unit
from pipelines.candidates.types import Pool
from pipelines.config import DataConfig, MediaConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.samples import DecodedInput, Rejected

Decoded = list[DecodedInput | Rejected]


class PairReader(Protocol):
    """Decodes units in one process."""

    def read(self, unit: Any) -> tuple[Decoded, Decoded]:
        """Return the queries and the documents of a unit, in its order. Those that cannot be decoded are `Rejected`."""


class PairPlaces(Protocol):
    """Where the inputs of pairs are. Pickles."""

    @property
    def media(self) -> MediaConfig:
        """How files become pixels."""

    @property
    def instructions(self) -> bool:
        """Whether queries bring their instruction."""

    def for_model(self, visual_pixels: int) -> Self:
        """Return the same for a model that takes in at most `visual_pixels` of a visual."""

    def reader(self) -> PairReader:
        """Return a reader for one process."""


@dataclass(frozen=True)
class InputPlaces:
    """Where the samples of a table and of its pools are. Pickles. `data` has the split of the table."""

    data: DataConfig
    pools: tuple[Pool, ...]
    fingerprints: dict[str, str]
    """Source of the table -> its fingerprint."""

    @property
    def media(self) -> MediaConfig:
        """Return how files become pixels."""
        return self.data.media

    @property
    def instructions(self) -> bool:
        """Return whether queries bring their instruction."""
        return self.data.instructions

    def for_model(self, visual_pixels: int) -> InputPlaces:
        """Return the same for a model that takes in at most `visual_pixels` of a visual."""
        media = self.data.media.for_model(visual_pixels)
        return replace(self, data=self.data.model_copy(update={"media": media}))

    def reader(self) -> UnitReader:
        """Return a reader for one process."""
        return UnitReader(self)

    def of_pool(self, number: int) -> DataConfig:
        """Return where the samples of a pool are. Files of other datasets are not trusted."""
        pool = self.pools[number]
        changes = {"split": pool.split}
        if pool.root is not None:
            changes |= {"root": pool.root, "trusted": False}  # type: ignore[dict-item]
        return self.data.model_copy(update=changes)


class UnitReader:
    """Decodes units in one process. Raises `UserError` for data that were replaced since the table was made."""

    def __init__(self, places: InputPlaces) -> None:
        self._places = places
        self._readers: dict[str, Reader] = {}

    def read(self, unit: Unit) -> tuple[Decoded, Decoded]:
        """Return the queries and the documents of a unit, in its order. Those that cannot be decoded are `Rejected`."""
        reader = self._reader(self._places.data, unit.source, self._places.fingerprints[unit.source])
        queries = list(reader.inputs(unit.source, [(index, "query") for index in unit.queries.tolist()]))
        documents: Decoded = [Rejected("", "") for _ in unit.documents]
        for pool in np.unique(unit.documents[:, 0]).tolist():
            places = np.flatnonzero(unit.documents[:, 0] == pool)
            places = places[np.argsort(unit.documents[places, 1], kind="stable")]  # adjacent rows cost one request
            found = self._targets(unit, pool, unit.documents[places, 1])
            for place, one in zip(places.tolist(), found, strict=True):
                documents[place] = one
        return queries, documents

    def _targets(self, unit: Unit, pool: int, indices: Int64Array) -> Iterator[DecodedInput | Rejected]:
        if pool == OWN:
            data, source = self._places.data, unit.source
            fingerprint = self._places.fingerprints[source]
        else:
            data, source = self._places.of_pool(pool), self._places.pools[pool].source
            fingerprint = self._places.pools[pool].fingerprint
        reader = self._reader(data, source, fingerprint)
        return reader.inputs(source, [(index, "positive") for index in indices.tolist()])

    def _reader(self, data: DataConfig, source: str, fingerprint: str) -> Reader:
        key = data.model_dump_json()
        if key not in self._readers:
            self._readers[key] = Reader(data)
        reader = self._readers[key]
        if reader.source(source).fingerprint != fingerprint:
            place = f"{data.root} {data.split}/{source}"
            raise UserError(place, "is another version than that of the table", "mine again")
        return reader


def reasons_of(unit: PairUnit, queries: Sequence[object], documents: Sequence[object]) -> list[str]:
    """Return why each pair of a unit has no score, or "" if it has one: the reason of its bad query, else document."""
    reasons = [[one.reason if isinstance(one, Rejected) else "" for one in inputs] for inputs in (queries, documents)]
    return [reasons[0][query] or reasons[1][document] for query, document in unit.pairs.tolist()]
