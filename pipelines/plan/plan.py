"""Which samples form global batch t: a pure function of (what the sources hold, mixture, seed, t).

Nothing here depends on the number of workers, on files or on time, so a run resumed at step t on any number of
workers sees the batches that the uninterrupted run would have seen.

    schedule     step -> (source, n-th batch of that source)       exact shares, spread evenly; new shares in each phase
    subset     source -> the samples of it that are used          at most so many, in runs of neighbors
    arrangement  n-th batch -> the samples with a place of their own: duplicates apart, clusters together
    permutation  n-th batch -> the rest of it                       runs of neighbors are permuted whole

State is a few bytes for each run of neighbors, not for each sample, and a batch costs no more than its rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.config import MixtureConfig
from pipelines.errors import UserError

SMALL = "small"
Row = tuple[str, int]
"""Source, and index of the sample in it."""
Int64Array = npt.NDArray[np.int64]

_KEPT = ("_length", "_phases", "_lanes", "_blocks_of_lane")  # of a plan that is pickled; the rest is made again

_NOTHING: Any = np.zeros(0, np.int64)
_NO_CLUSTERS: Any = np.zeros((0, 2), np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class SourceTable:
    """What a plan has to know of a source. Sample i is the i-th in stored order.

    `duplicates` `[D]` are the samples, ascending, whose target others may have too; `targets` `[D]` are equal for equal
    targets, also between sources. `clusters` `[C, 2]` are first and stop of neighbors that have to share a batch
    (mined hard negatives, clips of one video): at least two each, ascending, apart.
    """

    num_samples: int
    duplicates: Int64Array = field(default_factory=lambda: _NOTHING)
    targets: npt.NDArray[np.integer[Any]] = field(default_factory=lambda: _NOTHING)
    clusters: Int64Array = field(default_factory=lambda: _NO_CLUSTERS)


@dataclass(frozen=True, slots=True)
class MixturePhase:
    """From `first_step` on, sources are drawn by `weights` (member source -> relative share of the steps)."""

    first_step: int
    weights: dict[str, float]


@dataclass(frozen=True, slots=True)
class Block:
    """What is contrasted with each other: samples of one source, in the order in which they are scored."""

    source: str
    epoch: int
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """One optimizer step, or one rank's share of it: a block, or several of one size where the mixture asks for it."""

    step: int
    blocks: tuple[Block, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """Of all blocks, in order."""
        return tuple(row for block in self.blocks for row in block.rows)


class PlanSource:
    """What a batch is drawn from: one source, or several merged ones (`members`, their used samples in `sizes`).

    `batch` samples are contrasted with each other; `blocks` times as many, of several sources, make a global batch. A
    sample has a number in 0 .. num_samples - 1, through all members.
    """

    def __init__(
        self, name: str, tables: Mapping[str, SourceTable], batch: int, blocks: int, mixture: MixtureConfig, seed: int
    ) -> None:
        self.name = name
        self.members = tuple(tables)
        self.batch = batch
        self.blocks = blocks
        self._subsets = [_SourceSubset.of(table.num_samples, mixture, seed, member) for member, table in tables.items()]
        self.sizes = tuple(subset.size for subset in self._subsets)
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.num_samples = int(self._starts[-1])
        self._run_length = mixture.run_length
        self._special = _ConstrainedSamples.of(list(tables.values()), self._subsets, self._starts)
        self.tables_fingerprint = _tables_fingerprint(tables)

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches of one epoch; what is left over is dropped, other samples in each epoch."""
        return self.num_samples // self.batch

    def arrange(self, seed: int, epoch: int) -> _Epoch:
        """The order of one epoch."""
        return _Epoch.of(self._special, self.num_samples, self.batch, self._run_length, seed, self.name, epoch)

    def rows(self, numbers: Int64Array) -> tuple[Row, ...]:
        """The samples with these numbers."""
        member_R = np.searchsorted(self._starts, numbers, side="right") - 1
        index_R = numbers - self._starts[member_R]
        for ordinal in np.unique(member_R):
            mine = member_R == ordinal
            index_R[mine] = self._subsets[ordinal].samples(index_R[mine])
        return tuple((self.members[m], i) for m, i in zip(member_R.tolist(), index_R.tolist(), strict=True))

    def reserves(self, rng: np.random.Generator, member: str, used: Int64Array, position: int, count: int) -> list[Row]:
        """Up to `count` random samples of a member that are not `used`, others for each position where they last."""
        subset = self._subsets[self.members.index(member)]
        num_rows = self.batch * self.blocks
        drawn = rng.choice(subset.size, min(subset.size, len(used) + count * num_rows), replace=False)
        samples = subset.samples(drawn)
        free = samples[~np.isin(samples, used)]
        own = free[position::num_rows]
        others = np.roll(free, -position)
        return [(member, index) for index in dict.fromkeys([*own.tolist(), *others[:count].tolist()])][:count]

    def notes(self) -> list[str]:
        """What could not be met in full: readable lines."""
        return self._special.notes(self.batches_per_epoch, self.batch)


class Plan:
    """The schedule of a run. Build it with `build_plan`. Not thread-safe; pickles without its caches."""

    def __init__(
        self,
        sources: tuple[PlanSource, ...],
        global_batch: int,
        num_steps: int,
        phases: tuple[tuple[int, tuple[float, ...]], ...],
        seed: int,
    ) -> None:
        self.sources = sources
        self.global_batch = global_batch
        self.num_steps = num_steps
        self.seed = seed
        self._length = num_steps  # of the whole run, which `until` does not change
        self._phases = phases
        # A lane is one source that fills whole batches, or all sources with one size of block.
        by_size: dict[int, list[int]] = {}
        for ordinal, source in enumerate(sources):
            by_size.setdefault(source.batch if source.blocks > 1 else -ordinal, []).append(ordinal)
        self._lanes = tuple(map(tuple, by_size.values()))
        self._blocks_of_lane = tuple(sources[lane[0]].blocks for lane in self._lanes)
        self._schedule()

    def _schedule(self) -> None:
        stops = [min(step, self.num_steps) for step in (*self.phase_starts, self.num_steps)]
        order: list[npt.NDArray[np.int16]] = []
        drawn: list[list[npt.NDArray[np.int16]]] = [[] for _ in self._lanes]
        for (first, shares), stop in zip(self._phases, stops, strict=True):
            # Planned to the end of the run, as if no phase followed: what comes later changes nothing before it.
            lane_shares = [sum(shares[ordinal] for ordinal in lane) for lane in self._lanes]
            counts = _apportion(lane_shares, self._length - first)
            order.append(_spread(counts, [self.seed, 0, first])[: max(0, stop - first)])
            used = np.bincount(order[-1], minlength=len(self._lanes))
            for number, (lane, blocks) in enumerate(zip(self._lanes, self._blocks_of_lane, strict=True)):
                within = _apportion([shares[ordinal] for ordinal in lane], blocks * counts[number])
                sequence = _spread(within, [self.seed, 4, first, number])[: blocks * used[number]]
                drawn[number].append(np.array(lane, np.int16)[sequence])
        self._lane = np.concatenate(order)
        self._nth_of_lane = _counted(self._lane, len(self._lanes))
        self._drawn = [np.concatenate(parts) for parts in drawn]
        everything = np.concatenate(self._drawn)
        # A source is in one lane only, so that counting through all lanes one after the other counts within each.
        nth = _counted(everything, len(self.sources))
        self._nth = np.split(nth, np.cumsum([len(part) for part in self._drawn])[:-1])
        self.counts = tuple(np.bincount(everything, minlength=len(self.sources)).tolist())
        self._epochs: OrderedDict[tuple[int, int], _Epoch] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("sources", "global_batch", "num_steps", "seed", *_KEPT)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._schedule()

    @property
    def shares(self) -> dict[str, float]:
        """Source -> its relative share of the steps, as long as no phase changes it."""
        return dict(zip([source.name for source in self.sources], self._phases[0][1], strict=True))

    @property
    def phase_starts(self) -> list[int]:
        """First steps of the phases, ascending."""
        return [first for first, _ in self._phases[1:]]

    def with_mixture_phase(self, phase: MixturePhase) -> Plan:
        """The same plan with other weights from a step on. Raises `UserError` unless it is after the last phase."""
        starts = [*self.phase_starts, phase.first_step]
        if starts != sorted(set(starts)) or not 0 < phase.first_step < self.num_steps:
            problem = f"begin at steps {starts}"
            raise UserError("phases", problem, f"ascending steps between 0 and {self.num_steps} are needed")
        shares = tuple(_weight(phase.weights, source) for source in self.sources)
        phases = (*self._phases, (phase.first_step, shares))
        return Plan(self.sources, self.global_batch, self.num_steps, phases, self.seed)

    def until(self, stop: int) -> Plan:
        """The first `stop` steps of this plan."""
        part = Plan.__new__(Plan)
        part.__setstate__(self.__getstate__() | {"num_steps": stop})
        return part

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> GlobalBatch:
        """Global batch of `step`, or one rank's contiguous share of each of its blocks, which must divide evenly."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is outside 0..{self.num_steps - 1}")
        lane, nth = int(self._lane[step]), int(self._nth_of_lane[step])
        num_blocks = self._blocks_of_lane[lane]
        blocks = []
        for at in range(nth * num_blocks, (nth + 1) * num_blocks):
            ordinal = int(self._drawn[lane][at])
            source = self.sources[ordinal]
            epoch, position = divmod(int(self._nth[lane][at]), source.batches_per_epoch)
            share = source.batch // world_size
            numbers = self._arranged(ordinal, epoch).numbers(position, rank * share, (rank + 1) * share)
            blocks.append(Block(source.name, epoch, source.rows(numbers)))
        return GlobalBatch(step, tuple(blocks))

    def reserves(self, step: int, position: int, count: int) -> list[Row]:
        """Up to `count` samples that may stand in for row `position` of a step: of its member, not in its batch.

        A pure function of seed, step and position, so that every number of workers takes the same. No two rows of a
        batch share one, unless the member is too small.
        """
        rows = self.batch(step).rows
        member = rows[position][0]
        used = np.array([index for name, index in rows if name == member])
        rng = np.random.default_rng([self.seed, 2, step])
        source = next(source for source in self.sources if member in source.members)
        return source.reserves(rng, member, used, position, count)

    def _arranged(self, ordinal: int, epoch: int) -> _Epoch:
        key = (ordinal, epoch)
        if key not in self._epochs:
            self._epochs[key] = self.sources[ordinal].arrange(self.seed, epoch)
            if len(self._epochs) > 2 * len(self.sources):  # tasks run ahead: two epochs of a source are in use
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(key)
        return self._epochs[key]

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

    def describe(self) -> dict[str, Any]:
        """What decides every batch, apart from the phases: plans of equal descriptions and phases give equal batches.

        Saved with a run, so that what differs in a plan that has changed can be named.
        """
        return {
            "seed": self.seed,
            "steps": self._length,
            "global_batch": self.global_batch,
            "sources": {
                source.name: {
                    "members": dict(zip(source.members, source.sizes, strict=True)),
                    "tables": source.tables_fingerprint,
                    "batch": source.batch,
                    "run_length": source._run_length,
                }
                for source in self.sources
            },
            "shares": self.shares,
        }

    def fingerprint(self) -> str:
        """Of `describe`; saved with checkpoints and compared on resume."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]

    def summary(self) -> list[str]:
        """One readable line per source, and one for each thing that could not be met in full."""
        lines = []
        for source, count in zip(self.sources, self.counts, strict=True):
            what = f"{'blocks' if source.blocks > 1 else 'batches'} of {source.batch}"
            lines.append(
                f"{source.name}: {source.num_samples} samples, {what}, {count / source.blocks:g} of {self.num_steps}"
                f" steps ({count / source.batches_per_epoch:.2f} epochs)"
            )
            lines += [f"{source.name}: {note}" for note in source.notes()]
        return lines


def build_plan(
    tables: Mapping[str, SourceTable],
    mixture: MixtureConfig,
    *,
    global_batch: int,
    steps: int | None = None,
    epochs: float = 1.0,
    seed: int = 0,
) -> Plan:
    """Resolve a mixture against the available sources.

    `steps` fixes the length of the run; otherwise it is `epochs` times the batches of all sources together. Without
    weights each source gets steps in proportion to its batches, so that one epoch visits each source once.

    Raises `UserError` for unknown or too small sources, and for groups that make no sense.
    """
    sources = _resolve_sources(tables, mixture, global_batch, seed)
    if steps is None:
        steps = max(1, round(epochs * sum(s.batches_per_epoch / s.blocks for s in sources)))
    if mixture.weights is None:
        shares = [s.batches_per_epoch / s.blocks for s in sources]
    else:
        shares = [_weight(mixture.weights, s) for s in sources]
    return Plan(sources, global_batch, steps, ((0, tuple(shares)),), seed)


def _weight(weights: Mapping[str, float], source: PlanSource) -> float:
    """Of a merged source: its own name's, or what its members have together."""
    return weights.get(source.name) or sum(weights.get(member, 0.0) for member in source.members)


def _resolve_sources(
    tables: Mapping[str, SourceTable], mixture: MixtureConfig, global_batch: int, seed: int
) -> tuple[PlanSource, ...]:
    groups = mixture.groups
    for group, members in groups.items():
        for name in members:
            _check_known("data.mixture.groups", name, tables)
        if group in tables:
            raise UserError("data.mixture.groups", f"{group!r} is a source already", "choose another name")
    grouped = {member: group for group, members in groups.items() for member in members}
    asked = sorted(tables if mixture.weights is None else mixture.weights)
    names = [member for name in asked for member in groups.get(name, [name])]
    for name in names:
        _check_known("data.mixture.weights", name, tables)
    if unknown := sorted(set(mixture.blocks) - {grouped.get(name, name) for name in tables}):
        known = ", ".join(sorted({grouped.get(name, name) for name in tables}))
        raise UserError("data.mixture.blocks", f"unknown source {unknown[0]!r}", f"it may name {known}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError("data.mixture.weights", f"names {twice[0]!r} and its group", "name one of them")
    drawn: dict[str, list[str]] = {}
    for name in names:
        drawn.setdefault(grouped.get(name, name), []).append(name)

    def merged(name: str, members: list[str], batch: int, blocks: int) -> PlanSource:
        return PlanSource(name, {member: tables[member] for member in sorted(members)}, batch, blocks, mixture, seed)

    sources = {}
    for name, members in sorted(drawn.items()):
        block = mixture.blocks.get(name, global_batch)
        if block < 2 or global_batch % block:
            problem = f"{block} samples of {name!r} do not divide a global batch of {global_batch}"
            raise UserError("data.mixture.blocks", problem, "choose a divisor of global_batch, at least 2")
        sources[name] = merged(name, members, block, global_batch // block)
    small = [name for name, source in sources.items() if source.num_samples < source.batch]
    if small and not mixture.merge_small:
        raise UserError(
            "global_batch",
            f"source {small[0]!r} has {sources[small[0]].num_samples} samples, fewer than one batch of"
            f" {sources[small[0]].batch}",
            "lower global_batch, leave the source out of data.mixture.weights, or set data.mixture.merge_small: true",
        )
    total = sum(sources[name].num_samples for name in small)
    members = [member for name in small for member in sources.pop(name).members]
    if total >= 2:
        sources[SMALL] = merged(SMALL, members, min(global_batch, total - total % 2), 1)
    if not sources:
        raise UserError("data.root", f"{total} training samples are not enough to contrast", "add at least two pairs")
    return tuple(sources.values())


def _check_known(place: str, name: str, tables: Mapping[str, SourceTable]) -> None:
    if name not in tables:
        raise UserError(place, f"unknown source {name!r}", f"the data has {', '.join(sorted(tables))}")


def _apportion(shares: Sequence[float], steps: int) -> tuple[int, ...]:
    """Split `steps` by largest remainder: exact to one step for every source."""
    if steps == 0:
        return (0,) * len(shares)
    exact = np.asarray(shares) / sum(shares) * steps
    counts = np.floor(exact).astype(int)
    missing = steps - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return tuple(int(c) for c in counts)


def _counted(values: npt.NDArray[np.int16], num_values: int) -> Int64Array:
    """How often each value has come before."""
    nth = np.zeros(len(values), np.int64)
    for value in range(num_values):
        mine = values == value
        nth[mine] = np.arange(int(mine.sum()))
    return nth


def _spread(counts: tuple[int, ...], seed: list[int]) -> npt.NDArray[np.int16]:
    """Order of sources over the steps: the k-th of c batches falls at a random point of the k-th of c equal spans."""
    rng = np.random.default_rng(seed)
    at = np.concatenate([(np.arange(c) + rng.random(c)) / max(c, 1) for c in counts])
    ordinal = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    return ordinal[np.argsort(at, kind="stable")]


@dataclass(frozen=True, slots=True, eq=False)
class _SourceSubset:
    """The samples of a member that are used, numbered from 0: all of them, or random runs of neighbors."""

    size: int
    run_length: int
    runs: Int64Array | None  # ascending; None: the first `size` samples

    @classmethod
    def of(cls, num_samples: int, mixture: MixtureConfig, seed: int, name: str) -> _SourceSubset:
        size = min(num_samples, mixture.max_samples_per_source)
        length = min(mixture.run_length, size)
        wanted = -(-size // max(length, 1))
        if size == num_samples or wanted > num_samples // length:  # all, or all but a part of a run
            return cls(size, length, None)
        rng = np.random.default_rng([seed, 3, _number_of(name)])
        return cls(size, length, np.sort(rng.choice(num_samples // length, wanted, replace=False)))

    def samples(self, numbers: Int64Array) -> Int64Array:
        """Indices in the source of these numbers."""
        if self.runs is None:
            return numbers
        return self.runs[numbers // self.run_length] * self.run_length + numbers % self.run_length

    def numbers(self, samples: Int64Array) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
        """Numbers of these samples, and which of the samples are used at all; numbers of others mean nothing."""
        if self.runs is None:
            return samples, samples < self.size
        run, within = samples // self.run_length, samples % self.run_length
        at = np.minimum(np.searchsorted(self.runs, run), len(self.runs) - 1)
        numbers = at * self.run_length + within
        return numbers, (self.runs[at] == run) & (numbers < self.size)


@dataclass(frozen=True, slots=True, eq=False)
class _ConstrainedSamples:
    """Samples that cannot go just anywhere: `numbers` ascending, `target` and `cluster` dense ids, -1 for none."""

    numbers: Int64Array
    target: Int64Array
    cluster: Int64Array

    @classmethod
    def of(cls, tables: list[SourceTable], subsets: list[_SourceSubset], starts: Int64Array) -> _ConstrainedSamples:
        duplicates, targets, clustered, clusters = [_NOTHING], [_NOTHING.astype(np.uint64)], [_NOTHING], [_NOTHING]
        num_clusters = 0
        for table, subset, start in zip(tables, subsets, starts, strict=False):
            numbers, used = subset.numbers(table.duplicates)
            duplicates.append(numbers[used] + start)
            targets.append(table.targets[used].astype(np.uint64))
            first, stop = table.clusters.T
            samples = np.concatenate([_NOTHING, *map(np.arange, first, stop)])
            numbers, used = subset.numbers(samples)
            clustered.append(numbers[used] + start)
            clusters.append((np.repeat(np.arange(len(first)), stop - first) + num_clusters)[used])
            num_clusters += len(first)
        duplicate, target = _shared(np.concatenate(duplicates), np.concatenate(targets))
        member, cluster = _shared(np.concatenate(clustered), np.concatenate(clusters))
        numbers = np.union1d(duplicate, member)
        target_S, cluster_S = np.full((2, len(numbers)), -1, np.int64)
        target_S[np.searchsorted(numbers, duplicate)] = target
        cluster_S[np.searchsorted(numbers, member)] = cluster
        return cls(numbers, target_S, cluster_S)

    def place(self, num_batches: int, batch: int, rng: np.random.Generator) -> Int64Array:
        """Batch of each `[S]`; -1 for those that are left out of this epoch, which only happens where all are full."""
        if (self.cluster >= 0).any():
            return _pack(self.target, self.cluster, num_batches, batch, rng)
        return _deal(self.target, num_batches, batch, rng)

    def notes(self, num_batches: int, batch: int) -> list[str]:
        """What no order of an epoch, or not the first one, can meet."""
        lines = []
        sizes = np.bincount(self.target[self.target >= 0])
        if crowded := int((sizes > num_batches).sum()):
            lines.append(
                f"{crowded} targets have more duplicates (up to {sizes.max()}) than an epoch has batches"
                f" ({num_batches}): some batches hold duplicates, which are not scored against each other"
            )
        sizes = np.bincount(self.cluster[self.cluster >= 0])
        if large := int((sizes > batch).sum()):
            lines.append(f"{large} clusters are larger than a batch ({batch}) and are divided")
        return lines


def _shared(numbers: Int64Array, keys: npt.NDArray[Any]) -> tuple[Int64Array, Int64Array]:
    """Those whose key another one has too, in ascending order, and dense ids of their keys."""
    _, ids, counts = np.unique(keys, return_inverse=True, return_counts=True)
    several = counts[ids] > 1
    _, dense = np.unique(ids[several], return_inverse=True)
    order = np.argsort(numbers[several], kind="stable")
    return numbers[several][order], dense[order]


def _deal(target_S: Int64Array, num_batches: int, batch: int, rng: np.random.Generator) -> Int64Array:
    """Deals duplicates like cards, target by target: as many batches in turn as a target has duplicates."""
    num_targets = int(target_S.max(initial=-1)) + 1
    order = np.lexsort([rng.random(len(target_S)), rng.permutation(num_targets)[target_S]])
    dealt_S = np.full(len(target_S), -1, np.int64)
    order = order[: num_batches * batch]
    dealt_S[order] = (np.arange(len(order)) + rng.integers(num_batches)) % num_batches
    return dealt_S


def _pack(
    target_S: Int64Array, cluster_S: Int64Array, num_batches: int, batch: int, rng: np.random.Generator
) -> Int64Array:
    """Place the largest clusters first, then the duplicates of the most frequent target.

    Each goes into the emptiest batch without a duplicate.

    A cluster that fits nowhere is divided. Some order without duplicates may exist where this finds none.
    """
    placed_S = np.full(len(target_S), -1, np.int64)
    room_B = np.full(num_batches, batch)
    tie_B = rng.random(num_batches)
    holds: dict[int, Counter[int]] = {}  # target -> batch -> duplicates in it

    def put(members: list[int]) -> bool:
        """Whether there was room."""
        targets = [int(target) for target in target_S[members] if target >= 0]
        fits = np.flatnonzero(room_B >= len(members))
        if not len(fits):
            return False
        duplicates_B = np.zeros(num_batches, np.int64)
        for target in targets:
            for at, count in holds.get(target, {}).items():
                duplicates_B[at] += count
        chosen = int(fits[np.lexsort([tie_B[fits], -room_B[fits], duplicates_B[fits]])[0]])
        placed_S[members] = chosen
        room_B[chosen] -= len(members)
        for target in targets:
            holds.setdefault(target, Counter())[chosen] += 1
        return True

    clustered = np.flatnonzero(cluster_S >= 0)
    by_cluster = np.split(clustered, np.flatnonzero(np.diff(cluster_S[clustered])) + 1)
    alone = np.flatnonzero(cluster_S < 0).tolist()
    shuffled = [by_cluster[i].tolist() for i in rng.permutation(len(by_cluster))]
    for members in sorted(shuffled, key=len, reverse=True):
        if not put(members):
            alone += members
    frequency = Counter(target_S[alone].tolist())
    frequency[-1] = 0  # no target, no conflict: wherever there is room
    order = [alone[i] for i in rng.permutation(len(alone))]
    for member in sorted(order, key=lambda s: (-frequency[int(target_S[s])], int(target_S[s]))):
        put([member])
    return placed_S


@dataclass(frozen=True, slots=True, eq=False)
class _Epoch:
    """One epoch of a source. A batch is a slice of the plain samples, in permuted runs, and then its special ones."""

    batch: int
    special: Int64Array  # numbers, in order of their batch
    first: Int64Array  # of the special ones of each batch, and their count
    gaps: Int64Array  # plain samples before each special one
    num_plain: int
    shift: int
    run_length: int
    runs: npt.NDArray[np.unsignedinteger[Any]]  # permutation of the whole runs of plain samples

    @classmethod
    def of(
        cls,
        special: _ConstrainedSamples,
        num_samples: int,
        batch: int,
        run_length: int,
        seed: int,
        name: str,
        epoch: int,
    ) -> _Epoch:
        rng = np.random.default_rng([seed, 1, _number_of(name), epoch])
        num_batches = num_samples // batch
        placed_S = special.place(num_batches, batch, rng)
        used = np.flatnonzero(placed_S >= 0)
        order = used[np.argsort(placed_S[used], kind="stable")]
        first = np.concatenate([[0], np.cumsum(np.bincount(placed_S[used], minlength=num_batches))])
        num_plain = num_samples - len(special.numbers)
        runs = np.arange(num_plain // run_length, dtype=np.uint32)
        rng.shuffle(runs)
        return cls(
            batch=batch,
            special=special.numbers[order],
            first=first,
            gaps=special.numbers - np.arange(len(special.numbers)),
            num_plain=num_plain,
            shift=int(rng.integers(max(1, num_plain))),  # which neighbors form a run differs between epochs
            run_length=run_length,
            runs=runs,
        )

    def numbers(self, position: int, start: int, stop: int) -> Int64Array:
        """Samples `start` to `stop` of the batch at `position`."""
        first, last = (int(number) for number in self.first[position : position + 2])
        num_plain = self.batch - (last - first)
        plain = np.arange(min(start, num_plain), min(stop, num_plain)) + position * self.batch - first
        special = self.special[first + max(0, start - num_plain) : first + max(0, stop - num_plain)]
        return np.concatenate([self._plain(plain), special])

    def _plain(self, at: Int64Array) -> Int64Array:
        run, within = at // self.run_length, at % self.run_length
        if len(self.runs):  # what is left over behind the whole runs keeps its place
            run = np.where(run < len(self.runs), self.runs[np.minimum(run, len(self.runs) - 1)], run)
        plain = (run * self.run_length + within + self.shift) % max(1, self.num_plain)
        return plain + np.searchsorted(self.gaps, plain, side="right")


def _number_of(name: str) -> int:
    """Of a source, for seeds: other sources do not change its order."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def _tables_fingerprint(tables: Mapping[str, SourceTable]) -> str:
    digest = hashlib.sha256()
    for name, table in tables.items():
        digest.update(f"{name} {table.num_samples} ".encode())
        for array in (table.duplicates, table.targets, table.clusters):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
