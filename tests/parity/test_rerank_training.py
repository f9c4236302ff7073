"""Training a re-ranker: losses by hand, gradients of transformers' whole model, chunks, and faults that must show."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from rzen.config import LoraConfig, OptimConfig, RerankObjectiveConfig
from rzen.model.activations import ChunkInputs
from rzen.model.backbone import build_tiny
from rzen.reranking.encoder import JointBatch, JointEncoder
from rzen.reranking.lists import EncodedList, ListEncoder, RerankBatch
from rzen.reranking.loss import listwise_loss, pair_weights, pointwise_loss
from rzen.reranking.model import ScoringModel
from rzen.reranking.reranker import load_reranker
from rzen.training.build import build_learner
from rzen.training.chunk_size import run_example
from rzen.training.rerank import RerankLearner, list_chunks
from rzen.training.stage import Stage
from rzen.training.worker import ensure_process_group, save_model
from tests.parity.test_reranker import DOCUMENTS, QUERIES, library_arguments, small_prompt
from tests.tiny import TEXTS, TINY, tiny_model

LISTS = [(0, (1, 0, 3)), (2, (2, 1)), (1, (0,)), (0, (2, 3, 0, 1))]
"""Query and its documents, the positive first. Numbers of pairs differ, and one list is the positive only."""
Z = torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0, -0.25])
COUNTS = [3, 1, 2]


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def by_hand(positive_weight: float) -> float:
    """Mean over pairs of each query, then over queries. -log sigmoid(z) = softplus(-z) of a positive."""
    w = positive_weight
    lists = [
        (w * softplus(-0.5) + softplus(-1.0) + softplus(2.0)) / (w + 2),
        softplus(0.0),
        (w * softplus(-3.0) + softplus(-0.25)) / (w + 1),
    ]
    return sum(lists) / 3


LABELS = torch.tensor([True, False, False, True, True, False])


@pytest.mark.parametrize("positive_weight", [1.0, 2.5])
def test_pointwise_loss_is_that_of_hand_values(positive_weight: float) -> None:
    weights = pair_weights(torch.tensor(COUNTS), LABELS, positive_weight)
    assert float(weights.sum()) == pytest.approx(1)
    found = float(pointwise_loss(Z, LABELS, weights))
    assert found == pytest.approx(by_hand(positive_weight), rel=1e-6)
    swapped = LABELS.clone()
    swapped[:2] = torch.tensor([False, True])  # the positive's label at the first candidate
    faults = [
        pointwise_loss(-Z, LABELS, weights),
        pointwise_loss(Z, swapped, weights),
        pointwise_loss(Z, LABELS, torch.full((6,), 1 / 6)),
    ]
    assert all(abs(float(fault) - found) > 0.01 for fault in faults)


def test_listwise_loss_is_that_of_hand_values() -> None:
    def entropy(*z: float) -> float:
        return math.log(sum(math.exp(value) for value in z)) - z[0]

    found = float(listwise_loss(Z, COUNTS, 1.0))
    assert found == pytest.approx(entropy(0.5, -1.0, 2.0) + 0 + entropy(3.0, -0.25), rel=1e-6)
    assert float(listwise_loss(Z, COUNTS, 0.5)) == pytest.approx(entropy(1, -2, 4) + entropy(6, -0.5), rel=1e-6)
    reference = torch.nn.functional.cross_entropy(Z[:3][None], torch.tensor([0])).item()
    assert float(listwise_loss(Z[:3], [3], 1.0)) == pytest.approx(reference, rel=1e-6)
    padded = torch.stack([Z[:3], torch.cat([Z[3:4], torch.zeros(2)]), torch.cat([Z[4:], torch.zeros(1)])])
    unmasked = float(torch.nn.functional.cross_entropy(padded, torch.zeros(3, dtype=torch.int64), reduction="sum"))
    assert abs(unmasked - found) > 0.5  # empty places that count
    assert abs(float(listwise_loss(-Z, COUNTS, 1.0)) - found) > 0.5
    assert float(listwise_loss(Z[:0], [], 1.0)) == 0


@pytest.fixture(scope="module", params=["qwen2_vl tied", "qwen3_vl untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model whose head is tied to the embeddings, or has rows of its own."""
    family, head = request.param.split()
    folder = tmp_path_factory.mktemp("rerank")
    build_tiny(folder, TINY.model_copy(update={"family": family}), [*TEXTS, *["yes", "no", "Yes", "No"] * 9])
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = head == "tied"
    torch.manual_seed(3)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder


