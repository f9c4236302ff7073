"""Which held-out samples a run is scored on while it trains, and reading a worker's share of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from jobs.training.specs import TrainSpec
from pipelines.config import DataConfig
from pipelines.errors import BadMedia
from pipelines.feed.batch import Encoder
from pipelines.feed.reader import Reader
from pipelines.plan.plan import Plan
from pipelines.samples import Rejected
from pipelines.storage.location import resolve_endpoint

if TYPE_CHECKING:
    from rzen.training.held_out import HeldOutShare


class HeldOutEncoder(Encoder, Protocol):
    """An encoder that makes what is scored on held-out samples."""

    @property
    def held_out_group(self) -> int:
        """Samples that are scored together, so that one worker reads them."""

    def held_out(self, groups: Sequence[Sequence[Any]]) -> Any:
        """Return encoded samples, group after group, as they are scored. At least one is needed."""


@dataclass(frozen=True)
class HeldOutSamples:
    """The samples of a run: their split, and their rows in each source. `every_steps` they are scored. Picklable."""

    data: DataConfig
    rows: dict[str, tuple[int, ...]]
    every_steps: int

    def __str__(self) -> str:
        count = sum(map(len, self.rows.values()))
        return f"{count:,} held-out samples of {len(self.rows)} sources, every {self.every_steps} steps"

    def read(self, encoder: HeldOutEncoder, rank: int, world_size: int) -> dict[str, HeldOutShare]:
        """Return the share of a worker, encoded: groups of samples. Samples that cannot be used are left out."""
        from rzen.training.held_out import HeldOutShare

        reader = Reader(self.data, encoder)
        shares = {}
        for source, rows in self.rows.items():
            size = encoder.held_out_group
            groups = [rows[start : start + size] for start in range(0, len(rows), size)][rank::world_size]
            found = _encoded(reader, encoder, source, [row for group in groups for row in group])
            good = [[found[row] for row in group if row in found] for group in groups]
            samples = encoder.held_out(good) if found else None
            shares[source] = HeldOutShare(tuple(found), samples)
        return shares


def choose_samples(spec: TrainSpec, plan: Plan) -> HeldOutSamples | None:
    """Return what the run is scored on, the same for any number of workers. None if there is nothing.

    Raises `UserError` for a held-out split that is damaged.
    """
    # Workers may lack the variable that names the endpoint.
    endpoint = resolve_endpoint(spec.data.endpoint)
    whole = {"split": "held_out", "negatives_per_sample": 0, "candidates": None, "curation": []}
    data = spec.data.model_copy(update=whole | {"endpoint": endpoint})
    reader = Reader(data)
    if spec.eval is None or spec.data.split == data.split or not reader.exists():
        return None
    trained = set(plan.members)
    rows = {
        source: _spread(size, spec.eval.samples)
        for source, size in reader.sizes().items()
        if source in trained and size
    }
    return HeldOutSamples(data, rows, spec.eval.every_steps or spec.checkpoint.every_steps) if rows else None


def _spread(size: int, count: int) -> tuple[int, ...]:
    """Return up to `count` of `size` rows, evenly spread: external shards may be sorted."""
    count = min(size, count)
    return tuple(number * size // count for number in range(count))


def _encoded(reader: Reader, encoder: Encoder, source: str, rows: Sequence[int]) -> dict[int, Any]:
    """Return the encoded samples by their rows, without bad ones and graded ones."""
    found = {}
    for row, sample in zip(rows, reader.samples(source, rows), strict=True):
        if isinstance(sample, Rejected) or sample.sample.relevance is not None:
            continue
        try:
            found[row] = encoder.sample(sample)
        except BadMedia:
            continue
    return found
