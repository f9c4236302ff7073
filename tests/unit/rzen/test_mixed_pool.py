"""Several datasets in one pool: what is relevant, what is left out, and how far the wrong kind of thing is found."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.benchmarks.join import join_datasets
from pipelines.benchmarks.types import Dataset, Query, Row
from pipelines.items.types import Item, content_id
from pipelines.samples import Input, Media
from rzen.evaluation.mixed_pool import MixedScores, compare_mixed, mixed_means, mixed_table, score_mixed_pool
from rzen.evaluation.vectors import Vectors

ROW = Row("toy", "held_out", "mixed", "toy", "global", "hit@1", None, "split")
WIDTH = 16


def text(words: str, instruction: str = "") -> Item:
    return Item(content_id([words, instruction]), words, Input(words), content_id(words), instruction)


def image(name: str, instruction: str = "") -> Item:
    media = (Media("image", f"{name}.jpg"),)
    return Item(content_id(["image", name, instruction]), name, Input("", media), content_id(name), instruction)


def dataset(name: str, answers: dict[str, Item], others: Sequence[Item] = ()) -> Dataset:
    """Queries by their words, each with its one answer; the answers and `others` are the candidates."""
    queries = [Query(text(words, f"Find {name}:"), {answer.id: 1.0}) for words, answer in answers.items()]
    return Dataset(replace(ROW, name=name), queries, [*answers.values(), *others], name)


def score(datasets: Sequence[Dataset], axis_of: dict[str, int | tuple[int, int]]) -> dict[str, MixedScores]:
    """Each query and candidate is the axis that its name has. Of two axes, it is nearer to the first."""
    joined = join_datasets(datasets)
    axes = np.eye(WIDTH, dtype=np.float32)

    def vector(name: str) -> NDArray[np.float32]:
        axis = axis_of[name]
        return (
            axes[axis] if isinstance(axis, int) else np.float32(0.8) * axes[axis[0]] + np.float32(0.6) * axes[axis[1]]
        )

    def vectors(items: Collection[Item]) -> Vectors:
        return Vectors.of([item.id for item in items], np.stack([vector(item.name) for item in items]))

    return score_mixed_pool(
        joined, vectors([query.item for query in joined.dataset.queries]), vectors([*candidates(joined.dataset)])
    )


def candidates(joined: Dataset) -> Iterator[Item]:
    return iter(joined.candidates)


def test_a_text_in_front_of_the_picture_that_was_asked_for_is_wrong() -> None:
    """Both own pools are answered perfectly; in the mixed one, the second caption finds the text that says the same."""
    pictures = dataset("images", {"a dog": image("dog"), "a cat": image("cat")})
    sentences = dataset("texts", {"one dog": text("dogs"), "one cat": text("cats")})
    axis = {"a dog": 0, "dog": 0, "one dog": 1, "dogs": 1, "a cat": (2, 3), "cat": 3, "cats": 2, "one cat": 2}
    found = score([pictures, sentences], axis)
    assert {name: one.means for name, one in found.items()} == {
        "images": {"hit@1": 0.5, "asked_modality@1": 0.5, "routed_hit@1": 1.0},
        "texts": {"hit@1": 1.0, "asked_modality@1": 1.0, "routed_hit@1": 1.0},
    }
    assert found["images"].num_candidates == 4
    assert found["images"].chance == {"hit@1": 1 / 4, "asked_modality@1": 2 / 4, "routed_hit@1": 1 / 2}
    assert [found["images"].candidates_of(metric) for metric in ("hit@1", "routed_hit@1")] == [4, 2]
    assert mixed_means(found)["mean"] == {"hit@1": 0.75, "asked_modality@1": 0.75, "routed_hit@1": 1.0}
    assert mixed_table({"m": found}).splitlines()[2] == "| images | 50.0 | 50.0 | 100.0 |"


def test_routed_score_keeps_wrong_candidates_of_the_asked_kind() -> None:
    """Another task's picture is still in the way, and a task whose candidates are of two kinds asks for both."""
    pictures = dataset("images", {"a dog": image("dog")}, [image("cat")])
    edits = dataset("edits", {"a wolf": image("wolf")}, [text("howl")])
    sentences = dataset("texts", {"one dog": text("dogs")})
    axis = {"a dog": 1, "dog": 0, "cat": 2, "wolf": 1, "a wolf": 3, "howl": 3, "one dog": 4, "dogs": 4}
    found = score([pictures, edits, sentences], axis)
    routed = {name: one.means["routed_hit@1"] for name, one in found.items()}
    assert routed == {"images": 0.0, "edits": 0.0, "texts": 1.0}
    assert {name: one.num_routed for name, one in found.items()} == {"images": 3, "edits": 5, "texts": 2}
    assert {name: one.chance["routed_hit@1"] for name, one in found.items()} == {
        "images": 1 / 3,
        "edits": 1 / 5,
        "texts": 1 / 2,
    }