def objective_of(**changes: Any) -> RerankObjectiveConfig:
    return RerankObjectiveConfig.model_validate({"kind": "rerank", "prompt": small_prompt("lamra"), **changes})


def stage_of(checkpoint: Path, objective: RerankObjectiveConfig, chunk_tokens: int | None = None) -> Stage:
    model = tiny_model(str(checkpoint)).model_copy(update={"tune": "full"})
    return Stage(model, objective, OptimConfig(), 3, 0, 3, "plan-1", chunk_tokens)


def learner_of(checkpoint: Path, objective: RerankObjectiveConfig, chunk_tokens: int | None = None) -> RerankLearner:
    learner = build_learner(stage_of(checkpoint, objective, chunk_tokens), str(checkpoint), None, ["t"])
    assert isinstance(learner, RerankLearner)
    return learner.train()


def batch_of(checkpoint: Path, lists: list[tuple[int, tuple[int, ...]]] = LISTS) -> RerankBatch:
    encoder = ListEncoder(JointEncoder(str(checkpoint), small_prompt("lamra")))
    side = encoder.joint.side
    encoded = [
        EncodedList(
            f"s/{number}",
            side(QUERIES[query]),
            (str(query), ""),
            tuple(side(DOCUMENTS[document]) for document in documents),
            tuple(map(str, documents)),
        )
        for number, (query, documents) in enumerate(lists)
    ]
    return encoder.collate(encoded)


def step_of(learner: RerankLearner, batch: RerankBatch) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Statistics, and the gradient of each parameter, of a step in parts."""
    outputs, total = [], 0.0
    for part in learner.parts(batch):
        loss, output = learner(part, [("t", len(batch))], 0)
        loss.backward()
        outputs.append(output)
        total += float(loss.detach())
    stats = {name: float(value) for name, value in learner.statistics(batch, outputs).items()}
    assert stats["loss"] == pytest.approx(total, rel=1e-5)
    found = {name: value.grad for name, value in learner.named_parameters() if value.grad is not None}
    return stats, {name.removeprefix("scorer.backbone."): value for name, value in found.items()}


def whole_model_step(checkpoint: Path, loss: str, weight: float = 1.0) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of transformers' whole model, one pair at a time, from its logits for both answers."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, attn_implementation="eager").train()
    if not model.config.tie_word_embeddings:
        model.lm_head.requires_grad_(False)
    yes, no = (tokenizer(answer)["input_ids"][0] for answer in ("Yes", "No"))
    total = torch.zeros(())
    for query, documents in LISTS:
        pairs = []
        for document in documents:
            arguments = library_arguments(model, tokenizer, "lamra", QUERIES[query], DOCUMENTS[document])
            pairs.append(model(**arguments).logits[0, -1, [yes, no]])
        logits = torch.stack(pairs)
        if loss == "bce":
            answers = torch.tensor([0] + [1] * (len(documents) - 1))  # yes for the positive, no for the others
            each = torch.nn.functional.cross_entropy(logits, answers, reduction="none")
            weights = torch.tensor([weight] + [1.0] * (len(documents) - 1))
            total = total + (each * weights).sum() / weights.sum()
        else:
            z = logits[:, 0] - logits[:, 1]
            total = total + torch.nn.functional.cross_entropy(z[None], torch.tensor([0]))
    mean = total / len(LISTS)
    mean.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return float(mean.detach()), {name.removeprefix("model."): value for name, value in gradients.items()}


def differ(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of two sets of gradients, as a share of the largest gradient of the parameter."""
    assert set(found) == set(expected)
    scale = max(float(value.abs().max()) for value in expected.values())
    return max(float((found[name] - value).abs().max()) for name, value in expected.items()) / scale


