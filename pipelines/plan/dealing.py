"""Samples to batches so that no two of a batch have the same target or the same query, where that is possible.

Targets and queries link samples, directly or through others. Linked samples go to consecutive batches, so that they are
apart unless they are more than the batches. Larger sets are dealt by their more crowded key. Swaps then separate what
the other key left in one batch.

Shapes: S samples; their keys are dense numbers, -1 for none.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipelines.plan.types import Int64Array

_SWAP_ROUNDS = 16  # a few remove what swaps can remove


def deal(
    target_S: Int64Array, query_S: Int64Array, num_batches: int, batch: int, rng: np.random.Generator
) -> Int64Array:
    """Return the batch of each sample `[S]`, or -1 for those that are more than all batches hold."""
    linked_S = linked_sets(target_S, query_S)
    order = dealing_order(target_S, query_S, linked_S, rng)
    dealt_S = np.full(len(target_S), -1, np.int64)
    order = order[: num_batches * batch]  # an epoch has whole batches only
    dealt_S[order] = (np.arange(len(order)) + rng.integers(num_batches)) % num_batches
    if (query_S >= 0).any() and num_batches > 1 and np.bincount(linked_S).max() > num_batches:
        main_S = _more_crowded(target_S, query_S)
        _swap_apart(dealt_S, [main_S, query_S if main_S is target_S else target_S], num_batches, rng)
    return dealt_S


def linked_sets(target_S: Int64Array, query_S: Int64Array) -> Int64Array:
    """Return a number of each set of samples that are linked by targets and queries, `[S]`."""
    return _linked(target_S, query_S) if (query_S >= 0).any() else target_S


def dealing_order(
    target_S: Int64Array, query_S: Int64Array, linked_S: Int64Array, rng: np.random.Generator
) -> Int64Array:
    """Return the samples in a random order in which those of a linked set follow each other, the crowded key first."""
    num_sets = int(linked_S.max(initial=-1)) + 1
    order_keys = [rng.random(len(target_S)), rng.permutation(num_sets)[linked_S]]
    if (query_S >= 0).any():
        main_S = _more_crowded(target_S, query_S)
        shuffled = np.append(rng.permutation(int(main_S.max()) + 1), -1)  # -1 takes the last one
        order_keys.insert(1, shuffled[main_S])
    return np.lexsort(order_keys)


def _more_crowded(target_S: Int64Array, query_S: Int64Array) -> Int64Array:
    """Return the key of which more pairs of samples are equal; of equal ones, the target: `max` takes the first."""
    return max(target_S, query_S, key=_crowding)


def _linked(*keys: Int64Array) -> Int64Array:
    """Return a dense number of each set of samples that are linked by common keys, `[S]`."""
    least_S = np.arange(len(keys[0]))  # the first sample that each is known to be linked with
    while True:
        before_S = least_S.copy()
        for key_S in keys:
            has_key = key_S >= 0
            first = np.full(int(key_S.max(initial=-1)) + 1, len(least_S))
            np.minimum.at(first, key_S[has_key], least_S[has_key])
            known_S = least_S.copy()
            least_S[has_key] = first[key_S[has_key]]
            np.minimum.at(least_S, known_S, least_S)  # what a sample has learned, the first of its set learns too
            least_S = least_S[least_S]
        if np.array_equal(least_S, before_S):
            return np.unique(least_S, return_inverse=True)[1].reshape(-1)


def _crowding(key_S: Int64Array) -> int:
    """Return the number of pairs of samples with a common key."""
    sizes = np.bincount(key_S[key_S >= 0])
    return int((sizes * (sizes - 1)).sum())


def _swap_apart(dealt_S: Int64Array, keys: list[Int64Array], num_batches: int, rng: np.random.Generator) -> None:
    """Swap samples that meet one of their keys in their batch for others, in place.

    A swap is made if both samples then meet none of their keys. Keys with more samples than batches stay as they are.
    `keys` begin with the key by which the samples were dealt. Every other round looks for partners with an equal one,
    because to swap these leaves its counts as they are.
    """
    sizes = [np.bincount(key_S[key_S >= 0], minlength=1) for key_S in keys]
    used = np.flatnonzero(dealt_S >= 0)
    by_main = used[np.argsort(keys[0][used], kind="stable")]
    main_K = keys[0][by_main]
    for turn in range(_SWAP_ROUNDS):
        places = [_Places(dealt_S, key_S, num_batches) for key_S in keys]
        crowded_S = np.zeros(len(dealt_S), bool)
        for place, key_S, size in zip(places, keys, sizes, strict=True):
            crowded_S |= place.is_repeated & (size[key_S] <= num_batches)
        moved = np.flatnonzero(crowded_S)
        if not len(moved):
            return
        first, stop = np.zeros_like(moved), np.full_like(moved, len(used))
        if turn % 2 == 0:
            first, stop = (np.searchsorted(main_K, keys[0][moved], side) for side in ("left", "right"))
        other = by_main[rng.integers(first, stop)]
        fits = dealt_S[moved] != dealt_S[other]
        new_places = []
        for place, key_S in zip(places, keys, strict=True):
            same_key = (key_S[moved] == key_S[other]) & (key_S[moved] >= 0)
            for sample, to in ((moved, dealt_S[other]), (other, dealt_S[moved])):
                code = place.codes(sample, to)
                fits &= same_key | ~place.has(code)
                new_places.append(np.where(same_key, -1, code))
        # Swaps of one round must not meet: no sample, and no new pair of batch and key, comes twice.
        for group in ([moved, other], new_places[:2], new_places[2:]):
            fits &= _come_once(np.stack(group), fits)
        at, to = dealt_S[moved[fits]], dealt_S[other[fits]]
        dealt_S[moved[fits]], dealt_S[other[fits]] = to, at


class _Places:
    """Which keys are in which batch."""

    def __init__(self, dealt_S: Int64Array, key_S: Int64Array, num_batches: int) -> None:
        self._key_S, self._num_batches = key_S, num_batches
        code_S = self.codes(np.arange(len(key_S)), dealt_S)
        code_S[dealt_S < 0] = -1
        self._found, first, inverse = np.unique(code_S, return_index=True, return_inverse=True)
        self.is_repeated = (code_S >= 0) & (first[inverse.reshape(-1)] != np.arange(len(key_S)))
        """Bool `[S]`: samples whose key an earlier sample of their batch has."""

    def codes(self, samples: Int64Array, batches: Int64Array) -> Int64Array:
        """Return a number of each sample's key in a batch, -1 for a sample without key."""
        key = self._key_S[samples]
        return np.where(key < 0, -1, key * self._num_batches + batches)

    def has(self, codes: Int64Array) -> npt.NDArray[np.bool_]:
        """Return whether the key is in the batch."""
        at = np.minimum(np.searchsorted(self._found, codes), len(self._found) - 1)
        return np.asarray((self._found[at] == codes) & (codes >= 0))


def _come_once(numbers: Int64Array, counted: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Mark the columns of `[R, K]` whose numbers come in no other counted column; -1 is no number."""
    found, inverse, counts = np.unique(numbers[:, counted], return_inverse=True, return_counts=True)
    is_once = (counts == 1) | (found < 0)
    once = np.zeros(numbers.shape[1], bool)
    once[counted] = is_once[inverse.reshape(len(numbers), -1)].all(axis=0)
    return once
