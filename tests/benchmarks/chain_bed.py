"""A toy of the second half of the recipe: mining, a re-ranker, its judgments, distillation. One process, no Ray.

Scenes of two things and their captions, as in the demo. Most scenes differ from another one in one attribute, so that
there are hard negatives. The parts are those that jobs call: learners, objective, selection rules, re-ranker, ranking.
Inputs are encoded once and kept in memory, so that a step is little more than the model.

Shapes: Q queries, N targets, K candidates of a query, D width of a vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.benchmarks.types import Dataset, Query, Row
from pipelines.candidates.config import SelectionConfig
from pipelines.candidates.selection import PositiveScores, select
from pipelines.candidates.types import CandidateRows
from pipelines.items.types import Item, content_id
from pipelines.samples import DecodedInput, DecodedSample, Input, Media, Sample, Visual
from pipelines.synthetic.scenes import Scene, all_scenes, draw_scene, neighbors
from rzen.config import (
    AnyObjectiveConfig,
    ModelConfig,
    OptimConfig,
    PairPromptConfig,
    PromptConfig,
    TinyBackbone,
)
from rzen.evaluation.dataset_scores import DatasetScores, score_dataset
from rzen.evaluation.ranking import top_k
from rzen.evaluation.vectors import Vectors
from rzen.inputs.pairs import EncodedPairs, PairEncoder
from rzen.inputs.processor import EncodedBatch, Processor
from rzen.model.backbone import build_tiny
from rzen.model.chunks import chunks_of
from rzen.reranking.encoder import JointEncoder
from rzen.reranking.lists import EncodedList, ListEncoder
from rzen.reranking.prompts import PAIR_TEMPLATES
from rzen.reranking.reranker import Reranker
from rzen.training.build import build_learner
from rzen.training.learner import Learner
from rzen.training.optim import build_optimizer, lr_at, set_lr
from rzen.training.rerank import RerankLearner
from rzen.training.stage import Stage
from rzen.training.step import EmbeddingLearner
from rzen.training.worker import ensure_process_group, seed_step

TASK = "scenes"
SIDE_PX = 56
PROMPT = PromptConfig(template="plain", max_visual_tokens=4)
PAIR_PROMPT = PairPromptConfig(template="lamra", max_text_tokens=64, max_visual_tokens=4)
CHUNK_TOKENS = 8192
FloatArray = np.ndarray[Any, np.dtype[np.float32]]
IntArray = np.ndarray[Any, np.dtype[np.int64]]


def draw_scenes(seed: int, num_groups: int, group: int) -> list[Scene]:
    """Return scenes that all differ, group by group: one, and others that differ from it in one attribute."""
    rng = Random(f"{seed} scenes")
    first = rng.sample(all_scenes(), num_groups)
    taken = set(first)
    found = []
    for scene in first:
        near = [other for other in neighbors(scene) if other not in taken]
        some = rng.sample(near, group - 1)
        taken |= set(some)
        found += [scene, *some]
    return found


@dataclass(frozen=True)
class Shape:
    """How large the toy is."""

    train_groups: int = 500
    test_groups: int = 125
    group: int = 4
    """Scenes of a group: one, and others that differ from it in one attribute."""
    hidden: int = 64
    layers: int = 2


@dataclass(frozen=True)
class Pool:
    """Scenes, each as a pair of a caption and a picture, encoded for the embedder and for the re-ranker."""

    samples: list[Sample]
    pairs: list[EncodedPairs]
    lists: list[EncodedList]

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True)
class Candidate:
    """A negative that a table names, with what stands for it in a batch."""

    encoded: Any
    sha256: str
    teacher: float


class World:
    """The data of a seed, and backbones of its widths in a folder. All have one tokenizer."""

    def __init__(self, shape: Shape, seed: int, folder: Path) -> None:
        self.shape, self.seed, self._folder = shape, seed, folder
        scenes = draw_scenes(seed, shape.train_groups + shape.test_groups, shape.group)
        rng = Random(f"{seed} captions")
        self._captions = [rng.choice(scene.wordings()) for scene in scenes]
        self.encoder = PairEncoder(Processor(self.backbone(shape.hidden), PROMPT))
        self.list_encoder = ListEncoder(JointEncoder(self.backbone(shape.hidden), PAIR_PROMPT))
        decoded = [self._decoded(number, scene) for number, scene in enumerate(scenes)]
        num_train = shape.train_groups * shape.group
        self.train, self.test = self._pool(decoded[:num_train]), self._pool(decoded[num_train:])

    def backbone(self, hidden: int, layers: int | None = None) -> str:
        """Return the folder of a random backbone of this width."""
        layers = layers or self.shape.layers
        folder = self._folder / f"{self.seed}-{hidden}-{layers}"
        if not folder.exists():
            template = PAIR_TEMPLATES[PAIR_PROMPT.template]
            asked = [template.opening, template.middle, template.yes, template.no]
            config = TinyBackbone(hidden=hidden, layers=layers, seed=self.seed)
            build_tiny(folder, config, [*self._captions, *asked * len(self._captions)])
        return str(folder)

    def _decoded(self, number: int, scene: Scene) -> DecodedSample:
        image = draw_scene(scene, SIDE_PX, Random(f"{self.seed} picture {number}"))
        frames = np.asarray(image)[None]
        caption = self._captions[number]
        sample = Sample(
            key=f"{number:05d}",
            source=TASK,
            task=TASK,
            query=Input(caption),
            positive=Input(media=(Media("image", "p0.png"),)),
            target_sha256=hashlib.sha256(frames.tobytes()).hexdigest(),
            query_sha256=hashlib.sha256(caption.encode()).hexdigest(),
        )
        return DecodedSample(sample, DecodedInput(caption), DecodedInput(visuals=(Visual("image", frames),)))

    def _pool(self, decoded: Sequence[DecodedSample]) -> Pool:
        return Pool(
            [one.sample for one in decoded],
            [self.encoder.sample(one) for one in decoded],
            [self.list_encoder.sample(one) for one in decoded],
        )

    def rows(self, step: int, size: int) -> IntArray:
        """Return the training samples of a step: an epoch has each once, in an order of its own."""
        per_epoch = len(self.train) // size
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.train))
        return order[place * size : (place + 1) * size]


def build(
    world: World, objective: AnyObjectiveConfig, hidden: int | None = None, start: dict[str, Tensor] | None = None
) -> Learner:
    """Return a learner of all weights, which start at random or at those of another learner's backbone."""
    ensure_process_group()
    folder = world.backbone(hidden or world.shape.hidden)
    model = ModelConfig(backbone=folder, prompt=PROMPT, tune="full", dtype="float32", gradient_checkpointing=False)
    # The learner needs no more of a stage than its model and its objective.
    stage = Stage(model, objective, OptimConfig(), 1, world.seed, checkpoint_every_steps=1, plan_fingerprint="toy")
    learner = build_learner(stage, folder, None, [TASK])
    if start is not None:
        learner.model.backbone.load_state_dict(start)
    return learner


