"""How similar adjacent samples of a source are, and what unshuffled shards cost a batch.

A contiguous run goes into one global batch whole, because it is one range request. In shuffled shards, adjacent samples
have nothing in common. Other shards hold one video after the other, or one search result after the other. There, a
batch consists of as many neighborhoods as it has runs. A query's negatives from its own run are nearly its positive.

The measure is the share of words that two samples have in common, and whether they have the same target. Dice's
coefficient gives the share: twice the common words by all words of both. Pairs `1 .. DISTANCE` samples apart are
compared with pairs drawn from the whole source.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

SETTING = "neighbors"
"""Key in the settings of a manifest: source -> `NeighborSimilarity` as plain data."""
DISTANCE = 15  # pairs within a run of 16, the default
_MAX_PAIRS = 256  # of a shard
_POOL = 64  # samples of a shard for pairs across the source
_MAX_POOLED_SHARDS = 64
_RANDOM_PAIRS = 4096
_MAX_WORDS = 64
_MARGIN = 0.05  # five more words in a hundred; far above what chance gives with this many pairs

Words = frozenset[int]


@dataclass(slots=True)
class ShardSimilarity:
    """Sums over pairs of a shard, and a pool of its samples, evenly spaced: (target, hashes of words)."""

    num_pairs: int = 0
    shared_words: float = 0.0
    same_target: int = 0
    pool: list[tuple[str, list[int]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class NeighborSimilarity:
    """Mean share of common words, and share of pairs with the same target: of adjacent samples, and of random pairs."""

    words: float
    random_words: float
    same_target: float
    random_same_target: float

    @property
    def is_shuffled(self) -> bool:
        """Whether adjacent samples are no more similar than random ones."""
        return self.words <= self.random_words + _MARGIN and not self._targets_repeat

    @property
    def _targets_repeat(self) -> bool:
        return self.same_target > self.random_same_target + _MARGIN

    def describe(self) -> str:
        """Return the figures in words, each next to that of random pairs."""
        parts = [f"{self.words:.0%} of their words (random pairs {self.random_words:.0%})"]
        if self._targets_repeat or not self.words:
            parts.append(f"{self.same_target:.0%} of the time their target ({self.random_same_target:.0%})")
        return "neighbors share " + " and ".join(parts)


def warning(source: str, similarity: NeighborSimilarity, run_length: int, batch: int) -> str | None:
    """Describe what training on `batch` samples in runs of `run_length` loses. Return None for a shuffled source."""
    if similarity.is_shuffled or run_length == 1:
        return None
    num_runs = -(-batch // run_length)
    neighborhoods = "1 neighborhood" if num_runs == 1 else f"{num_runs} neighborhoods"
    own = (min(run_length, batch) - 1) / (batch - 1)
    return (
        f"{source} is not shuffled: {similarity.describe()}. With run_length {run_length} a batch of {batch} holds"
        f" {neighborhoods}, and {own:.0%} of a sample's in-batch negatives come from its own. Set"
        " data.mixture.run_length: 1 (more, smaller range requests), or shuffle the shards when they are written"
    )


def words_of(text: str) -> Words:
    """Return hashes of the distinct words of a text, at most of the first 64."""
    return frozenset(zlib.crc32(word.encode()) for word in text.lower().split()[:_MAX_WORDS])


def shard_similarity(samples: Sequence[tuple[str, Words]]) -> ShardSimilarity:
    """Measure the samples of a shard, (target, words) in stored order."""
    found = ShardSimilarity()
    last = len(samples) - 1
    for number, first in enumerate(_evenly_spaced(last, _MAX_PAIRS)):
        second = min(first + 1 + number % DISTANCE, last)
        (target, words), (other_target, other_words) = samples[first], samples[second]
        found.num_pairs += 1
        found.shared_words += _dice(words, other_words)
        found.same_target += target == other_target
    found.shared_words = round(found.shared_words, 6)
    found.pool = [(samples[i][0][:16], sorted(samples[i][1])) for i in _evenly_spaced(len(samples), _POOL)]
    return found


def source_similarity(shards: Sequence[ShardSimilarity]) -> NeighborSimilarity | None:
    """Combine the shards of a source, in order. Return None if it has too few samples for a result."""
    num_pairs = sum(shard.num_pairs for shard in shards)
    pooled = [shards[i] for i in _evenly_spaced(len(shards), _MAX_POOLED_SHARDS)]
    pool = [(target, frozenset(words)) for shard in pooled for target, words in shard.pool]
    if num_pairs < DISTANCE or len(pool) <= 2 * DISTANCE:
        return None
    rng = np.random.default_rng(0)
    first, second = rng.integers(len(pool), size=(2, _RANDOM_PAIRS))
    pairs = [(pool[a], pool[b]) for a, b in zip(first, second, strict=True) if a != b]
    return NeighborSimilarity(
        words=round(sum(shard.shared_words for shard in shards) / num_pairs, 4),
        random_words=round(sum(_dice(a[1], b[1]) for a, b in pairs) / len(pairs), 4),
        same_target=round(sum(shard.same_target for shard in shards) / num_pairs, 4),
        random_same_target=round(sum(a[0] == b[0] for a, b in pairs) / len(pairs), 4),
    )


def _evenly_spaced(size: int, count: int) -> list[int]:
    """Return at most `count` positions below `size`, evenly spaced from 0 on."""
    count = min(size, count)
    return [position * size // count for position in range(count)]


def _dice(words: Words, others: Words) -> float:
    total = len(words) + len(others)
    return 2 * len(words & others) / total if total else 0.0