@pytest.mark.parametrize(("loss", "weight"), [("bce", 1.0), ("bce", 3.0), ("listwise", 1.0)])
def test_gradients_are_those_of_the_whole_model(checkpoint: Path, loss: str, weight: float) -> None:
    expected_loss, expected = whole_model_step(checkpoint, loss, weight)
    batch = batch_of(checkpoint)
    for chunk_tokens in (None, 1, 420):
        learner = learner_of(checkpoint, objective_of(loss=loss, positive_weight=weight), chunk_tokens)
        num_parts = sum(1 for _ in learner.parts(batch))
        assert (num_parts == 1) == (chunk_tokens is None)
        assert chunk_tokens != 1 or num_parts == (len(batch) if loss == "listwise" else len(batch.joint))
        stats, found = step_of(learner, batch)
        assert stats["loss"] == pytest.approx(expected_loss, rel=1e-5)
        assert differ(found, expected) < 1e-5


def test_wrong_losses_show_in_the_gradients(checkpoint: Path) -> None:
    _, expected = whole_model_step(checkpoint, "bce")
    batch = batch_of(checkpoint)
    swapped = batch_of(checkpoint, [(query, documents[::-1]) for query, documents in LISTS])
    for fault, some in (("positive_weight", batch), ("swapped", swapped)):
        objective = objective_of(positive_weight=2.0) if fault == "positive_weight" else objective_of()
        _, found = step_of(learner_of(checkpoint, objective), some)
        assert differ(found, expected) > 1e-2, fault
    learner = learner_of(checkpoint, objective_of())
    learner.scorer.direction.neg_()
    if learner.scorer.trained_answers is not None:
        learner.scorer.trained_answers = learner.scorer.trained_answers[::-1]
    _, found = step_of(learner, batch)
    assert differ(found, expected) > 1e-2, "sign"


def test_a_list_does_not_depend_on_its_batch_mates(checkpoint: Path) -> None:
    """The gradient of a batch is the mean of those of its lists, in any order."""
    learner = learner_of(checkpoint, objective_of(), 300)
    _, together = step_of(learner, batch_of(checkpoint, LISTS[::-1]))
    sums: dict[str, Tensor] = {}
    for one in LISTS:
        _, alone = step_of(learner_of(checkpoint, objective_of()), batch_of(checkpoint, [one]))
        for name, value in alone.items():
            sums[name] = sums.get(name, torch.zeros(())) + value / len(LISTS)
    assert differ(together, sums) < 1e-5


