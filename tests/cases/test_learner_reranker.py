"""A re-ranker that trains on a candidate table: any number of ranks, pauses, ZeRO stages, and what opens the result.

One loss trains an adapter, the other every weight, with the tied head in ZeRO stage 3.
The batches come from the reader without Ray, encoded as in a run. Lists have unequal numbers of candidates.
"""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import rzen
from jobs.judging.local import LocalJudge
from jobs.judging.specs import ModelJudge
from jobs.training.held_out import HeldOutSamples
from pipelines.config import DataConfig, MediaConfig, MixtureConfig
from pipelines.errors import UserError
from pipelines.feed.batch import FeedBatch
from pipelines.feed.reader import Reader
from pipelines.plan.build import build_plan
from pipelines.samples import DecodedInput
from pipelines.storage.location import open_store
from rzen.config import LoraConfig, OptimConfig, PairPromptConfig, RerankObjectiveConfig, TinyBackbone
from rzen.families import part_of
from rzen.report.scores import hit_interval
from rzen.reranking.encoder import JointEncoder
from rzen.reranking.lists import EncodedList, ListEncoder, RerankBatch
from rzen.training.build import build_learner
from rzen.training.held_out import HeldOut
from rzen.training.stage import Stage
from rzen.training.telemetry import metrics_of
from rzen.training.worker import train_stage
from tests.data import publish, publish_candidates
from tests.gloo import run_workers
from tests.integration.test_training import Folders
from tests.tiny import small_pieces, tiny_checkpoint, tiny_model

pytestmark = pytest.mark.slow
STEPS, PAUSE, CHUNK_TOKENS = 4, 2, 700
PROMPT = PairPromptConfig(template="lamra", max_visual_tokens=4)
BACKBONE = TinyBackbone(vocabulary=640, layers=1, vision_depth=1)
OBJECTIVES = {
    "bce": RerankObjectiveConfig(kind="rerank", prompt=PROMPT, positive_weight=3.0),
    "listwise": RerankObjectiveConfig(kind="rerank", prompt=PROMPT, loss="listwise"),
}


def stage_of(root: Path, loss: str, zero_stage: int = 1, **changes: Any) -> Stage:
    trained = {"lora": LoraConfig(rank=2)} if loss == "bce" else {"tune": "full"}
    model = tiny_model(str(root / "base")).model_copy(update=trained)
    optim = OptimConfig.model_validate({"lr": 1e-3, "zero_stage": zero_stage})
    return Stage(model, OBJECTIVES[loss], optim, STEPS, 0, PAUSE, "plan", **({"chunk_tokens": CHUNK_TOKENS} | changes))


def run_stage(root: Path, rank: int, world_size: int, name: str, stage: Stage, start_from: Path | None = None) -> Any:
    """Rows and held-out scores of a run, from a new reader."""
    rows: list[Any] = []
    scores: list[Any] = []
    data = DataConfig(
        root=str(root / "data"),
        candidates=str(root / "table"),
        negatives_per_sample=4,
        negatives_draw="random",
        mixture=MixtureConfig(run_length=2),
    )
    encoder = ListEncoder(JointEncoder(str(root / "base"), PROMPT))
    reader = Reader(data, encoder)
    plan = build_plan(reader.tables(), data.mixture, global_batch=6, steps=STEPS)
    worker = pickle.loads(pickle.dumps(reader))

    def batches(start: int) -> Iterator[FeedBatch]:
        return (worker.batch(plan, step, rank, world_size) for step in range(start, STEPS))

    searched = data.model_copy(update={"split": "held_out", "negatives_per_sample": 0, "candidates": None})
    held_out = HeldOutSamples(searched, {"red": tuple(range(13))}, PAUSE)
    (root / name).mkdir(exist_ok=True)
    train_stage(
        stage,
        backbone_dir=str(root / "base"),
        init_adapter=None,
        tasks=["a"],
        batches=batches,
        checkpoints=Folders(root / name, start_from),
        output=root / name / "result",
        on_metrics=rows.append,
        held_out=HeldOut(PAUSE, lambda: held_out.read(encoder, rank, world_size)),
        on_scores=scores.append,
    )
    return rows, scores


