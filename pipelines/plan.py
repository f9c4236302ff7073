"""Which samples form global batch t: a pure function of (sizes of the sources, mixture, seed, t).

Nothing here depends on the number of workers, on files or on time, so a run resumed at step t on any number of
workers sees the batches that the uninterrupted run would have seen.

    schedule    step -> (source, n-th batch of that source)      exact shares, spread evenly
    epoch       n-th batch -> (epoch of the source, slice of it)  no sample twice in an epoch
    permutation slice -> sample indices                           runs of neighbours are permuted whole
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipelines.config import MixtureConfig
from pipelines.errors import UserError

SMALL = "small"


@dataclass(frozen=True, slots=True)
class PlanSource:
    """What a batch is drawn from: one source, or several merged ones. `sizes` are usable samples per member."""

    name: str
    members: tuple[str, ...]
    sizes: tuple[int, ...]
    batch: int

    @property
    def num_samples(self) -> int:
        """Samples of one epoch, before the incomplete last batch is dropped."""
        return sum(self.sizes)

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches of one epoch."""
        return self.num_samples // self.batch


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """One optimizer step: `rows` are (member source, index within it), in the order in which ranks slice them."""

    step: int
    source: str
    epoch: int
    rows: tuple[tuple[str, int], ...]

    def of_rank(self, rank: int, world_size: int) -> tuple[tuple[str, int], ...]:
        """The contiguous share of one rank. The batch must divide by `world_size`."""
        share = len(self.rows) // world_size
        return self.rows[rank * share : (rank + 1) * share]


class Plan:
    """The schedule of a run. Build it with `build_plan`."""

    def __init__(self, sources: tuple[PlanSource, ...], counts: tuple[int, ...], run_length: int, seed: int) -> None:
        self.sources = sources
        self.counts = counts
        self.run_length = run_length
        self.seed = seed
        self.num_steps = sum(counts)
        self._order = _spread(counts, seed)
        self._nth = np.zeros(self.num_steps, np.int64)
        for ordinal in range(len(sources)):
            mine = self._order == ordinal
            self._nth[mine] = np.arange(int(mine.sum()))

    def batch(self, step: int) -> GlobalBatch:
        """Global batch of `step`, 0 <= step < num_steps."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is outside 0..{self.num_steps - 1}")
        ordinal, nth = int(self._order[step]), int(self._nth[step])
        source = self.sources[ordinal]
        epoch, position = divmod(nth, source.batches_per_epoch)
        permuted = _permutation(source.num_samples, self.run_length, self.seed, ordinal, epoch)
        chosen = permuted[position * source.batch : (position + 1) * source.batch]
        starts = np.concatenate([[0], np.cumsum(source.sizes)])
        member = np.searchsorted(starts, chosen, side="right") - 1
        rows = tuple((source.members[m], int(i - starts[m])) for m, i in zip(member, chosen, strict=True))
        return GlobalBatch(step, source.name, epoch, rows)

    def check_world_size(self, world_size: int) -> None:
        """Raise `UserError` unless every batch can be dealt evenly to `world_size` ranks."""
        for source in self.sources:
            if source.batch % world_size:
                raise UserError(
                    "global_batch",
                    f"batches of source {source.name!r} have {source.batch} samples, which {world_size} workers"
                    " cannot share evenly",
                    f"choose a multiple of {world_size}, or another cluster.workers",
                )

    def fingerprint(self) -> str:
        """Equal for plans that give equal batches; saved with checkpoints and compared on resume."""
        content = [[s.name, s.members, s.sizes, s.batch] for s in self.sources]
        text = json.dumps([content, self.counts, self.run_length, self.seed])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def summary(self) -> list[str]:
        """One readable line per source."""
        return [
            f"{s.name}: {s.num_samples} samples, batches of {s.batch}, {count} of {self.num_steps} steps"
            f" ({count / s.batches_per_epoch:.2f} epochs)"
            for s, count in zip(self.sources, self.counts, strict=True)
        ]


def build_plan(
    sizes: Mapping[str, int],
    mixture: MixtureConfig,
    *,
    global_batch: int,
    steps: int | None = None,
    epochs: float = 1.0,
    seed: int = 0,
) -> Plan:
    """Resolve a mixture against the sizes of the available sources.

    `steps` fixes the length of the run; otherwise it is `epochs` times the batches of all sources together. Without
    weights each source gets steps in proportion to its batches, so that one epoch visits each source once.

    Raises `UserError` for unknown or too small sources.
    """
    sources = _resolve_sources(sizes, mixture, global_batch)
    if steps is None:
        steps = max(1, round(epochs * sum(s.batches_per_epoch for s in sources)))
    if mixture.weights is None:
        shares = [float(s.batches_per_epoch) for s in sources]
    else:
        shares = [sum(mixture.weights[m] for m in s.members) for s in sources]
    return Plan(sources, _apportion(shares, steps), mixture.run_length, seed)


def _resolve_sources(sizes: Mapping[str, int], mixture: MixtureConfig, global_batch: int) -> tuple[PlanSource, ...]:
    names = sorted(sizes if mixture.weights is None else mixture.weights)
    if unknown := [name for name in names if name not in sizes]:
        raise UserError(
            "data.mixture.weights", f"unknown source {unknown[0]!r}", f"the data has {', '.join(sorted(sizes))}"
        )
    usable = {name: min(sizes[name], mixture.max_samples_per_source) for name in names}
    sources = [PlanSource(n, (n,), (usable[n],), global_batch) for n in names if usable[n] >= global_batch]
    small = [n for n in names if usable[n] < global_batch]
    if small and not mixture.merge_small:
        raise UserError(
            "global_batch",
            f"source {small[0]!r} has {usable[small[0]]} samples, fewer than one global batch of {global_batch}",
            "lower global_batch, leave the source out of data.mixture.weights, or set data.mixture.merge_small: true",
        )
    total = sum(usable[n] for n in small)
    if total >= 2:
        batch = min(global_batch, total - total % 2)
        sources.append(PlanSource(SMALL, tuple(small), tuple(usable[n] for n in small), batch))
    if not sources:
        raise UserError("data.root", f"{total} training samples are not enough to contrast", "add at least two pairs")
    return tuple(sources)


def _apportion(shares: list[float], steps: int) -> tuple[int, ...]:
    """Split `steps` by largest remainder: exact to one step for every source."""
    exact = np.asarray(shares) / sum(shares) * steps
    counts = np.floor(exact).astype(int)
    missing = steps - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return tuple(int(c) for c in counts)


def _spread(counts: tuple[int, ...], seed: int) -> npt.NDArray[np.int16]:
    """Order of sources over the steps: the k-th of c batches falls at a random point of the k-th of c equal spans."""
    rng = np.random.default_rng([seed, 0])
    at = np.concatenate([(np.arange(c) + rng.random(c)) / max(c, 1) for c in counts])
    ordinal = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    return ordinal[np.argsort(at, kind="stable")]


@lru_cache(maxsize=64)
def _permutation(num_samples: int, run_length: int, seed: int, ordinal: int, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation of whole runs of neighbours. Which neighbours form a run shifts with the epoch."""
    rng = np.random.default_rng([seed, 1, ordinal, epoch])
    rolled = np.roll(np.arange(num_samples), -int(rng.integers(num_samples)))
    runs = np.array_split(rolled, range(run_length, num_samples, run_length))
    return np.concatenate([runs[i] for i in rng.permutation(len(runs))])