def frozen_tower(checkpoint: Path, chunk_tokens: int | None, *, recomputed: bool = False) -> RerankLearner:
    """An adapter on the language model only. Its B is not zero, so that all of it has gradients."""
    changes = {"lora": LoraConfig(rank=2, scope="language_model"), "gradient_checkpointing": recomputed}
    model = tiny_model(str(checkpoint)).model_copy(update=changes)
    stage = replace(stage_of(checkpoint, objective_of(), chunk_tokens), model=model)
    learner = build_learner(stage, str(checkpoint), None, ["t"])
    assert isinstance(learner, RerankLearner)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
    return learner.train()


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_frozen_tower_reads_each_medium_once(
    checkpoint: Path, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(checkpoint)
    learners = [frozen_tower(checkpoint, chunk_tokens, recomputed=recomputed) for chunk_tokens in (None, 1, 420)]
    assert all(learner.reads_media_once for learner in learners)
    learners[0].reads_media_once = False
    (_, expected), *others = [step_of(learner, batch) for learner in learners]
    for _, found in others:
        assert differ(found, expected) < 1e-5
    read: list[int] = []
    features = ScoringModel.features
    monkeypatch.setattr(ScoringModel, "features", lambda self, media: read.append(len(media)) or features(self, media))
    kept = []
    for part in learners[1].parts(batch):
        learners[1](part, [("t", len(batch))], 0)
        kept.append(len(part.features))
    assert sum(read) == len(batch.joint.media) == 3
    assert kept[-1] == 0 < max(kept)
    assert not learner_of(checkpoint, objective_of()).reads_media_once


def test_samples_whose_scores_are_not_finite_are_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, batch = learner_of(checkpoint, objective_of()), batch_of(checkpoint)
    score = ScoringModel.score
    clip = max(batch.joint.media.values(), key=lambda medium: int(medium.grids[0, 0]))

    def poisoned(self: ScoringModel, joint: JointBatch) -> Tensor:
        shows_clip = any(np.array_equal(medium.patches, clip.patches) for medium in joint.media.values())
        return score(self, joint) * (math.nan if shows_clip else 1)

    monkeypatch.setattr(ScoringModel, "score", poisoned)
    with torch.no_grad():
        assert learner.not_finite(batch) == ["s/1", "s/3"]  # document 2 is in both


def test_an_example_is_scored_with_a_backward_pass(checkpoint: Path) -> None:
    learner = learner_of(checkpoint, objective_of())
    run_example(learner, ChunkInputs(3, 50, 12))
    run_example(learner, ChunkInputs(2, 9, 0))
    assert all(parameter.grad is None for parameter in learner.parameters())


def test_a_model_is_saved_with_its_head(checkpoint: Path, tmp_path: Path) -> None:
    ensure_process_group()
    stage = stage_of(checkpoint, objective_of())
    learner = learner_of(checkpoint, objective_of())
    trained = {name: value.detach() * 1.5 for name, value in learner.named_parameters() if value.requires_grad}
    save_model(stage, SimpleNamespace(module=learner), trained, str(checkpoint), tmp_path / "model")
    reranker = load_reranker(tmp_path / "model")
    assert reranker.encoder.prompt == small_prompt("lamra")
    batch = batch_of(checkpoint).joint
    with torch.no_grad():
        expected = learner.log_odds(batch, [np.arange(len(batch))]).numpy()
    assert np.abs(reranker.log_odds(batch) - expected).max() < 1e-5 * max(1, np.abs(expected).max())


def test_statistics_count_queries_and_tokens(checkpoint: Path) -> None:
    learner = learner_of(checkpoint, objective_of())
    batch = batch_of(checkpoint)
    stats, _ = step_of(learner, batch)
    with torch.no_grad():
        z = learner.log_odds(batch.joint, [np.arange(len(batch.joint))])
    of_lists = torch.split(z, batch.counts.tolist())
    assert stats["accuracy"] == np.mean([bool((one[0] > one[1:]).all()) for one in of_lists])
    assert stats["positive_probability"] == pytest.approx(float(z[batch.is_positive].sigmoid().mean()), rel=1e-5)
    assert stats["negative_probability"] == pytest.approx(float(z[~batch.is_positive].sigmoid().mean()), rel=1e-5)
    assert stats["tokens"] == batch.joint.sequences.lengths.sum()
    assert 0 < stats["padding_fraction"] < 0.5


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 25, 40, 1000])
def test_chunks_hold_every_pair_once_within_their_tokens(packed: bool, whole: bool, max_tokens: int) -> None:
    lengths, counts = np.array([9, 10, 8, 30, 5, 6, 7, 12], np.int32), np.array([3, 1, 4])
    chunks = list_chunks(lengths, counts, max_tokens, packed=packed, whole=whole)
    assert sorted(np.concatenate(chunks).tolist()) == list(range(8))
    owner = np.repeat(np.arange(3), counts)
    for chunk in chunks:
        cost = int(lengths[chunk].sum()) if packed else len(chunk) * int(lengths[chunk].max())
        assert cost <= max_tokens or len(chunk) == 1 or (whole and len(set(owner[chunk].tolist())) == 1)
        if whole:
            assert all(set(np.flatnonzero(owner == one)) <= set(chunk.tolist()) for one in set(owner[chunk].tolist()))
    if max_tokens == 1000:
        assert len(chunks) == 1
