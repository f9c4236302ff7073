"""One training step on two ranks against one process on the concatenated batch, and the parts of the optimizer."""

from __future__ import annotations

import hashlib
import math
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch.distributed as dist
from torch import Tensor

from pipelines.errors import UserError
from pipelines.feed.batch import Candidate
from pipelines.samples import DecodedInput, DecodedSample, Input, Sample
from rzen.config import (
    DistillationConfig,
    EmbeddingDistillationConfig,
    FalseNegativeConfig,
    HardnessConfig,
    LoraConfig,
    MinedConfig,
    ObjectiveConfig,
    OptimConfig,
    QuantizedConfig,
    TaskObjectiveConfig,
    TemperatureConfig,
)
from rzen.inputs.pairs import EncodedPairs, PairEncoder
from rzen.inputs.processor import Processor
from rzen.model.backbone import load_backbone
from rzen.model.embedding_model import EmbeddingModel
from rzen.model.lora import add_lora
from rzen.objective.loss import Objective
from rzen.training.optim import build_optimizer, lr_at, parameter_groups, set_lr
from rzen.training.step import EmbeddingLearner
from tests.gloo import run_workers
from tests.tiny import PROMPT, TEXTS, TINY, noise, tiny_checkpoint, tiny_model

NAN = math.nan
CONFIG = ObjectiveConfig(
    false_negatives=FalseNegativeConfig(threshold=0.5, warmup_steps=0, max_dropped_fraction=0.25),
    temperature=TemperatureConfig(initial=0.1),
)

