"""Gradient caching against the whole batch at once: same vectors, same gradients, memory of one chunk, same dropout."""

from __future__ import annotations

import weakref
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rzen.config import LoraConfig, ObjectiveConfig
from rzen.inputs.pairs import EncodedPairs, PairEncoder
from rzen.inputs.processor import Processor
from rzen.model import chunks
from rzen.model.backbone import load_backbone
from rzen.model.chunks import chunks_of
from rzen.model.embedding_model import EmbeddingModel
from rzen.model.lora import add_lora
from rzen.objective.loss import Objective
from rzen.training.step import EmbeddingLearner
from tests.parity.test_training_step import pairs_by_rank
from tests.tiny import PROMPT, tiny_checkpoint, tiny_model

LONGEST, ALL = 61, 10**6  # tokens
SIZES = {"one input": 1, "about three": 3 * LONGEST, "all but one": 12 * LONGEST, "all": ALL}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pairs(model_dir: str) -> EncodedPairs:
    """Six pairs with three mined negatives: text, images, videos."""
    encoder = PairEncoder(Processor(model_dir, PROMPT))
    return encoder.collate([pair for share in pairs_by_rank(model_dir) for pair in share])


def learner_of(
    model_dir: str, chunk_tokens: int | None, dropout: float = 0.0, checkpointing: bool = False
) -> EmbeddingLearner:
    config = tiny_model(model_dir).model_copy(update={"gradient_checkpointing": checkpointing})
    backbone: Any = load_backbone(model_dir, config)
    if dropout:
        backbone = add_lora(backbone, LoraConfig(rank=3, dropout=dropout), seed=0)
        shake_lora(backbone)
    learner = EmbeddingLearner(
        EmbeddingModel(backbone, Processor(model_dir, PROMPT).layout), Objective(ObjectiveConfig(), ["a"])
    )
    learner.chunk_tokens = chunk_tokens
    return learner.train()


def shake_lora(backbone: nn.Module) -> None:
    """B starts at zero, which would hide what dropout does to its input."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def outcome(learner: EmbeddingLearner, pairs: EncodedPairs) -> dict[str, Tensor]:
    """Loss and every gradient; `tokens` and `padding_fraction` too."""
    torch.manual_seed(0)
    loss, stats = learner(pairs, [("a", len(pairs))], step=0)
    loss.backward()
    gradients = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **{name: stats[name] for name in ("tokens", "padding_fraction")}, **gradients}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    trained = [name for name in expected if name not in ("loss", "tokens", "padding_fraction")]
    assert set(found) == set(expected)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-6, atol=0)
    scale = max(float(expected[name].norm()) for name in trained)
    for name in trained:
        error = float((found[name] - expected[name]).norm())
        # Biases of keys have no effect on a softmax: their gradients are rounding alone, hence a scale for all. The
        # gradient of a temperature is a difference of terms as large as the loss.
        least = float(expected["loss"]) if name.startswith("objective.") else 1e-3 * scale
        assert error < 1e-5 * max(float(expected[name].norm()), least), (name, error)


@pytest.fixture(scope="module")
def whole(model_dir: str, pairs: EncodedPairs) -> dict[str, Tensor]:
    return outcome(learner_of(model_dir, None), pairs)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("size", SIZES)
def test_chunks_of_any_size_give_the_gradient_of_the_whole(
    model_dir: str, pairs: EncodedPairs, whole: dict[str, Tensor], size: str, checkpointing: bool
) -> None:
    assert_equal(outcome(learner_of(model_dir, SIZES[size], checkpointing=checkpointing), pairs), whole)


def test_vectors_without_a_gradient_in_the_second_pass_would_show(
    model_dir: str, pairs: EncodedPairs, whole: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: one chunk of several is cut off from the loss."""
    calls = count()
    monkeypatch.setattr(
        chunks,
        "checkpoint",
        lambda *arguments, **options: (
            checkpoint(*arguments, **options).detach() if next(calls) == 1 else checkpoint(*arguments, **options)
        ),
    )
    with pytest.raises(AssertionError):
        assert_equal(outcome(learner_of(model_dir, SIZES["about three"]), pairs), whole)