def two_ranks(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    """In chunks, without a pause and with one, and the other loss in ZeRO stage 3."""
    found = {"bce": run_stage(root, rank, world_size, "bce", stage_of(root, "bce"))}
    before = run_stage(root, rank, world_size, "paused", stage_of(root, "bce", stop=PAUSE))
    after = run_stage(root, rank, world_size, "paused", stage_of(root, "bce"), root / "paused" / f"step-{PAUSE:06d}")
    found["paused"] = before[0] + after[0], before[1] + after[1]
    small_pieces()
    found["listwise"] = run_stage(root, rank, world_size, "listwise", stage_of(root, "listwise", zero_stage=3))
    return found


def one_rank(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    """All pairs at once, in ZeRO stage 1."""
    return {
        f"{loss}-alone": run_stage(root, rank, world_size, f"{loss}-alone", stage_of(root, loss, chunk_tokens=None))
        for loss in OBJECTIVES
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reranker")
    tiny_checkpoint(root / "base", BACKBONE)
    stored = open_store(str(root / "data"))
    manifest = publish(stored, {"red": ("a", 24)}, bad={"red": [7]})
    publish(stored, {"red": ("a", 13)}, bad={"red": [4]}, duplicates={"red": [9]}, split="held_out")
    publish_candidates(
        open_store(str(root / "table")),
        stored,
        manifest,
        {"red": {n: [n, *((n + 1 + some) % 24 for some in range(1 + n % 5))] for n in range(24)}},  # the positive, too
        dropped={"red": [5]},
    )
    return root


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Any]:
    return run_workers(two_ranks, 2, root)[0] | run_workers(one_rank, 1, root)[0]


def weights(root: Path, name: str) -> dict[str, torch.Tensor]:
    (path,) = (root / name / "result").glob("*.safetensors")
    return load_file(path)


def test_a_run_that_is_paused_ends_with_the_same_bytes(runs: dict[str, Any], root: Path) -> None:
    (rows, scores), (paused_rows, paused_scores) = runs["bce"], runs["paused"]
    assert [row["loss"] for row in rows] == [row["loss"] for row in paused_rows]
    assert [score["sources"] for score in scores] == [score["sources"] for score in paused_scores]
    one, other = (root / name / "result" / "adapter_model.safetensors" for name in ("bce", "paused"))
    assert one.read_bytes() == other.read_bytes()
    assert all(set(row) == {"step", "source", "task", *metrics_of(OBJECTIVES["bce"])} for row in rows)
    assert sum(row["bad_candidates"] for row in rows) > 0


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_ranks_chunks_and_zero_stages_train_the_same(runs: dict[str, Any], root: Path, loss: str) -> None:
    (rows, scores), (other_rows, other_scores) = runs[loss], runs[f"{loss}-alone"]
    for row, again in zip(rows, other_rows, strict=True):
        assert again["loss"] == pytest.approx(row["loss"], rel=1e-4)
        assert again["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
        assert again["accuracy"] == row["accuracy"]
        assert again["tokens"] == row["tokens"]
    assert [one["sources"] for one in scores] == [one["sources"] for one in other_scores]
    found, expected = weights(root, f"{loss}-alone"), weights(root, loss)
    assert set(found) == set(expected)
    for key, value in expected.items():
        # Softmax does not see these biases. Their gradients are rounding, of which Adam makes whole steps of 1e-3.
        if not key.endswith(("k_proj.bias", "attn.qkv.bias")):
            assert float((found[key] - value).square().mean().sqrt()) < 5e-6, key


def test_held_out_queries_rank_the_targets_of_their_group(runs: dict[str, Any]) -> None:
    _, scores = runs["bce"]
    assert [one["step"] for one in scores] == [0, 2, 4]
    (source,) = {one["sources"]["red"]["candidates"]: one["sources"]["red"] for one in scores}.values()
    assert source["queries"] == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12]  # 4 cannot be decoded
    assert source["candidates"] == 7
    ranks = np.array(source["ranks"])
    assert ranks[:7].max() <= 7
    assert ranks[7:].max() <= 5
    assert source["hit"] == np.mean(ranks == 1)
    for query, found, rank in zip(source["queries"], source["found"], ranks, strict=True):
        assert (query < 8) == (found < 8)
        assert rank > 1 or found == query


def test_a_model_opens_as_a_reranker_with_what_its_head_has_learned(runs: dict[str, Any], root: Path) -> None:
    folder = root / "listwise" / "result"
    assert json.loads((folder / "rzen.json").read_text())["pair_prompt"] == PROMPT.model_dump()
    reranker = rzen.load_reranker(folder)
    assert reranker.encoder.prompt == PROMPT
    yes, no = reranker.encoder.answer_ids
    before, after = (
        rzen.load_reranker(some, prompt=PROMPT).model.direction
        for some in (root / "base", root / "listwise" / "result")
    )
    assert float((after - before).abs().max()) > 1e-4
    embeddings = part_of(reranker.model.backbone, "language_model.embed_tokens").weight
    assert torch.equal(after, embeddings[yes] - embeddings[no])


def test_the_adapter_opens_as_a_reranker_with_its_prompt(runs: dict[str, Any], root: Path) -> None:
    adapter = root / "bce" / "result"
    saved = json.loads((adapter / "rzen.json").read_text())
    assert saved["pair_prompt"] == PROMPT.model_dump()
    assert "temperatures" not in saved
    reranker = rzen.load_reranker(root / "base", adapter)
    assert reranker.encoder.prompt == PROMPT
    judge = LocalJudge.of(ModelJudge(base=str(root / "base"), adapter=str(adapter)), NoPlaces(), None, 100)  # type: ignore[arg-type]
    assert judge.prompt == PROMPT
    assert judge.config["prompt"] == PROMPT.model_dump()
    base = rzen.load_reranker(root / "base", prompt=PROMPT)
    pairs = [("red 3", f"a text {number}") for number in range(3)]
    assert np.abs(reranker.predict(pairs) - base.predict(pairs)).max() > 1e-4
    learner = build_learner(stage_of(root, "bce"), str(root / "base"), adapter, ["a"]).eval()
    batch = reranker.encoder.encode(*reranker_inputs(), np.array([[0, 0], [0, 1]]))
    with torch.no_grad():
        z = learner.log_odds(batch, [np.arange(2)])  # type: ignore[attr-defined]
    assert np.abs(z.numpy() - reranker.log_odds(batch)).max() < 1e-5
    with pytest.raises(UserError, match=r"is that of a re-ranker, which has no vectors; open it with rzen\.load"):
        rzen.load(root / "base", adapter)


COLORS = ("red", "green", "blue", "pink")


def color_batch(encoder: ListEncoder, rng: random.Random, num_queries: int) -> RerankBatch:
    """Each query names a color. Its positive names the same, and its negatives name the three others."""
    side = {color: encoder.joint.side(DecodedInput(color)) for color in COLORS}
    lists = []
    for number in range(num_queries):
        color, *others = rng.sample(COLORS, 4)
        named = (color, *others)
        lists.append(EncodedList(str(number), side[color], (color, ""), tuple(side[other] for other in named), named))
    return encoder.collate(lists)


def test_a_toy_reranker_learns_to_match(tmp_path: Path) -> None:
    """Hits of a trained model among four candidates, with an interval that is above chance."""
    base = tiny_checkpoint(tmp_path, BACKBONE.model_copy(update={"vocabulary": 1200}))
    model = tiny_model(base).model_copy(update={"tune": "full"})
    stage = Stage(model, OBJECTIVES["bce"], OptimConfig(), 60, 0, 60, "plan")
    learner = build_learner(stage, base, None, ["a"])
    encoder = ListEncoder(JointEncoder(base, PROMPT))
    optimizer = torch.optim.AdamW(learner.parameters(), lr=5e-3)
    rng = random.Random(0)
    for step in range(60):
        optimizer.zero_grad()
        for part in learner.parts(color_batch(encoder, rng, 8)):
            loss, _ = learner(part, [("a", 8)], step)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
    batch = color_batch(encoder, rng, 60)
    with torch.no_grad():
        outputs = [learner(part, [("a", 60)], 60)[1] for part in learner.parts(batch)]
    low, _ = hit_interval(float(learner.statistics(batch, outputs)["accuracy"]), 60)
    assert low > 1 / 4


class NoPlaces:
    """In place of the inputs of a judging job."""

    instructions = True
    media = MediaConfig()

    def for_model(self, pixels: int) -> NoPlaces:
        return self


def reranker_inputs() -> Any:
    return [DecodedInput("red 3")], [DecodedInput("red 4"), DecodedInput("another")]