def test_what_a_query_shows_is_left_out_of_the_chance_of_its_kind() -> None:
    pictures = dataset("images", {"a dog": image("dog")}, [image("cat"), image("a dog")])
    sentences = dataset("texts", {"one dog": text("a dog")})
    found = score([pictures, sentences], {"a dog": (0, 1), "dog": 1, "cat": 2, "one dog": (0, 1)})
    assert found["images"].chance["routed_hit@1"] == 1 / 2
    assert found["images"].means["routed_hit@1"] == 1.0


def test_equal_content_is_one_target_whatever_its_instruction() -> None:
    """The same picture is a target of two tasks, with another instruction and vector in each: either answers."""
    caption = dataset("captions", {"a dog": image("dog", "Understand it.")}, [image("cat")])
    edit = dataset("edits", {"a cat, but a dog": image("dog", "Compare it.")}, [image("cat")])
    joined = join_datasets([caption, edit])
    assert [item.name for item in candidates(joined.dataset)] == ["dog", "cat", "dog"]
    assert [len(query.relevance) for query in joined.dataset.queries] == [2, 2]
    assert joined.dataset.pick([2, 0]) == {0: caption.pick([0])[0], 2: edit.pick([0])[0]}
    assert joined.modalities == {"image": 3}


def test_what_a_query_shows_is_no_candidate_of_it() -> None:
    """The words of a query are a target of another dataset."""
    pictures = dataset("images", {"a dog": image("dog")})
    sentences = dataset("texts", {"one dog": text("a dog")})
    joined = join_datasets([pictures, sentences])
    assert [query.excluded for query in joined.dataset.queries] == [(text("a dog").id,), ()]
    assert score([pictures, sentences], {"a dog": 0, "one dog": 0, "dog": 1})["images"].means["hit@1"] == 1.0


def test_one_question_in_two_datasets_has_the_answers_of_both() -> None:
    first, second = dataset("x", {"a dog": image("dog")}), dataset("x", {"a dog": image("puppy")})
    second = replace(second, row=replace(second.row, name="y"), corpus="y")
    found = score([first, second], {"a dog": 1, "puppy": 1, "dog": 2})
    assert [one.means["hit@1"] for one in found.values()] == [1.0, 1.0]


def test_a_corpus_that_datasets_share_is_there_once() -> None:
    corpus = [image(str(number)) for number in range(4)]
    datasets = [
        replace(dataset(name, {f"{name} {n}": corpus[n] for n in range(2)}), candidates=corpus, corpus="same")
        for name in "ab"
    ]
    joined = join_datasets(datasets)
    assert len(joined.pool.ids) == 4
    assert {name: places.tolist() for name, places in joined.places.items()} == {"a": [0, 1], "b": [2, 3]}


def test_difference_of_two_models_is_paired_by_query() -> None:
    some = score(
        [dataset("images", {"a dog": image("dog")}), dataset("texts", {"one dog": text("dogs")})],
        {"a dog": 0, "dog": 0, "one dog": 1, "dogs": 1},
    )["images"]

    def scores(hits: list[float]) -> dict[str, MixedScores]:
        other = [1 - hit for hit in hits]
        by_query = {"hit@1": hits, "asked_modality@1": other, "routed_hit@1": [0.0] * len(hits)}
        return {"images": replace(some, by_query={name: np.array(values) for name, values in by_query.items()})}

    differences = compare_mixed(scores([0, 0, 1, 1] * 50), scores([0, 1, 1, 1] * 50))
    found = differences["hit@1"]["images"]
    assert (found.mean, found.num_queries) == (0.25, 200)
    assert 0.18 < found.low < 0.25 < found.high < 0.32
    asked = differences["asked_modality@1"]["images"]
    assert (asked.mean, asked.low, asked.high) == (-found.mean, -found.high, -found.low)
    assert differences["routed_hit@1"]["images"].high == 0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_scores_do_not_depend_on_the_order_of_the_datasets(order: tuple[int, int]) -> None:
    datasets = [
        dataset("images", {"a dog": image("dog"), "a cat": image("cat")}),
        dataset("texts", {"one dog": text("dogs")}),
    ]
    axis = {"a dog": 0, "dog": 0, "one dog": 1, "dogs": 3, "a cat": 1, "cat": 1}
    found = score([datasets[place] for place in order], axis)
    assert found["images"].by_query["hit@1"].tolist() == [1, 1]
    assert found["texts"].by_query["asked_modality@1"].tolist() == [0]
