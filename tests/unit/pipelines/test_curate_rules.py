"""Planted duplicates, leaks and misfits are found, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from pipelines.curate.exact import find_exact
from pipelines.curate.features import FAMILIES, FileInputs
from pipelines.curate.filters import find_filtered
from pipelines.curate.leakage import find_leaks
from pipelines.curate.load import load_evaluation, load_samples
from pipelines.curate.near import find_near
from pipelines.curate.pictures import picture_of
from pipelines.curate.samples import Samples, Verdicts
from pipelines.curate.semantic import find_misaligned, find_semantic
from pipelines.curate.settings import (
    AlignmentRule,
    ExactRule,
    FilterRule,
    LeakageRule,
    MediaSimilarity,
    NearRule,
    SemanticRule,
)
from pipelines.curate.similarity import media_similar
from pipelines.curate.tables import MediaTable
from pipelines.curate.texts import jaccard, normalized, pieces
from pipelines.errors import UserError
from pipelines.items.types import Item
from pipelines.samples import FileRef, Input, Media
from pipelines.storage.location import open_store
from pipelines.synthetic.scenes import all_scenes, draw_scene, neighbors
from tests.curation import CHANGES, SETTINGS, Pair, edited, encoded, featured, loaded, publish, scenes


def everything(samples: Samples) -> np.ndarray:
    return np.ones(len(samples), np.bool_)


def score(found: set[int], planted: set[int]) -> tuple[float, float]:
    """Recall and precision."""
    return len(found & planted) / len(planted), len(found & planted) / len(found)


def test_planted_near_duplicates_are_found(tmp_path: Path) -> None:
    """5% of 400 pictures are copies of others: encoded again, resized, cropped, with edited captions."""
    rng = Random(0)
    drawn = scenes(380)
    pairs: list[Pair] = [(text, encoded(image, "PNG")) for text, image in drawn]
    for number in range(20):
        text, image = drawn[rng.randrange(380)]
        pairs.append((edited(text, rng) if number % 2 else text, CHANGES[number % 5](image)))
    samples = loaded(tmp_path, pictures=pairs)
    drops = find_near(samples, everything(samples), NearRule(), "all")
    # A larger copy stays, and its original is left out.
    groups = {frozenset((drop.sample, drop.like)) for drop in drops}
    copies = {number for group in groups for number in group if number >= 380}
    recall, precision = score(copies, set(range(380, 400)))
    assert recall >= 0.95
    assert precision == 1.0
    assert len(drops) == len(copies)
    assert {drop.reason for drop in drops} == {"near_media"}


def test_near_duplicates_are_those_of_a_comparison_of_all_pairs(tmp_path: Path) -> None:
    rng = Random(1)
    drawn = scenes(40, seed=1)
    pairs: list[Pair] = [(text, CHANGES[number % 5](image)) for number, (text, image) in enumerate(drawn * 2)]
    pairs[50:60] = [("something else", target) for _, target in pairs[50:60]]
    rng.shuffle(pairs)
    samples = loaded(tmp_path, pictures=pairs)
    for rule in (NearRule(), NearRule(of="target")):
        drops = find_near(samples, everything(samples), rule, "all")
        media, texts = samples.media, [samples.texts.texts[place].as_py() for place in range(160)]
        order = np.argsort(-(media.width * media.height)[1::2], kind="stable")
        kept: list[int] = []
        for sample in order.tolist():
            similar = [
                other
                for other in kept
                if media_similar(
                    media, *(np.array([2 * n + 1]) for n in (other,)), media, np.array([2 * sample + 1]), rule.media
                )[0]
                and (rule.of == "target" or jaccard(pieces(texts[2 * other]), pieces(texts[2 * sample])) >= 0.8)
            ]
            if not similar:
                kept.append(sample)
        assert {drop.sample for drop in drops} == set(range(80)) - set(kept)
        assert 25 < len(drops) <= 40


def test_near_duplicate_texts(tmp_path: Path) -> None:
    rng = Random(2)
    words = [f"{first}{second}" for first in "bdfgklmn" for second in ("ara", "elo", "iru", "oma", "uti")]
    texts = [" ".join(rng.choices(words, k=40)) for _ in range(190)]
    pairs: list[Pair] = [(text, f"answer {number}") for number, text in enumerate(texts)]
    pairs += [(edited(texts[number], rng, 2), f"Answer  {number}!") for number in range(0, 100, 10)]
    pairs += [(texts[number], f"a different reply, {'no' if number % 2 else 'yes'}") for number in range(5)]
    samples = loaded(tmp_path, texts=pairs)
    drops = find_near(samples, everything(samples), NearRule(), "all")
    assert {(drop.sample, drop.like) for drop in drops} == {(190 + n // 10, n) for n in range(0, 100, 10)}
    assert {drop.reason for drop in drops} == {"near_text"}
    plain = [samples.texts.texts[2 * place].as_py() for place in range(len(pairs))]
    assert plain[0] == normalized(texts[0])


def test_hard_negatives_are_no_duplicates(tmp_path: Path) -> None:
    """Scenes that differ in one color, and answers that differ in one word of an equal question."""
    rng = Random(3)
    pictures: list[Pair] = []
    for scene in rng.sample(all_scenes(), 20):
        for one in (scene, *rng.sample(neighbors(scene), 4)):
            pictures.append((one.wordings()[0], encoded(draw_scene(one, 96, Random(str(one))))))
    question = "which of these two animals in the long picture of the old farm is larger than the other one"
    answers: list[Pair] = [(question, word) for word in ("cat", "dog", "cow", "pig")]
    samples = loaded(tmp_path, pictures=pictures, answers=answers)
    assert find_near(samples, everything(samples), NearRule(), "all") == []
    assert find_near(samples, everything(samples), NearRule(of="target"), "all") == []


def test_blank_pictures_cost_little(tmp_path: Path) -> None:
    blank = encoded(Image.new("RGB", (64, 64), "white"), "PNG")
    samples = loaded(tmp_path, pictures=[("a blank page", blank)] * 60)
    drops = find_near(samples, everything(samples), NearRule(), "all")
    assert [(drop.sample, drop.like) for drop in drops] == [(number, 0) for number in range(1, 60)]


def test_exact_duplicates(tmp_path: Path) -> None:
    red, blue = (encoded(Image.new("RGB", (8, 8), name)) for name in ("red", "blue"))
    one: list[Pair] = [("a", red), ("b", red), ("a", red), ("a", blue), ("c", "dog"), ("d", "dog")]
    two: list[Pair] = [("a", red), ("z", blue), ("c", "dog")]
    samples = loaded(tmp_path, one=one, two=two)
    keep = everything(samples)

    def found(rule: ExactRule, within: str = "all") -> list[tuple[int, object, str]]:
        return [(drop.sample, drop.like, drop.reason) for drop in find_exact(samples, keep, rule, within)]

    assert found(ExactRule()) == [(2, 0, "exact_pair"), (6, 0, "exact_pair"), (8, 4, "exact_pair")]
    assert found(ExactRule(), "source") == [(2, 0, "exact_pair")]
    by_target = [(number, like, "exact_target") for number, like in ((1, 0), (2, 0), (6, 0), (7, 3))]
    assert found(ExactRule(of="target")) == [*by_target, (8, 4, "exact_pair")]
    keep[0] = False
    assert found(ExactRule())[0] == (6, 2, "exact_pair")


def test_limits(tmp_path: Path) -> None:
    wide = encoded(Image.new("RGB", (90, 10), "red"))
    german = "Der alte Hund läuft langsam über die nasse Straße nach Hause."
    english = "The old dog slowly walks home across the wet street."
    pairs: list[Pair] = [
        ("fine", encoded(Image.new("RGB", (40, 40), "red"))),
        ("small", encoded(Image.new("RGB", (40, 20), "red"))),
        ("wide", wide),
        ("no picture", b"not a picture"),
        (german, "a text"),
        (english, "a text"),
        ("x", "y" * 500),
    ]
    samples = loaded(tmp_path, some=pairs)
    rule = FilterRule(min_side_px=30, max_aspect_ratio=3, min_text_chars=2, max_text_chars=400, languages=["en"])
    drops = {drop.sample: (drop.reason, drop.value) for drop in find_filtered(samples, everything(samples), rule)}
    assert {sample: reason for sample, (reason, _) in drops.items()} == {
        1: "small_media",
        2: "small_media",
        3: "bad_media",
        4: "other_language",
        6: "short_text",
    }
    assert drops[1][1] == 20
    rule = FilterRule(bad_media=False, max_aspect_ratio=3)
    assert [(drop.sample, drop.reason) for drop in find_filtered(samples, everything(samples), rule)] == [
        (2, "long_media")
    ]
    assert find_filtered(samples, everything(samples), FilterRule())[0].other == "unsupported_format"


def test_planted_leaks_are_found(tmp_path: Path) -> None:
    """1% of 400 samples show a picture of the held-out split, and some have its words."""
    drawn, other = scenes(396), scenes(60, seed=9)
    passage = " ".join(f"word{number}" for number in range(30))
    template = "given the image please answer with one word only:"
    held_out: list[Pair] = [(f"scene {n}", encoded(image, "PNG")) for n, (_, image) in enumerate(other)]
    held_out += [(f"{template} question {number}", "yes") for number in range(20)]
    held_out += [(passage, "a short passage of words"), ("how tall is it", "dog")]
    pairs: list[Pair] = [(text, encoded(image)) for text, image in drawn]
    pairs += [("other words", CHANGES[number](other[number][1])) for number in range(3)]
    pairs += [("equal bytes", held_out[7][1])]
    pairs += [
        (f"intro {passage[40:120]} outro", "an answer"),
        ("a question", "How  tall is IT?"),
        (f"{template} something else", "dog"),
        ("what is it", "yes"),
    ]
    inputs, evaluation = publish(tmp_path, {"some": pairs}), publish(tmp_path, {"held": held_out}, "held_out")
    featured(tmp_path, [*inputs, *evaluation])
    cache = open_store(str(tmp_path / "cache"))
    samples = load_samples(inputs, FAMILIES, SETTINGS, cache)
    rule = LeakageRule(ngram_words=8, min_words=4)
    drops = find_leaks(
        samples, everything(samples), lambda: load_evaluation([("h", evaluation)], SETTINGS, cache), rule
    )
    found = {drop.sample: (drop.reason, drop.other) for drop in drops}
    assert found == {
        396: ("leak_media", "h/000000"),
        397: ("leak_media", "h/000001"),
        398: ("leak_media", "h/000002"),
        399: ("leak_file", "h/000007"),
        400: ("leak_text", "h/000080"),
        401: ("leak_text", "h/000081"),
    }
    assert next(drop.like for drop in drops if drop.sample == 401) == (evaluation[1], 2 * 31)
    picky = LeakageRule(ngram_words=8, min_words=4, max_texts=100)
    drops = find_leaks(
        samples, everything(samples), lambda: load_evaluation([("h", evaluation)], SETTINGS, cache), picky
    )
    assert {drop.sample for drop in drops} == {*found, 402}


def test_leaks_into_benchmark_files(tmp_path: Path) -> None:
    (text, image), *_ = scenes(3)
    (tmp_path / "a.png").write_bytes(encoded(image, "PNG"))
    picture = Item("0" * 32, "a.png", Input("", (Media("image", "q0.png"),)), "1" * 32)
    picture.files["q0.png"] = FileRef(str(tmp_path / "a.png"))
    gone = Item("2" * 32, "b.png", Input("", (Media("image", "q0.png"),)), "3" * 32)
    gone.files["q0.png"] = FileRef(str(tmp_path / "b.png"))
    evaluation = FileInputs((gone, Item("4" * 32, "t", Input(text), "5" * 32), picture))
    pairs: list[Pair] = [("other", encoded(image, quality=50)), (text, "another"), ("third", "none")]
    inputs = publish(tmp_path, {"some": pairs})
    featured(tmp_path, [*inputs, evaluation])
    cache = open_store(str(tmp_path / "cache"))
    samples = load_samples(inputs, FAMILIES, SETTINGS, cache)
    drops = find_leaks(
        samples,
        everything(samples),
        lambda: load_evaluation([("bench", [evaluation])], SETTINGS, cache),
        LeakageRule(),
    )
    assert [(drop.sample, drop.reason, drop.other, drop.like) for drop in drops] == [
        (1, "leak_text", "bench/t", (evaluation, 1)),
        (0, "leak_media", "bench/a.png", (evaluation, 2)),
    ]


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def test_misaligned_pairs_are_the_lowest_of_each_source(tmp_path: Path) -> None:
    samples = loaded(tmp_path, a=[(f"a{n}", "x") for n in range(10)], b=[(f"b{n}", "y") for n in range(20)])
    cosines = np.r_[np.linspace(0.1, 0.9, 10), np.linspace(0.5, 0.99, 20)].astype(np.float32)
    cosines[9] = np.nan
    keep = everything(samples)
    keep[0] = False
    found = find_misaligned(samples, keep, cosines, AlignmentRule(quantile=0.25))
    assert [drop.sample for drop in found] == [1, 2, 10, 11, 12, 13, 14]
    assert found[0].value == cosines[1]
    found = find_misaligned(samples, keep, cosines, AlignmentRule(quantile=0.0, min_cosine=0.3))
    assert [drop.sample for drop in found] == [1, 2]


def test_semantic_duplicates_are_those_of_the_paper(tmp_path: Path) -> None:
    samples = loaded(tmp_path, a=[(f"a{n}", f"x{n}") for n in range(60)])
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(60, 12)))
    vectors[50:] = unit(vectors[:10] + 0.02 * rng.normal(size=(10, 12)))
    vectors[5] = 0  # without a vector
    keep = everything(samples)
    rule = SemanticRule(cosine=0.95, cluster_samples=100)
    for kept, sign in (("farthest", 1), ("nearest", -1)):
        drops, _, _ = find_semantic(samples, keep, vectors, rule.model_copy(update={"keep": kept}), "all", seed=0)
        known = np.flatnonzero(vectors.any(axis=1))
        center = unit(vectors[known].mean(axis=0, keepdims=True))[0]  # one cluster: k-means has converged at once
        order = known[np.argsort(sign * (vectors[known] @ center), kind="stable")]
        scores = np.triu(vectors[order] @ vectors[order].T, k=1)
        expected = set(order[scores.max(axis=0) > 0.95].tolist())
        assert {drop.sample for drop in drops} == expected
        assert len(expected) == 9
    full = SemanticRule(cosine=None, max_per_cluster=7, cluster_samples=100)
    capped, _, _ = find_semantic(samples, keep, vectors, full, "all", 0)
    assert len(capped) == 59 - 7
    other, _, _ = find_semantic(samples, keep, vectors, full, "all", 1)
    assert {drop.sample for drop in capped} != {drop.sample for drop in other}


def test_samples_of_full_clusters_have_a_weight_instead(tmp_path: Path) -> None:
    samples = loaded(tmp_path, a=[("q", str(n)) for n in range(20)], b=[("r", str(n)) for n in range(10)])
    vectors = np.zeros((30, 2), np.float32)
    vectors[:20, 0], vectors[20:, 1] = 1, 1
    vectors[3] = 0  # without a vector
    verdicts = Verdicts.of(30)
    rule = SemanticRule(cosine=None, max_per_cluster=10, cluster_samples=100, full_clusters="weigh")
    drops, verdicts.weight, verdicts.full_clusters = find_semantic(samples, verdicts.keep, vectors, rule, "source", 0)
    assert drops == []
    assert verdicts.weight.tolist() == pytest.approx([1.0 if n == 3 else 10 / 19 for n in range(20)] + [1.0] * 10)
    assert verdicts.weighted(samples) == {"a": (19, 10.0)}
    (cluster,) = verdicts.full_clusters
    assert cluster[:3] == (19, 10 / 19, ("a",))
    assert len(set(cluster.examples)) == 6
    assert set(cluster.examples) < {*range(20)} - {3}


def test_the_first_reason_counts(tmp_path: Path) -> None:
    samples = loaded(tmp_path, a=[("q", "x")] * 3, b=[("r", "y")])
    verdicts = Verdicts.of(4)
    verdicts.add(find_exact(samples, verdicts.keep, ExactRule(), "all"))
    verdicts.add(find_filtered(samples, verdicts.keep, FilterRule(min_text_chars=2)))
    assert verdicts.counts(samples) == {"exact_pair": {"a": 2}, "short_text": {"a": 1, "b": 1}}
    assert not verdicts.keep.any()


def test_a_damaged_sample_is_counted(tmp_path: Path) -> None:
    inputs = publish(tmp_path, {"a": [(f"query {n}", f"target {n}") for n in range(3)]})
    (shard,) = (tmp_path / "data/train/a").glob("*.tar")
    damaged = bytearray(shard.read_bytes())
    damaged[damaged.index(b"query 1")] ^= 1
    shard.write_bytes(damaged)
    featured(tmp_path, inputs)
    samples = load_samples(inputs, FAMILIES, SETTINGS, open_store(str(tmp_path / "cache")))
    (drop,) = find_filtered(samples, everything(samples), FilterRule())
    assert (drop.sample, drop.reason, drop.other) == (1, "bad_media", "damaged_shard")
    assert not find_exact(samples, everything(samples), ExactRule(), "all")


def test_pages_must_agree_everywhere() -> None:
    """A page with one changed line is another page, and an image may be the picture of a page."""
    page = np.full((320, 320, 3), 255, np.uint8)
    page[20:300:20, 20:280] = 0
    changed = page.copy()
    changed[100:110, 30:250] = 60
    pictures = [picture_of(frame) for frame in (page, changed, page)]
    bounds = np.arange(4)
    table = MediaTable(
        np.array(["d", "d", "i"], "S16"),
        np.zeros(3, np.uint64),
        bounds[:3],
        bounds[:3],
        bounds,
        np.array([picture.hash for picture in pictures], np.uint64),
        np.stack([picture.grid.reshape(-1) for picture in pictures]),
        {},
    )
    left, right = np.array([0, 0, 0]), np.array([0, 1, 2])
    rule = MediaSimilarity(hash_bits=11, color=50, page_color=50)
    assert media_similar(table, left, table, right, rule).tolist() == [True, False, False]
    assert media_similar(table, left, table, right, rule, any_kind=True).tolist() == [True, False, True]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_damaged_feature_file_is_one_error(tmp_path: Path, family: str) -> None:
    inputs = publish(tmp_path, {"a": [("q", "t")]})
    featured(tmp_path, inputs)
    (file,) = (tmp_path / "cache" / family).iterdir()
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match="delete the file"):
        load_samples(inputs, FAMILIES, SETTINGS, open_store(str(tmp_path / "cache")))


def test_a_dataset_that_was_replaced_meanwhile_is_one_error(tmp_path: Path) -> None:
    inputs = publish(tmp_path, {"a": [("q", "t")]})
    publish(tmp_path, {"a": [("q", "other")]})
    with pytest.raises(UserError, match="was replaced while it was read"):
        featured(tmp_path, inputs)