def test_dropout_is_replayed(model_dir: str, pairs: EncodedPairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of the loss that was computed: it equals keeping every chunk's graph."""
    size = SIZES["about three"]
    found = outcome(learner_of(model_dir, size, dropout=0.3), pairs)
    monkeypatch.setattr(chunks, "checkpoint", lambda function, *arguments, **_: function(*arguments))
    assert_equal(found, outcome(learner_of(model_dir, size, dropout=0.3), pairs))
    assert float(found["loss"]) != float(outcome(learner_of(model_dir, size, dropout=0.2), pairs)["loss"])


def test_dropout_that_is_not_replayed_would_show(
    model_dir: str, pairs: EncodedPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = SIZES["about three"]
    expected = outcome(learner_of(model_dir, size, dropout=0.3), pairs)
    monkeypatch.setattr(
        chunks,
        "checkpoint",
        lambda *arguments, **options: checkpoint(*arguments, preserve_rng_state=False, **options),
    )
    with pytest.raises(AssertionError):
        assert_equal(outcome(learner_of(model_dir, size, dropout=0.3), pairs), expected)


@pytest.mark.parametrize(("size", "most"), [("one input", 1), ("all", 15)])
def test_activations_of_one_chunk_at_a_time_are_kept(model_dir: str, pairs: EncodedPairs, size: str, most: int) -> None:
    """Counts the inner activations of a layer that are alive at once. With 15 inputs, 15 chunks of one input each."""
    learner = learner_of(model_dir, SIZES[size])
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    peak = 0

    def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal peak
        alive.add(output.untyped_storage())
        peak = max(peak, len(alive) * output.shape[0])

    layers: Any = learner.embedder.backbone
    layers.language_model.layers[0].mlp.up_proj.register_forward_hook(note)
    outcome(learner, pairs)
    assert peak == most


def test_chunks_hold_neighbors_in_length_within_the_budget() -> None:
    lengths = np.array([5, 90, 7, 5, 40, 90, 200, 6], np.int32)
    found = chunks_of(lengths, 180, packed=False)
    assert [chunk.tolist() for chunk in found] == [[6], [1, 5], [4, 2, 7, 0], [3]]
    assert sorted(np.concatenate(found).tolist()) == list(range(8))
    for budget in (1, 17, 180, 10**6):
        for chunk in chunks_of(lengths, budget, packed=False):
            assert len(chunk) == 1 or len(chunk) * lengths[chunk].max() <= budget
    assert [chunk.tolist() for chunk in chunks_of(lengths, 180, packed=True)] == [[6], [1, 5], [4, 2, 7, 0, 3]]


def test_packed_chunks_have_no_padding_and_the_same_gradient(
    model_dir: str, pairs: EncodedPairs, whole: dict[str, Tensor]
) -> None:
    learner = learner_of(model_dir, SIZES["about three"])
    learner.embedder.packing = "packed"
    found = outcome(learner, pairs)
    assert_equal(found, whole)
    assert float(found["padding_fraction"]) == 0


def test_grouping_by_length_leaves_less_padding(model_dir: str, pairs: EncodedPairs) -> None:
    with torch.no_grad():
        found = {
            size: learner_of(model_dir, size)(pairs, [("a", len(pairs))], step=0)[1] for size in (None, 3 * LONGEST, 1)
        }
    tokens = sum(int(input.lengths.sum()) for input in (pairs.queries, pairs.targets, pairs.negatives) if input)
    assert {int(stats["tokens"]) for stats in found.values()} == {tokens}
    shares = [float(stats["padding_fraction"]) for stats in found.values()]
    padded = [input.lengths.max() * len(input) for input in (pairs.queries, pairs.targets, pairs.negatives) if input]
    assert shares[0] == pytest.approx(1 - tokens / sum(padded))
    assert shares[0] > shares[1] > shares[2] == 0
