"""How similar adjacent samples are: words and targets, against random pairs."""

import hashlib

import pytest

from pipelines.shards.shuffle_check import (
    NeighborSimilarity,
    shard_similarity,
    source_similarity,
    warning,
    words_of,
)
from tests.external import img2dataset_samples


def texts_of(captions: list[str]) -> list[tuple[str, frozenset[int]]]:
    return [(hashlib.sha256(caption.encode()).hexdigest(), words_of(caption)) for caption in captions]


def test_adjacent_samples_are_compared_with_random_pairs() -> None:
    captions = [sample["txt"] for sample in img2dataset_samples(72)]
    alike = source_similarity([shard_similarity(texts_of(captions[start : start + 24])) for start in (0, 24, 48)])
    shuffled = source_similarity([shard_similarity(texts_of(captions[offset::3])) for offset in range(3)])
    assert alike is not None
    assert shuffled is not None
    assert alike.words > 0.8
    assert alike.random_words == pytest.approx(0.33, abs=0.1)
    assert not alike.is_shuffled
    interleaved = [captions[24 * (n % 3) + n // 3] for n in range(72)]
    mixed = source_similarity([shard_similarity(texts_of(interleaved))])
    assert mixed is not None
    assert mixed.is_shuffled
    assert source_similarity([shard_similarity(texts_of(captions[:5]))]) is None


def test_the_warning_gives_the_figures() -> None:
    alike = NeighborSimilarity(words=0.41, random_words=0.06, same_target=0.0, random_same_target=0.0)
    assert warning("web", alike, 16, 256) == (
        "web is not shuffled: neighbors share 41% of their words (random pairs 6%). With run_length 16 a batch of 256"
        " holds 16 neighborhoods, and 6% of a sample's in-batch negatives come from its own. Set"
        " data.mixture.run_length: 1 (more, smaller range requests), or shuffle the shards when they are written"
    )
    assert warning("web", alike, 1, 256) is None
    assert warning("web", NeighborSimilarity(0.07, 0.06, 0.0, 0.0), 16, 256) is None
    same = NeighborSimilarity(words=0.0, random_words=0.0, same_target=0.8, random_same_target=0.01)
    assert "80% of the time their target (1%)" in str(warning("web", same, 16, 256))


def targets_only(targets: list[str]) -> NeighborSimilarity:
    """Similarity of a shard whose samples share no word."""
    samples = [(target, words_of(f"word{number}")) for number, target in enumerate(targets)]
    similarity = source_similarity([shard_similarity(samples)])
    assert similarity is not None
    return similarity


def test_samples_in_order_of_their_target_are_not_shuffled() -> None:
    # 61 samples give 60 pairs (0, 1), (1, 3), (2, 5), ... (59, 60), in turn 1 to 15 apart. The 8 that begin at 23 to
    # 30 cross from one target to the other.
    ordered = targets_only(["a"] * 31 + ["b"] * 30)
    assert ordered.same_target == pytest.approx(52 / 60, abs=1e-4)
    assert ordered.random_same_target == pytest.approx(0.49, abs=0.03)  # exactly (31 * 30 + 30 * 29) / (61 * 60)
    assert (ordered.words, ordered.random_words) == (0.0, 0.0)
    assert not ordered.is_shuffled
    assert ordered.describe().endswith("(random pairs 0%) and 87% of the time their target (48%)")


def test_samples_in_turn_of_their_target_are_shuffled() -> None:
    # Of three targets in turn, only samples 3, 6, 9, 12 or 15 apart have the same one: 19 of the 60 pairs.
    in_turn = targets_only(list("abc") * 20 + ["a"])
    assert in_turn.same_target == pytest.approx(19 / 60, abs=1e-4)
    assert in_turn.random_same_target == pytest.approx(1 / 3, abs=0.03)
    assert in_turn.is_shuffled
