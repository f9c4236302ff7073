"""Indices that propose pairs find what a comparison of all pairs finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.curate import hamming, semantic
from pipelines.curate.hamming import near_matches, near_pairs
from pipelines.curate.near import _band_pairs
from pipelines.curate.texts import jaccard, language_of, min_hashes, ngram_hashes, normalized, pieces, words


def close_hashes(count: int, seed: int) -> np.ndarray:
    """Random hashes, half of which are earlier ones with up to 14 bits flipped."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 1 << 63, count, dtype=np.uint64) * np.uint64(2) + rng.integers(0, 2, count, dtype=np.uint64)
    for place in range(count // 2, count):
        flipped = rng.choice(64, rng.integers(0, 15), replace=False)
        found[place] = found[rng.integers(0, place)] ^ np.bitwise_or.reduce(np.uint64(1) << flipped.astype(np.uint64))
    return found


@pytest.mark.parametrize("max_bits", [0, 3, 4, 8, 11])
def test_near_hashes_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch, max_bits: int) -> None:
    monkeypatch.setattr(hamming, "_CHUNK_PAIRS", 7)  # cuts in the middle of a bucket
    hashes, others = close_hashes(120, 0), close_hashes(50, 1)
    others[:25] = hashes[40:65] ^ np.uint64(1 << 20)
    pairs = [pair for left, right in near_pairs(hashes, max_bits) for pair in zip(left, right, strict=True)]
    bits = np.bitwise_count(hashes[:, None] ^ hashes)
    expected = {(i, j) for i, j in np.argwhere(bits <= max_bits) if i < j}
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == expected
    assert max_bits < 8 or len(expected) > 20
    matches = [pair for left, right in near_matches(hashes, others, max_bits) for pair in zip(left, right, strict=True)]
    assert len(matches) == len(set(matches))
    assert set(matches) == {tuple(pair) for pair in np.argwhere(np.bitwise_count(hashes[:, None] ^ others) <= max_bits)}


def test_no_hashes_have_no_pairs() -> None:
    none = np.zeros(0, np.uint64)
    assert not list(near_pairs(none, 8))
    assert not list(near_matches(none, np.zeros(3, np.uint64), 8))


@given(st.lists(st.integers(0, 3), max_size=12))
@settings(max_examples=30, deadline=None)
def test_rows_of_a_bucket_are_paired_once(values: list[int]) -> None:
    rows = np.repeat(np.array(values, np.uint32)[:, None], 6, axis=1).reshape(-1, 6)
    found = _band_pairs(rows)
    pairs = [(int(pair) // max(1, len(values)), int(pair) % max(1, len(values))) for pair in found]
    assert sorted(pairs) == [
        (i, j) for i in range(len(values)) for j in range(i + 1, len(values)) if values[i] == values[j]
    ]


def test_min_hash_estimates_the_share_of_common_pieces() -> None:
    one, other = "the quick brown fox jumps over the lazy dog " * 2, "the quick brown cat jumps over the lazy dog " * 2
    one, other, both = normalized(one), normalized(other), normalized(one) + normalized(other)
    signatures = min_hashes([one, other, "", one])
    share = jaccard(pieces(one), pieces(other))
    assert share == pytest.approx(41 / 55, abs=0.1)
    assert (signatures[0] == signatures[1]).mean() == pytest.approx(share, abs=0.15)
    assert (signatures[0] == signatures[3]).all()
    assert (signatures[2] == 2**32 - 1).all()
    # The union of two sets of pieces, but for those that cross the seam.
    assert (np.minimum(signatures[0], signatures[1]) == min_hashes([both])[0]).mean() > 0.85


def test_words_in_a_row() -> None:
    text = "One two three, FOUR five six."
    assert len(ngram_hashes(text, 4, 2)) == 3
    assert set(ngram_hashes("three four five six", 4, 2)) < set(ngram_hashes(text, 4, 2))
    assert ngram_hashes("two Three!", 4, 2) == ngram_hashes("two three", 4, 2)
    assert ngram_hashes("dog", 4, 2) == []
    assert words("東京タワー 2024") == ["東", "京", "タ", "ワ", "ー", "2024"]
    assert normalized("Ｆｕｌｌ  WIDTH\n— straße") == "full width strasse"


def test_languages() -> None:
    assert language_of("Der Hund läuft über die Straße und bellt laut.")[0] == "de"
    language, confidence = language_of("The dog runs across the street and barks loudly.")
    assert (language, confidence > 0.9) == ("en", True)


def test_the_nearest_vector_before_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantic, "_ROWS", 7)
    vectors = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest, cosine = semantic.nearest_before(vectors)
    scores = vectors @ vectors.T
    for row in range(1, 40):
        assert nearest[row] == scores[row, :row].argmax()
        assert cosine[row] == pytest.approx(scores[row, :row].max())
    assert (nearest[0], cosine[0]) == (0, -1)


def test_each_vector_is_in_the_cluster_of_the_nearest_center() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(100, 16)).astype(np.float32) + 3 * np.eye(4, 16, dtype=np.float32)[np.arange(100) % 4]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cluster, centrality = semantic.cluster_vectors(vectors, 4, seed=3)
    centers = np.stack([vectors[cluster == number].mean(axis=0) for number in range(4)])
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    assert (cluster == (vectors @ centers.T).argmax(axis=1)).all()
    assert centrality == pytest.approx((vectors @ centers.T).max(axis=1), abs=1e-5)
    again, _ = semantic.cluster_vectors(vectors, 4, seed=3)
    assert (again == cluster).all()
