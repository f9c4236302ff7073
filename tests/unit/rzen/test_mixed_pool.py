"""Several datasets in one pool: what is relevant, what is left out, and how far the wrong kind of thing is found."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

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


def score(datasets: Sequence[Dataset], axis_of: dict[str, int]) -> dict[str, MixedScores]:
    """Each query and candidate is the axis that its name has."""
    joined = join_datasets(datasets)
    axes = np.eye(WIDTH, dtype=np.float32)

    def vectors(items: Collection[Item]) -> Vectors:
        return Vectors.of([item.id for item in items], axes[[axis_of[item.name] for item in items]])

    return score_mixed_pool(
        joined, vectors([query.item for query in joined.dataset.queries]), vectors([*candidates(joined.dataset)])
    )


def candidates(joined: Dataset) -> Iterator[Item]:
    return iter(joined.candidates)


def test_a_text_in_front_of_the_picture_that_was_asked_for_is_wrong() -> None:
    """Both own pools are answered perfectly; in the mixed one, the second caption finds the text that says the same."""
    pictures = dataset("images", {"a dog": image("dog"), "a cat": image("cat")})
    sentences = dataset("texts", {"one dog": text("dogs"), "one cat": text("cats")})
    axis = {"a dog": 0, "dog": 0, "one dog": 1, "dogs": 1, "a cat": 2, "cat": 3, "cats": 2, "one cat": 2}
    found = score([pictures, sentences], axis)
    assert {name: one.means for name, one in found.items()} == {
        "images": {"hit@1": 0.5, "asked_modality@1": 0.5},
        "texts": {"hit@1": 1.0, "asked_modality@1": 1.0},
    }
    assert found["images"].num_candidates == 4
    assert found["images"].chance == {"hit@1": 1 / 4, "asked_modality@1": 2 / 4}
    assert mixed_means(found)["mean"] == {"hit@1": 0.75, "asked_modality@1": 0.75}
    assert mixed_table({"m": found}).splitlines()[2] == "| images | 50.0 | 50.0 |"


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
        return {"images": replace(some, by_query={"hit@1": np.array(hits), "asked_modality@1": np.array(hits)})}

    found = compare_mixed(scores([0, 0, 1, 1] * 50), scores([0, 1, 1, 1] * 50))["images"]
    assert (found.mean, found.num_queries) == (0.25, 200)
    assert 0.18 < found.low < 0.25 < found.high < 0.32


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