def weights(learner: Learner) -> dict[str, Tensor]:
    """Return a copy of the weights of a learner's backbone."""
    return {name: value.detach().clone() for name, value in learner.model.backbone.state_dict().items()}


def train(
    learner: Learner, seed: int, num_steps: int, lr: float, batch_of: Callable[[int], Any], warmup: float = 0.05
) -> list[float]:
    """Train all steps of a stage as `rzen.training.worker` does. Return the loss of each step."""
    config = OptimConfig(lr=lr, weight_decay=0.0, warmup_fraction=warmup)
    optimizer = build_optimizer(learner, config)
    learner.train()
    losses = []
    for step in range(num_steps):
        batch = batch_of(step)
        seed_step(seed, step)
        set_lr(optimizer, lr_at(step, num_steps, config))
        total = 0.0
        for part in learner.parts(batch):
            loss, _ = learner(part, [(TASK, len(batch))], step)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(learner.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@torch.no_grad()
def embed(learner: EmbeddingLearner, inputs: Sequence[EncodedBatch]) -> FloatArray:
    """Return the vectors of inputs, `[N, D]`."""
    learner.eval()
    lengths = np.concatenate([one.lengths for one in inputs])
    found: FloatArray = learner.embed(inputs, chunks_of(lengths, CHUNK_TOKENS, packed=False)).numpy()
    return found


def vectors_of(learner: EmbeddingLearner, pool: Pool) -> tuple[FloatArray, FloatArray]:
    """Return the vectors of all captions and of all pictures."""
    return tuple(embed(learner, [getattr(pair, side) for pair in pool.pairs]) for side in ("queries", "targets"))


def scored(pool: Pool, queries: FloatArray, targets: FloatArray, depth: int) -> DatasetScores:
    """Search all pictures for each caption, as an evaluation does. Only its own picture is a right answer."""

    def item(role: str, sample: Sample, given: Input) -> Item:
        return Item(content_id([role, sample.key]), sample.key, given, content_id([role, sample.key]))

    candidates = [item("target", sample, sample.positive) for sample in pool.samples]
    asked = [item("query", sample, sample.query) for sample in pool.samples]
    rows = [Query(query, {target.id: 1.0}) for query, target in zip(asked, candidates, strict=True)]
    row = Row(TASK, "custom", "image", TASK, "global", "hit@1", None, "custom", cutoffs=(depth,))
    return score_dataset(
        Dataset(row, rows, candidates, TASK),
        Vectors.of([query.id for query in asked], queries),
        Vectors.of([target.id for target in candidates], targets),
        num_top=depth,
        device="cpu",
        collapse_is_error=False,
    )


def mine(queries: FloatArray, targets: FloatArray, pool: Pool, depth: int) -> CandidateRows:
    """Return the first targets of each query, without its own, as the table that a job of kind `mine` writes."""
    rows, scores = top_k(queries, targets, depth + 1)
    own = np.arange(len(queries))[:, None]
    kept = rows != own
    kept &= kept.cumsum(axis=1) <= depth
    pairs = pool.pairs
    ids = np.concatenate([pair.target_ids for pair in pairs])
    return CandidateRows.of(
        [sample.key for sample in pool.samples],
        kept.sum(axis=1),
        candidate=rows[kept],
        id=ids[rows[kept]],
        recall=scores[kept],
        query=np.concatenate([pair.query_ids for pair in pairs]),
        positive_recall=(queries * targets).sum(axis=1),
    )


def chosen(rows: CandidateRows, config: SelectionConfig) -> CandidateRows:
    """Return the negatives that the rules choose, as a job of kind `select` does."""
    return select(rows, PositiveScores.of([rows], config), config, TASK, 0).rows


def judge(learner: RerankLearner, world: World, pool: Pool, pairs: IntArray) -> FloatArray:
    """Return the log-odds of pairs `[P, 2]` of a caption and a picture of the pool, `[P]`."""
    reranker = Reranker(world.list_encoder.joint, learner.scorer.eval(), CHUNK_TOKENS)
    order = np.lexsort((pairs[:, 0], pairs[:, 1]))
    queries, targets = [one.query for one in pool.lists], [one.targets[0] for one in pool.lists]
    found = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), 2048):
        some = order[start : start + 2048]
        found[some] = reranker.log_odds(world.list_encoder.joint.join(queries, targets, pairs[some]))
    return found
