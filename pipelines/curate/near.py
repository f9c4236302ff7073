"""Near duplicates of pairs. A cheap index proposes pairs of samples, and the features of both inputs decide.

Samples with media are proposed by the hash of one frame, of the target if it has media, else of the query. Samples of
texts only are proposed by MinHash of query and target together.

Samples are taken in order, larger pictures first. A sample is left out if it is similar to one that was kept before. So
every sample that is left out has a neighbor that stays, and a chain of small changes joins no different samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from pipelines.curate.hamming import Ints, near_pairs
from pipelines.curate.samples import POSITIVE, QUERY, Drop, Samples, positions
from pipelines.curate.settings import NearRule
from pipelines.curate.similarity import TextComparer, media_similar
from pipelines.curate.tables import Bools
from pipelines.curate.texts import BAND_ROWS, NUM_BANDS, MinHashes

MEDIA, TEXT = "near_media", "near_text"
_MAX_BUCKET = 1000  # neighbors in a bucket of equal bands that a sample is compared with
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, which spreads the bits


def find_near(samples: Samples, keep: Bools, rule: NearRule, within: str) -> list[Drop]:
    """Return the near duplicates among the samples that `keep` marks."""
    frames = samples.media.num_frames.reshape(-1, 2)
    bad = np.zeros(2 * len(samples), np.bool_)
    bad[list(samples.media.reasons)] = True
    usable = keep & ~bad.reshape(-1, 2).any(axis=1)
    by_target = frames[:, POSITIVE] > 0
    by_query = ~by_target & (frames[:, QUERY] > 0)
    comparer = _Comparer(samples, rule, within)
    drops = []
    for role, chosen in ((POSITIVE, by_target), (QUERY, by_query)):
        drops += _duplicates(comparer, positions(usable & chosen), role)
    return drops + _duplicates(comparer, positions(usable & ~by_target & ~by_query), None)


def _duplicates(comparer: _Comparer, members: Ints, role: int | None) -> list[Drop]:
    """Return the duplicates among samples that are proposed by one index: media of a role, or texts (None)."""
    if not len(members):
        return []
    samples, reason = comparer.samples, TEXT if role is None else MEDIA
    if role is not None:
        inputs = 2 * members + role
        pixels = samples.media.width[inputs] * samples.media.height[inputs]
        members = members[np.argsort(-pixels, kind="stable")]
    leaders, drops = _without_equals(comparer, members, role, reason)
    pairs = comparer.proposed(leaders, role)
    lefts, rights = [], []
    for left, right in pairs:
        similar = comparer.similar(leaders[left], leaders[right], role)
        lefts.append(left[similar])
        rights.append(right[similar])
    empty = np.zeros(0, np.int64)
    left, right = np.concatenate([empty, *lefts]), np.concatenate([empty, *rights])
    kept = np.ones(len(leaders), np.bool_)
    for place in np.lexsort((left, right)):
        one, other = int(left[place]), int(right[place])
        if kept[one] and kept[other]:
            kept[other] = False
            drops.append(samples.duplicate(int(leaders[other]), int(leaders[one]), reason))
    return drops


def _without_equals(comparer: _Comparer, members: Ints, role: int | None, reason: str) -> tuple[Ints, list[Drop]]:
    """Return the first of samples with equal features, and drop the others: thousands of blank pages cost little."""
    first: dict[bytes, int] = {}
    drops = []
    for sample in members.tolist():
        leader = first.setdefault(comparer.identity(sample, role), sample)
        if leader != sample:
            drops.append(comparer.samples.duplicate(sample, leader, reason))
    return np.array(list(first.values()), np.int64), drops


class _Comparer:
    """Compares samples by the inputs that count for the rule."""

    def __init__(self, samples: Samples, rule: NearRule, within: str) -> None:
        self.samples, self._rule = samples, rule
        self._texts = TextComparer(samples.texts, rule.text)
        self._source_of = samples.source_of if within == "source" else np.zeros(len(samples), np.int64)

    def _roles(self, role: int | None) -> tuple[int, ...]:
        return (POSITIVE,) if self._rule.of == "target" and role == POSITIVE else (POSITIVE, QUERY)

    def identity(self, sample: int, role: int | None) -> bytes:
        """Return a digest that is equal for samples whose inputs have equal features."""
        texts, media = self.samples.texts, self.samples.media
        digest = hashlib.blake2b(str(self._source_of[sample]).encode(), digest_size=16)
        for each in self._roles(role):
            place = 2 * sample + each
            frames = slice(int(media.bounds[place]), int(media.bounds[place + 1]))
            text = texts.texts[place].as_py().encode()
            digest.update(b"%d %s %d " % (len(text), media.kinds[place], frames.stop - frames.start) + text)
            digest.update(media.hashes[frames].tobytes() + media.grids[frames].tobytes())
        return digest.digest()

    def proposed(self, leaders: Ints, role: int | None) -> Iterator[tuple[Ints, Ints]]:
        """Yield pairs of places in `leaders` that may be near duplicates."""
        if role is None:
            return _text_pairs(self.samples, leaders)
        return near_pairs(self.samples.media.middle[2 * leaders + role], self._rule.media.hash_bits)

    def similar(self, lefts: Ints, rights: Ints, role: int | None) -> Bools:
        """Return which of P pairs of samples are near duplicates."""
        found = np.asarray(self._source_of[lefts] == self._source_of[rights])
        media = self.samples.media
        for check in (
            lambda one, other: media_similar(media, one, media, other, self._rule.media),
            self._texts.similar,
        ):
            for each in self._roles(role):
                some = np.flatnonzero(found)
                found[some] = check(2 * lefts[some] + each, 2 * rights[some] + each)
        return found


def _text_pairs(samples: Samples, leaders: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Yield pairs of samples with an equal band of MinHash values, each once."""
    found = np.zeros(0, np.int64)
    for band in range(NUM_BANDS):
        min_hash = samples.texts.min_hash[:, band * BAND_ROWS : (band + 1) * BAND_ROWS]
        both = np.minimum(min_hash[2 * leaders + QUERY], min_hash[2 * leaders + POSITIVE])
        found = np.union1d(found, _band_pairs(both))
    yield found // len(leaders), found % len(leaders)


def _band_pairs(values_NR: MinHashes) -> Ints:
    """Return the pairs of rows with equal values as i * N + j, i < j."""
    num_rows = len(values_NR)
    mixed = np.zeros(num_rows, np.uint64)
    for column in values_NR.T:
        mixed = (mixed ^ column) * _FACTOR
        mixed ^= mixed >> np.uint64(29)
    order = np.argsort(mixed, kind="stable")
    in_order = mixed[order]
    found = []
    for distance in range(1, min(_MAX_BUCKET, num_rows - 1) + 1):
        same = np.flatnonzero(in_order[distance:] == in_order[:-distance])
        if not same.size:
            break
        found.append(order[same] * num_rows + order[same + distance])
    return np.concatenate([np.zeros(0, np.int64), *found])