OPTIONS = CONFIG.model_copy(
    update={
        "symmetric": 0.5,
        "same_side": ["queries", "targets"],
        "mined": MinedConfig(shared=False, hardness=HardnessConfig(alpha=2.0)),
        "focal_gamma": 2.0,
        "tile_rows": 2,
    }
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def learner_of(model_dir: str, lora: LoraConfig | None = None, config: ObjectiveConfig = CONFIG) -> EmbeddingLearner:
    backbone: Any = load_backbone(model_dir, tiny_model(model_dir))
    if lora is not None:
        backbone = add_lora(backbone, lora, seed=0)
    return EmbeddingLearner(
        EmbeddingModel(backbone, Processor(model_dir, PROMPT).layout), Objective(config, ["b", "a"])
    )


def decoded(query: DecodedInput, target: DecodedInput, sha256: str, *negatives: DecodedInput) -> DecodedSample:
    contents = tuple(hashlib.sha256(repr(part).encode()).hexdigest() for part in (query, *negatives))
    sample = Sample("000017", "flickr", "a", Input(), Input(), target_sha256=sha256, query_sha256=contents[0])
    return DecodedSample(sample, query, target, negatives, contents[1:])


def pairs_by_rank(model_dir: str) -> list[list[EncodedPairs]]:
    """Three pairs of text alone for rank 0, three with visuals for rank 1; one target and one query occur on both.

    Two of six have mined negatives, an unequal number. One of these shows what a query shows.
    """
    encoder = PairEncoder(Processor(model_dir, PROMPT))
    image, video = noise("image", 1, 61, 97), noise("video", 3, 59, 83, 2)
    video_input, text_input = DecodedInput(visuals=(video,)), DecodedInput(text=TEXTS[0])
    same, others = "ab" * 32, [f"{digit}0" * 32 for digit in range(1, 6)]
    text = [
        decoded(DecodedInput(text=TEXTS[0]), DecodedInput(text=TEXTS[1]), same),
        decoded(DecodedInput(text=TEXTS[2]), DecodedInput(text=TEXTS[3]), others[0]),
        decoded(DecodedInput(text=TEXTS[4]), DecodedInput(text="x"), others[1], DecodedInput(text="y")),
    ]
    mixed = [
        decoded(DecodedInput(text=TEXTS[3]), DecodedInput(visuals=(image,)), others[2]),
        decoded(
            DecodedInput(text=TEXTS[2], visuals=(image,)),
            DecodedInput(visuals=(video,)),
            others[3],
            video_input,
            text_input,
        ),
        decoded(DecodedInput(text=TEXTS[2]), DecodedInput(text=TEXTS[1]), same),
    ]
    ranks = [[encoder.sample(sample) for sample in samples] for samples in (text, mixed)]
    scores = iter(np.linspace(0.1, 0.9, 9, dtype=np.float32))
    vectors = iter(teacher_vectors())
    return [[with_teacher(pair, scores, next(vectors)) for pair in pairs] for pairs in ranks]


def teacher_vectors() -> npt.NDArray[np.float32]:
    """Vectors of the six pairs, not of the model's width. Pair 1 has none of its query, pair 3 of its target."""
    vectors = np.random.default_rng(3).normal(size=(6, 2, 9)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    vectors[1, 0] = vectors[3, 1] = NAN
    return vectors


def with_teacher(pair: EncodedPairs, scores: Iterator[np.float32], vectors: npt.NDArray[np.float32]) -> EncodedPairs:
    """Scores of the target and the negatives of a pair, and vectors of its query and target."""
    target, *negatives = [next(scores) for _ in range(1 + int(pair.negative_counts[0]))]
    return replace(
        pair,
        teacher_scores=np.array([target], np.float32),
        negative_teacher_scores=np.array(negatives, np.float32),
        teacher_vectors=vectors[None],
    )


def one_step(
    learner: EmbeddingLearner, model_dir: str, pairs: list[EncodedPairs], blocks: list[tuple[str, int]]
) -> dict[str, Tensor]:
    """Loss, dropped fraction and the gradient of every trained parameter."""
    loss, stats = learner(PairEncoder(Processor(model_dir, PROMPT)).collate(pairs), blocks, step=0)
    loss.backward()
    gradients = {
        name: p.grad.clone() for name, p in learner.named_parameters() if p.requires_grad and p.grad is not None
    }
    return {"loss": loss.detach(), "dropped_fraction": stats["dropped_fraction"], **gradients}


def worker(rank: int, world_size: int, model_dir: str) -> list[dict[str, Tensor]]:
    """Sums over the ranks, of all cases."""
    found = []
    for config, blocks, relevance in CASES:
        pairs = with_relevance(pairs_by_rank(model_dir), RELEVANCE[relevance])[rank]
        result = one_step(learner_of(model_dir, config=config), model_dir, pairs, blocks)
        # Would fail or hang here, were a gradient missing on the rank without visuals.
        for value in result.values():
            dist.all_reduce(value)
        found.append({name: value / world_size for name, value in result.items()})
    return found


def with_relevance(ranks: list[list[EncodedPairs]], relevance: list[list[float]]) -> list[list[EncodedPairs]]:
    return [
        [replace(pair, relevance=np.array([number])) for pair, number in zip(pairs, numbers, strict=True)]
        for pairs, numbers in zip(ranks, relevance, strict=True)
    ]


RELEVANCE = {
    "contrasted": [[NAN, NAN, NAN], [NAN, NAN, NAN]],
    "graded": [[1.0, 3.0, 2.0], [5.0, 2.0, 0.5]],
    "second block graded": [[NAN, 3.0, 2.0], [NAN, 2.0, 0.5]],
}


OWN = MinedConfig(shared=False, hardness=HardnessConfig(alpha=2.0))
APART = {"in_batch": False, "margin": 1.5, "false_negatives": None, "hardness": None}
A_OWN = CONFIG.model_copy(update={"tasks": {"a": TaskObjectiveConfig(mined=OWN)}})
B_OWN = CONFIG.model_copy(update={"tasks": {"b": TaskObjectiveConfig(mined=OWN, **APART)}})
DISTILLED = CONFIG.model_copy(update={"distillation": DistillationConfig(weight=3.0)})
TEACHER = CONFIG.model_copy(
    update={"embedding_distillation": EmbeddingDistillationConfig(weight=3.0), "symmetric": 0.3, "tile_rows": 2}
)
QUANTIZED = CONFIG.model_copy(
    update={"quantized": QuantizedConfig(types=["binary", "int8"]), "symmetric": 0.3, "matryoshka": [8], "tile_rows": 2}
)
DISTILLED_OWN = DISTILLED.model_copy(update={"mined": OWN})
CASES: list[tuple[ObjectiveConfig, list[tuple[str, int]], str]] = [
    (CONFIG, [("b", 3)], "contrasted"),
    (CONFIG, [("a", 1), ("b", 2)], "contrasted"),
    (OPTIONS, [("b", 3)], "contrasted"),
    (OPTIONS, [("a", 1), ("b", 2)], "contrasted"),
    (A_OWN, [("a", 2), ("b", 1)], "contrasted"),
    (B_OWN, [("a", 2), ("b", 1)], "contrasted"),
    (DISTILLED, [("b", 3)], "contrasted"),
    (DISTILLED_OWN, [("b", 3)], "contrasted"),
    (TEACHER, [("b", 3)], "contrasted"),
    (TEACHER, [("a", 1), ("b", 2)], "contrasted"),
    (QUANTIZED, [("b", 3)], "contrasted"),
    (QUANTIZED, [("b", 3)], "graded"),
    (CONFIG, [("b", 3)], "graded"),
    (CONFIG, [("a", 1), ("b", 2)], "graded"),
    (CONFIG, [("a", 1), ("b", 2)], "second block graded"),
]


@pytest.fixture(scope="module")
def on_two_ranks(model_dir: str) -> list[dict[str, Tensor]]:
    """Of each case, in processes that serve all of them."""
    found: list[dict[str, Tensor]] = run_workers(worker, 2, model_dir)[0]
    return found


@pytest.mark.parametrize("case", range(len(CASES)))
def test_two_ranks_of_different_modality_equal_one_process(
    model_dir: str, on_two_ranks: list[dict[str, Tensor]], case: int
) -> None:
    config, blocks, relevance = CASES[case]
    learner = learner_of(model_dir, config=config)
    starts = np.cumsum([0, *(size for _, size in blocks)])
    ranks = with_relevance(pairs_by_rank(model_dir), RELEVANCE[relevance])
    parts = [pairs[a:b] for a, b in pairwise(starts) for pairs in ranks]
    whole = [(task, 2 * size) for task, size in blocks]
    expected = one_step(learner, model_dir, [pair for part in parts for pair in part], whole)
    if relevance == "graded":
        assert expected["dropped_fraction"] == 0
    elif len(blocks) == 1 and config is CONFIG:
        assert expected["dropped_fraction"] > 2 / 30  # more than the two duplicates
    found = on_two_ranks[case]
    assert list(found) == list(expected)
    trained = [name for name, parameter in learner.named_parameters() if parameter.requires_grad]
    assert list(found) == ["loss", "dropped_fraction", *trained]
    # Biases of keys have no effect on a softmax: their gradients are rounding alone, hence a scale for all.
    scale = max(float(expected[name].norm()) for name in trained)
    for name, value in expected.items():
        error = float((found[name] - value).norm())
        # A statistic is a mean over ranks, which have unequal numbers of negatives where mined ones are not shared.
        has_own = any(not config.of_task(task).mined.shared for task in "ab")
        most = 0.2 if name == "dropped_fraction" and has_own else 3e-5
        assert error < most * max(float(value.norm()), 1e-3 * scale), (name, error)
    used = [task in dict(blocks) for task in "ab"]
    assert (expected["objective.theta_T"] != 0).tolist() == used


def test_a_block_of_graded_and_other_pairs_is_refused_on_all_ranks_alike(model_dir: str) -> None:
    pairs = with_relevance(pairs_by_rank(model_dir), [[1.0, NAN, 2.0], [NAN, NAN, NAN]])
    problem = "task 'b': 2 of 6 pairs that are contrasted have a relevance"
    with pytest.raises(UserError, match=problem):
        one_step(learner_of(model_dir), model_dir, [pair for part in pairs for pair in part], [("b", 6)])
    messages = run_workers(refused, 2, model_dir, [[1.0, NAN, 2.0], [NAN, NAN, NAN]])
    assert [message.startswith(problem) for message in messages] == [True, True]


def refused(rank: int, _world_size: int, model_dir: str, relevance: list[list[float]]) -> str:
    pairs = with_relevance(pairs_by_rank(model_dir), relevance)[rank]
    with pytest.raises(UserError) as error:
        one_step(learner_of(model_dir), model_dir, pairs, [("b", 3)])
    return str(error.value)


def test_a_graded_pair_brings_its_relevance_and_no_negatives(model_dir: str) -> None:
    encoder = PairEncoder(Processor(model_dir, PROMPT))
    plain = decoded(DecodedInput(text="x"), DecodedInput(text="y"), "ab" * 32, DecodedInput(text="z"))
    graded = replace(plain, sample=replace(plain.sample, relevance=2.5))
    pairs = encoder.collate([encoder.sample(plain), encoder.sample(graded)])
    np.testing.assert_array_equal(pairs.relevance, [NAN, 2.5])
    assert pairs.negative_counts.tolist() == [1, 0]


def test_candidates_are_as_negatives_that_the_sample_brings(model_dir: str) -> None:
    encoder = PairEncoder(Processor(model_dir, PROMPT))
    query, target, first = (DecodedInput(text=text) for text in "xyz")
    second = DecodedInput(text=TEXTS[0], visuals=(noise("image", 1, 61, 97),))
    whole, part = (decoded(query, target, "ab" * 32, *some) for some in ((first, second), (first,)))
    candidate = Candidate(encoder.candidate(second), whole.negative_sha256[1], 0.25)
    found = encoder.with_candidates(encoder.sample(part), [candidate], 0.75)
    expected = encoder.sample(whole)
    for name in ("negative_counts", "negative_ids", "target_ids", "query_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.negatives is not None
    assert expected.negatives is not None
    for name in ("input_ids", "lengths", "patches", "grids"):
        np.testing.assert_array_equal(getattr(found.negatives, name), getattr(expected.negatives, name))
    np.testing.assert_array_equal(found.teacher_scores, np.float32([0.75]))
    np.testing.assert_array_equal(found.negative_teacher_scores, np.float32([NAN, 0.25]))
    assert encoder.positive_of(found) is found.targets
    none = encoder.with_candidates(encoder.sample(decoded(query, target, "ab" * 32)), [], NAN)
    assert (none.negatives, none.negative_counts.tolist()) == (None, [0])


def test_a_matryoshka_width_of_the_model_is_refused_before_the_first_step(model_dir: str) -> None:
    wide = ObjectiveConfig(matryoshka=[TINY.hidden])
    with pytest.raises(UserError, match=rf"^objective.matryoshka: {TINY.hidden} is not below {TINY.hidden}, the width"):
        learner_of(model_dir, config=wide)


def test_blocks_are_contrasted_apart(model_dir: str) -> None:
    learner, pairs = learner_of(model_dir), pairs_by_rank(model_dir)[1]
    together = one_step(learner, model_dir, pairs, [("a", 1), ("b", 2)])["loss"]
    alone = [one_step(learner, model_dir, *part)["loss"] for part in ((pairs[:1], [("a", 1)]), (pairs[1:], [("b", 2)]))]
    assert float(together) == pytest.approx(float(alone[0]) / 3 + 2 * float(alone[1]) / 3, rel=1e-5)
    assert float(together) != pytest.approx(float(one_step(learner, model_dir, pairs, [("b", 3)])["loss"]), rel=1e-3)


def test_every_trained_parameter_gets_a_gradient_from_text_alone(model_dir: str) -> None:
    learner = learner_of(model_dir, LoraConfig(rank=3)).train()
    one_step(learner, model_dir, pairs_by_rank(model_dir)[0], [("b", 3)])
    visual, language = [], []
    for name, parameter in learner.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad and "lora_B" in name:
            (visual if ".visual." in name else language).append(bool(parameter.grad.any()))
    assert len(visual) == 10
    assert len(language) == 14
    assert not any(visual)
    assert all(language)


def test_pairs_are_encoded_alone_and_joined_in_order(model_dir: str) -> None:
    processor = Processor(model_dir, PROMPT)
    encoder: PairEncoder = pickle.loads(pickle.dumps(PairEncoder(processor)))
    inputs = [DecodedInput(text=TEXTS[0]), DecodedInput(visuals=(noise("image", 1, 61, 97),)), DecodedInput(text="x")]
    samples = [
        decoded(inputs[0], inputs[1], "ffffffffffffffff" + "00" * 24),
        decoded(inputs[1], inputs[2], "0000000000000102" + "ff" * 24),
        decoded(inputs[2], inputs[0], "7fffffffffffffff" + "00" * 24),
    ]
    pairs = encoder.collate([encoder.sample(sample) for sample in samples])
    assert pairs.target_ids.tolist() == [-1, 258, 2**63 - 1]
    assert len(pairs) == 3
    for found, expected in (
        (pairs.queries, processor.encode(inputs)),
        (pairs.targets, processor.encode([inputs[1], inputs[2], inputs[0]])),
    ):
        for name, array in vars(expected).items():
            np.testing.assert_array_equal(getattr(found, name), array)


def test_a_sample_without_content_hash_is_refused(model_dir: str) -> None:
    encoder = PairEncoder(Processor(model_dir, PROMPT))
    with pytest.raises(UserError, match=r"^flickr/000017: has no target_sha256; ingest its source again$"):
        encoder.sample(decoded(DecodedInput(text="x"), DecodedInput(text="y"), ""))


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine() -> None:
    config = OptimConfig(lr=0.4, warmup_fraction=0.3, final_lr_fraction=0.1)
    rates = [lr_at(step, 11, config) for step in range(11)]
    cosine = [0.04 + 0.36 * (1 + math.cos(math.pi * n / 7)) / 2 for n in range(8)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, *cosine])
    assert rates[3] == 0.4
    assert rates[10] == pytest.approx(0.04)
    assert lr_at(0, 1, OptimConfig(lr=0.4)) == 0.4
    assert lr_at(499, 1000, OptimConfig(lr=0.4, warmup_fraction=0.0)) == pytest.approx(0.2, abs=1e-3)


def test_only_matrices_decay_and_temperatures_have_their_own_rate(model_dir: str) -> None:
    learner = learner_of(model_dir)
    config = OptimConfig(weight_decay=0.05)
    matrices, vectors, temperatures = parameter_groups(learner, config)
    assert [group["weight_decay"] for group in (matrices, vectors, temperatures)] == [0.05, 0.0, 0.0]
    assert {parameter.ndim for parameter in vectors["params"]} == {1}
    assert {parameter.ndim for parameter in matrices["params"]} == {2, 5}  # 5: the patch embedding, a convolution
    assert temperatures["params"] == [learner.objective.theta_T]
    counted = sum(len(group["params"]) for group in (matrices, vectors, temperatures))
    assert counted == len(list(learner.parameters()))
    optimizer = build_optimizer(learner, config)
    set_lr(optimizer, 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.01, 0.05])
    lora = parameter_groups(learner_of(model_dir, LoraConfig(rank=3)), config)
    assert [(group["name"], len(group["params"])) for group in lora] == [("matrices", 48), ("temperatures", 1)]


def test_importing_the_encoder_does_not_import_torch() -> None:

    code = "import sys, rzen.inputs.pairs; print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert ran.stdout == "[]\n"
