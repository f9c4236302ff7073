"""Clusters to batches whole, and samples with equal targets or queries around them, without a loop over samples.

The largest clusters are dealt first, each to one of the emptiest batches. A cluster that fits nowhere is divided, and
its parts fill what room is left. Samples without a cluster follow. Then parts of equal size swap places, until no two
of a batch meet in a target or a query, or until swaps no longer help.

Shapes: S samples, C clusters, U units, B batches, M moves. A unit is a part of a cluster in one batch, or one sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipelines.plan.dealing import dealing_order, linked_sets
from pipelines.plan.types import Int64Array

_SWAP_ROUNDS = 16  # a few remove what swaps can remove
_BoolArray = npt.NDArray[np.bool_]


def pack(
    target_S: Int64Array,
    query_S: Int64Array,
    cluster_S: Int64Array,
    num_batches: int,
    batch: int,
    rng: np.random.Generator,
) -> Int64Array:
    """Return the batch of each sample `[S]`, or -1 for those that are more than all batches hold.

    Targets, queries and clusters are dense numbers, -1 for none.
    """
    piece_S = _pieces(cluster_S, batch)
    batch_S = np.full(len(cluster_S), -1, np.int64)
    clustered = np.flatnonzero(piece_S >= 0)
    room_B = np.full(num_batches, batch)
    batch_of_piece = _deal_whole(np.bincount(piece_S[clustered]), room_B, rng)
    batch_S[clustered] = batch_of_piece[piece_S[clustered]]
    divided = clustered[batch_S[clustered] < 0]
    divided = divided[np.argsort(piece_S[divided], kind="stable")]
    _fill(batch_S, divided, _slots_by_batch(room_B, len(divided)), room_B)
    single = np.flatnonzero(piece_S < 0)
    linked = linked_sets(target_S[single], query_S[single])
    single = single[dealing_order(target_S[single], query_S[single], linked, rng)]
    _fill(batch_S, single, _slots_in_turn(room_B, len(single), rng), room_B)
    _swap_apart(batch_S, piece_S, [target_S, query_S], room_B, rng)
    return batch_S


def _pieces(cluster_S: Int64Array, batch: int) -> Int64Array:
    """Return a dense number of each sample's cluster, -1 for none. One larger than a batch is cut into several."""
    piece_S = np.full(len(cluster_S), -1, np.int64)
    clustered = np.flatnonzero(cluster_S >= 0)
    order = clustered[np.argsort(cluster_S[clustered], kind="stable")]
    sizes = np.bincount(cluster_S[order])
    within = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    keys = cluster_S[order] * (len(cluster_S) // batch + 1) + within // batch
    piece_S[order] = np.unique(keys, return_inverse=True)[1].reshape(-1)
    return piece_S


def _deal_whole(size_C: Int64Array, room_B: Int64Array, rng: np.random.Generator) -> Int64Array:
    """Return the batch of each cluster, -1 for those that fit nowhere, and take their room from `room_B`, in place.

    Each round gives the emptiest batches the largest clusters that are left, one each.
    """
    batch_C = np.full(len(size_C), -1, np.int64)
    shuffled = rng.permutation(len(size_C))
    waiting = shuffled[np.argsort(-size_C[shuffled], kind="stable")]
    size_W = size_C[waiting]
    begin = 0
    while begin < len(waiting):
        if size_W[begin] > room_B.max():  # larger than any room
            begin += int(np.searchsorted(-size_W[begin:], -room_B.max()))
            continue
        emptiest = np.lexsort([rng.random(len(room_B)), -room_B])[: len(waiting) - begin]
        end = begin + len(emptiest)
        first, size = waiting[begin:end], size_W[begin:end]
        fits = size <= room_B[emptiest]
        batch_C[first[fits]] = emptiest[fits]
        room_B[emptiest[fits]] -= size[fits]
        begin = end - int((~fits).sum())
        waiting[begin:end], size_W[begin:end] = first[~fits], size[~fits]  # the others wait for the next round
    return batch_C


def _slots_by_batch(room_B: Int64Array, count: int) -> Int64Array:
    """Return the batches of up to `count` free places: all of one batch, then all of the next, the emptiest first."""
    emptiest = np.argsort(-room_B, kind="stable")
    needed = emptiest[: int(np.searchsorted(np.cumsum(room_B[emptiest]), count)) + 1]
    return np.repeat(needed, room_B[needed])[:count]


def _slots_in_turn(room_B: Int64Array, count: int, rng: np.random.Generator) -> Int64Array:
    """Return the batches of up to `count` free places: one of each batch in turn, in a random order of the batches."""
    low, high = 0, int(room_B.max(initial=0))
    while low < high:  # the fewest turns that have enough places
        turns = (low + high) // 2
        low, high = (low, turns) if np.minimum(room_B, turns).sum() >= count else (turns + 1, high)
    order = rng.permutation(len(room_B))
    places = np.minimum(room_B[order], low)
    turn = np.arange(places.sum()) - np.repeat(np.cumsum(places) - places, places)
    return np.repeat(order, places)[np.argsort(turn, kind="stable")][:count]


def _fill(batch_S: Int64Array, samples: Int64Array, slots: Int64Array, room_B: Int64Array) -> None:
    """Put samples into slots in order, in place. Samples behind the last slot keep -1."""
    batch_S[samples[: len(slots)]] = slots
    room_B -= np.bincount(slots, minlength=len(room_B))


def _swap_apart(
    batch_S: Int64Array, piece_S: Int64Array, keys: Sequence[Int64Array], room_B: Int64Array, rng: np.random.Generator
) -> None:
    """Move units that meet one of their keys in their batch, in place.

    Every other round, a unit changes places with one of equal size, and otherwise it takes free room of another batch.
    It moves only if it then meets none of its keys. Keys with more samples than batches stay where they are.
    """
    keys = [_rare(key_S, len(room_B)) for key_S in keys]
    if all((key_S < 0).all() for key_S in keys):
        return
    units = _Units.of(piece_S, batch_S, len(room_B))
    for turn in range(_SWAP_ROUNDS):
        codes = _Codes(units, keys, len(room_B))
        moved = codes.crowded()
        if not len(moved):
            break
        if turn % 2 == 0:
            first, stop = (np.searchsorted(units.size, units.size[moved], side) for side in ("left", "right"))
            partner = rng.integers(first, stop)
            to = units.batch[partner]
        else:
            partner = np.full(len(moved), -1)
            to = rng.integers(0, len(room_B), len(moved))
            to[room_B[to] < units.size[moved]] = -1
        fits = (to >= 0) & (to != units.batch[moved])
        fits &= codes.are_free(moved, to, partner) & codes.are_free(partner, units.batch[moved], moved)
        # Moves of one round must not meet: no unit, no free room and no new pair of batch and key comes twice.
        fits &= _come_once([moved, np.where(partner < 0, -1, partner)], fits)
        if turn % 2:
            fits &= _come_once([to], fits)
        fits &= codes.stay_apart(moved, to, partner, fits)
        moved, to, partner = moved[fits], to[fits], partner[fits]
        swaps = partner >= 0
        np.add.at(room_B, units.batch[moved[~swaps]], units.size[moved[~swaps]])
        np.add.at(room_B, to[~swaps], -units.size[moved[~swaps]])
        units.batch[partner[swaps]] = units.batch[moved[swaps]]
        units.batch[moved] = to
    batch_S[units.samples] = np.repeat(units.batch, units.size)


def _rare(key_S: Int64Array, num_batches: int) -> Int64Array:
    """Return the keys without those that no order can keep apart: -1 where more samples than batches have one."""
    sizes = np.bincount(key_S[key_S >= 0], minlength=1)
    return np.where(sizes[key_S] <= num_batches, key_S, -1)


class _Units:
    """Units in order of their size. `samples` are those of unit 0, then those of unit 1, and so on."""

    def __init__(self, samples: Int64Array, size: Int64Array, batch: Int64Array) -> None:
        self.samples, self.size, self.batch = samples, size, batch
        self.first = np.cumsum(size) - size

    @classmethod
    def of(cls, piece_S: Int64Array, batch_S: Int64Array, num_batches: int) -> _Units:
        """Make them of the placed samples: those of one piece in one batch are a unit."""
        samples = np.flatnonzero(batch_S >= 0)
        piece = np.where(piece_S < 0, piece_S.max() + 1 + np.arange(len(piece_S)), piece_S)[samples]
        unit = np.unique(piece * num_batches + batch_S[samples], return_inverse=True)[1].reshape(-1)
        size = np.bincount(unit)
        rank = np.empty_like(size)
        rank[np.argsort(size, kind="stable")] = np.arange(len(size))
        samples = samples[np.argsort(rank[unit], kind="stable")]
        sizes = np.sort(size)
        return cls(samples, sizes, batch_S[samples][np.cumsum(sizes) - sizes])

    def members(self, units: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the samples of these units, and the position in `units` of each. -1 is a unit without samples."""
        sizes = np.where(units < 0, 0, self.size[units])
        owner = np.repeat(np.arange(len(units)), sizes)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self.samples[self.first[units[owner]] + within], owner


class _Codes:
    """Which keys are in which batch, and by which unit. The code of a key in a batch is one number."""

    def __init__(self, units: _Units, keys: Sequence[Int64Array], num_batches: int) -> None:
        self._units, self._num_batches = units, num_batches
        starts = np.cumsum([0, *(int(key_S.max(initial=-1)) + 1 for key_S in keys)])
        self._keys = [np.where(key_S < 0, -1, key_S + start) for key_S, start in zip(keys, starts, strict=False)]
        every = np.arange(len(units.size))
        code, owner = self._of(every, units.batch)
        pairs = np.sort(code * len(every) + owner)
        # A unit counts once, however often it has the key itself. (`np.unique` hashes, which takes ten times as long.)
        pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])[: len(pairs)]]
        self._code, self._unit = np.divmod(pairs, max(1, len(every)))

    def crowded(self) -> Int64Array:
        """Return the units that have a key of another unit of their batch, but for the largest one of each key."""
        return np.unique(self._unit[:-1][self._code[1:] == self._code[:-1]])  # units are in order of size

    def are_free(self, moved: Int64Array, to: Int64Array, leaving: Int64Array) -> _BoolArray:
        """Return whether no unit of the batch `to` has a key of the moved one. `leaving` does not count."""
        code, owner = self._of(moved, to)
        first, stop = (np.searchsorted(self._code, code, side) for side in ("left", "right"))
        last = np.minimum(first, len(self._unit) - 1)
        only_leaving = (stop - first == 1) & (self._unit[last] == leaving[owner])
        free = np.ones(len(moved), bool)
        free[owner[(stop > first) & ~only_leaving]] = False
        return free

    def stay_apart(self, moved: Int64Array, to: Int64Array, partner: Int64Array, counted: _BoolArray) -> _BoolArray:
        """Return whether no other counted move brings a key to a batch to which this one brings it."""
        moves = np.flatnonzero(counted)
        brought = [self._of(moved[moves], to[moves]), self._of(partner[moves], self._units.batch[moved[moves]])]
        code, owner = (np.concatenate(parts) for parts in zip(*brought, strict=True))
        code, owner = np.unique(np.stack([code, owner]), axis=1)
        met = np.zeros(len(code), bool)
        met[1:] = code[1:] == code[:-1]
        met[:-1] |= met[1:]
        apart = np.ones(len(moved), bool)
        apart[moves[owner[met]]] = False
        return apart

    def _of(self, units: Int64Array, batches: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the codes of all keys of these units in these batches, and the position in `units` of each."""
        samples, owner = self._units.members(units)
        codes, owners = [], []
        for key_S in self._keys:
            key = key_S[samples]
            has_key = key >= 0
            codes.append(key[has_key] * self._num_batches + batches[owner[has_key]])
            owners.append(owner[has_key])
        return np.concatenate(codes), np.concatenate(owners)


def _come_once(numbers: Sequence[Int64Array], counted: _BoolArray) -> _BoolArray:
    """Mark the moves whose numbers come in no other counted move; -1 is no number."""
    stacked = np.stack(list(numbers))
    found, inverse, counts = np.unique(stacked[:, counted], return_inverse=True, return_counts=True)
    once = np.zeros(stacked.shape[1], bool)
    once[counted] = ((counts == 1) | (found < 0))[inverse.reshape(len(stacked), -1)].all(axis=0)
    return once
