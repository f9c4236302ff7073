"""The models of a chain, each trained from another one, and what each scores.

large                                 contrastive loss, more steps: teacher of `vectors`, start of `reranker`
small, vectors, vectors_only          half as wide; alone, and with the stored vectors of `large`
large_long, small_long, vectors_long  the same in more steps; the vectors are those of `large_long`
small -> more -> more_2               contrastive loss, as many steps as the others
small -> hard -> hard_2               with mined negatives
large -> reranker                     on the candidates of `small`
         hard -> distilled            the lists of `hard`, judged by the re-ranker
         hard -> truth                the same lists, judged by who knows the answer
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.candidates.config import NegativeRules, SelectionConfig, TeacherConfig
from pipelines.candidates.types import CandidateRows
from rzen.config import (
    DistillationConfig,
    EmbeddingDistillationConfig,
    MinedConfig,
    ObjectiveConfig,
    RerankObjectiveConfig,
    TemperatureConfig,
)
from rzen.evaluation.dataset_scores import DatasetScores
from rzen.evaluation.reranking import Shortlist, score_reranked
from rzen.inputs.pairs import EncodedPairs
from rzen.reranking.lists import RerankBatch
from tests.benchmarks.chain_bed import (
    PAIR_PROMPT,
    Candidate,
    FloatArray,
    IntArray,
    Pool,
    Shape,
    World,
    build,
    chosen,
    judge,
    mine,
    scored,
    train,
    vectors_of,
    weights,
)
from tests.benchmarks.runs import Run

Trained = tuple[dict[str, Tensor], list[float]]
"""Weights of a model, and the loss of each step of its training."""


@dataclass(frozen=True)
class Setting:
    """What a chain trains with."""

    shape: Shape = field(default_factory=Shape)
    batch: int = 64
    temperature: float = 0.05
    lr: float = 3e-3
    large_steps: int = 250
    small_steps: int = 150
    long_steps: int = 600
    """Of the models that show what is left of a lead after more steps."""
    stage_steps: int = 50
    """Steps of each later stage of the small model."""
    stage_lr: float = 1e-3
    small: int = 32
    """Width of the small model."""
    depth: int = 50
    """Candidates of a query that negatives are chosen from."""
    shortlist: int = 16
    """Candidates of a test query that the re-ranker orders."""
    margin: float = 0.05
    """Of the rule for negatives: 0.05 is the 95% rule."""
    negatives: int = 2
    """Mined negatives of a sample."""
    rerank_steps: int = 200
    rerank_lr: float = 3e-3
    rerank_batch: int = 32
    rerank_negatives: int = 3
    """Negatives of a query, drawn from its candidates."""
    rerank_loss: str = "listwise"
    lists: int = 320
    """Training queries that the re-ranker judges."""
    list_length: int = 16
    """Judged candidates of a query, in addition to its answer."""
    list_batch: int = 16
    list_lr: float = 1e-4
    pairs_weight: float = 0.0
    """Weight of the contrastive loss next to that of the judged lists."""
    judge_weight: float = 0.5
    """Weight of the judge's probability in the teacher's score. The cosine has the rest."""
    vector_temperature: float = 0.05
    """Divides the cosines of the large model."""

    def key(self) -> str:
        """Return a text that is equal for equal settings only."""
        return json.dumps(asdict(self), sort_keys=True)


SETTING = Setting()


class Chain:
    """The models of a seed. Each is trained once, and its weights are kept in a folder."""

    def __init__(self, setting: Setting, seed: int, folder: Path) -> None:
        self.setting, self.seed = setting, seed
        digest = hashlib.sha256(f"{setting.key()} {seed}".encode()).hexdigest()[:12]
        self._folder = folder / digest
        self._folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def world(self) -> World:
        """The data."""
        return World(self.setting.shape, self.seed, self._folder)

    def learner(self, name: str) -> Any:
        """Return a trained model."""
        objective = self._reranking if name == "reranker" else self._contrastive()
        hidden = self.setting.shape.hidden if name in ("large", "large_long", "reranker") else self.setting.small
        return build(self.world, objective, hidden, self.trained(name)[0])

    def trained(self, name: str) -> Trained:
        """Return the weights of a model, and the losses of its training."""
        path = self._folder / f"{name}.pt"
        if not path.exists():
            part = path.with_suffix(".part")
            torch.save(TRAINED[name](self), part)
            part.replace(path)
        found: Trained = torch.load(path)
        return found

    # Objectives

    def _contrastive(self, **options: Any) -> ObjectiveConfig:
        temperature = TemperatureConfig(initial=self.setting.temperature, learnable=False)
        return ObjectiveConfig(hardness=None, false_negatives=None, temperature=temperature, **options)

    @property
    def _reranking(self) -> RerankObjectiveConfig:
        return RerankObjectiveConfig(kind="rerank", loss=self.setting.rerank_loss, prompt=PAIR_PROMPT)

    # Batches

    def _pairs(self, step: int) -> EncodedPairs:
        pairs = self.world.train.pairs
        return self.world.encoder.collate([pairs[row] for row in self.world.rows(step, self.setting.batch)])

    def _hard_pairs(self, table: CandidateRows, step: int) -> EncodedPairs:
        rows = self.world.rows(step, self.setting.batch)
        return self.world.encoder.collate([self._with_candidates(row, table) for row in rows])

    def _with_candidates(self, row: int, table: CandidateRows) -> EncodedPairs:
        """Return a training pair with the candidates of a table, and the scores of its teacher."""
        pairs, samples, span = self.world.train.pairs, self.world.train.samples, table.span(row)
        candidates = [
            Candidate(pairs[number].targets, samples[number].target_sha256, teacher)
            for number, teacher in zip(table.candidate[span].tolist(), table.teacher[span].tolist(), strict=True)
        ]
        return self.world.encoder.with_candidates(pairs[row], candidates, float(table.positive_teacher[row]))

    def _rerank_lists(self, table: CandidateRows, step: int) -> RerankBatch:
        """Return queries, each with some of its candidates. Another draw takes others."""
        setting, lists = self.setting, self.world.train.lists
        rng = np.random.default_rng([self.seed, step])
        found = []
        for row in self.world.rows(step, setting.rerank_batch).tolist():
            all_of = table.candidate[table.span(row)]
            some = rng.choice(all_of, min(setting.rerank_negatives, len(all_of)), replace=False).tolist()
            candidates = [Candidate(lists[one].targets[0], lists[one].contents[0], np.nan) for one in some]
            found.append(self.world.list_encoder.with_candidates(lists[row], candidates, np.nan))
        return self.world.list_encoder.collate(found)

    def _judged_lists(self, table: CandidateRows, step: int) -> EncodedPairs:
        setting = self.setting
        epoch, place = divmod(step * setting.list_batch, setting.lists)
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(self.listed)
        rows = order[place : place + setting.list_batch]
        return self.world.encoder.collate([self._with_candidates(row, table) for row in rows])

    # Tables

    def negatives(self, most: int, margin: float | None) -> CandidateRows:
        """Return what `small` finds for each training caption, without likely right answers by the rule for margins."""
        rules = SelectionConfig(negatives=NegativeRules(margin=margin), negatives_per_sample=most)
        return chosen(self._mined("small"), rules)

    def _mined(self, name: str) -> CandidateRows:
        pool = self.world.train
        return mine(*vectors_of(self.learner(name), pool), pool, self.setting.depth)

    @cached_property
    def listed(self) -> IntArray:
        """Training samples whose lists are judged."""
        order: IntArray = np.random.default_rng([self.seed, 2]).permutation(len(self.world.train))
        return np.sort(order[: self.setting.lists])

    def judged(self, judge_of: Callable[[IntArray], FloatArray], judge_weight: float) -> CandidateRows:
        """Return the first candidates of `hard` with the teacher's scores of listed samples.

        `judge_of` takes pairs `[P, 2]` of a caption and a picture, and gives the probability that they fit.
        """
        table, setting = self._mined("hard"), self.setting
        is_listed = np.isin(np.arange(len(table)), self.listed)
        rank = np.arange(len(table.candidate)) - table.bounds[table.sample]
        places = np.flatnonzero(is_listed[table.sample] & (rank < setting.list_length))
        table = table.take(places)
        pairs = np.stack([table.sample, table.candidate], axis=1)
        positives = np.stack([self.listed, self.listed], axis=1)
        scores = judge_of(np.concatenate([pairs, positives]))
        positive_scores = np.full(len(table), np.nan, np.float32)
        positive_scores[self.listed] = scores[len(pairs) :]
        table = replace(table, teacher=scores[: len(pairs)], positive_teacher=positive_scores)
        mix = TeacherConfig(recall=1 - judge_weight, judge=judge_weight)
        rules = SelectionConfig(
            negatives=NegativeRules(margin=None), negatives_per_sample=setting.list_length, teacher=mix
        )
        return chosen(table, rules)

    # Training

    def train_large(self, num_steps: int) -> Trained:
        learner = build(self.world, self._contrastive())
        losses = train(learner, self.seed, num_steps, self.setting.lr, self._pairs)
        return weights(learner), losses

    def train_stage(
        self,
        start: str,
        number: int,
        objective: ObjectiveConfig,
        batch_of: Callable[[int], EncodedPairs],
        lr: float | None = None,
    ) -> Trained:
        """Train a later stage, which sees the samples that follow those of the stages before."""
        setting = self.setting
        learner = build(self.world, objective, setting.small, self.trained(start)[0])
        first = setting.small_steps + number * setting.stage_steps
        losses = train(learner, self.seed, setting.stage_steps, lr or setting.stage_lr, lambda n: batch_of(first + n))
        return weights(learner), losses

    def train_more(self, start: str, number: int) -> Trained:
        return self.train_stage(start, number, self._contrastive(), self._pairs)

    def train_hard(self, start: str, number: int, margin: float | None) -> Trained:
        """Train with mined negatives in addition to those of the batch."""
        objective, table = (
            self._contrastive(mined=MinedConfig(hardness=None)),
            self.negatives(self.setting.negatives, margin),
        )
        return self.train_stage(start, number, objective, lambda step: self._hard_pairs(table, step))

    def train_distilled(self, table: CandidateRows) -> Trained:
        """Train `hard` on the lists of a table."""
        setting = self.setting
        teacher = DistillationConfig(loss="kl", contrastive_weight=setting.pairs_weight, teacher_temperature="student")
        objective = self._contrastive(mined=MinedConfig(shared=False, hardness=None), distillation=teacher)
        return self.train_stage("hard", 1, objective, lambda step: self._judged_lists(table, step), setting.list_lr)

    def train_reranker(self) -> Trained:
        setting = self.setting
        # The rule would leave a third of the queries without a negative.
        table = self.negatives(setting.depth, None)
        learner = build(self.world, self._reranking, start=self.trained("large")[0])
        steps, lr = setting.rerank_steps, setting.rerank_lr
        losses = train(learner, self.seed, steps, lr, lambda step: self._rerank_lists(table, step))
        return weights(learner), losses

    def train_small(self, num_steps: int, teacher: str = "", contrastive_weight: float = 1.0) -> Trained:
        """Train the small model, with the vectors of a teacher if one is named."""
        setting, batch_of, options = self.setting, self._pairs, {}
        if teacher:
            queries, targets = vectors_of(self.learner(teacher), self.world.train)
            both = np.stack([queries, targets], axis=1)
            options["embedding_distillation"] = EmbeddingDistillationConfig(
                loss="kl", contrastive_weight=contrastive_weight, teacher_temperature=setting.vector_temperature
            )

            def batch_of(step: int) -> EncodedPairs:
                return replace(self._pairs(step), teacher_vectors=both[self.world.rows(step, setting.batch)])

        learner = build(self.world, self._contrastive(**options), setting.small)
        losses = train(learner, self.seed, num_steps, setting.lr, batch_of)
        return weights(learner), losses

    # Scores

    def test(self, name: str) -> DatasetScores:
        """Return the scores of an embedder on the test pool."""
        return scored(self.world.test, *vectors_of(self.learner(name), self.world.test), self.setting.shortlist)

    def probability(self, pool: Pool) -> Callable[[IntArray], FloatArray]:
        """Return what gives the re-ranker's probability that pairs of a pool fit."""
        learner = self.learner("reranker")

        def judge_of(pairs: IntArray) -> FloatArray:
            found: FloatArray = torch.from_numpy(judge(learner, self.world, pool, pairs)).sigmoid().numpy()
            return found

        return judge_of


def _truth(pairs: IntArray) -> FloatArray:
    return (pairs[:, 0] == pairs[:, 1]).astype(np.float32)


TRAINED: Mapping[str, Callable[[Chain], Trained]] = {
    "large": lambda chain: chain.train_large(chain.setting.large_steps),
    "small": lambda chain: chain.train_small(chain.setting.small_steps),
    "vectors": lambda chain: chain.train_small(chain.setting.small_steps, "large"),
    "vectors_only": lambda chain: chain.train_small(chain.setting.small_steps, "large", 0.0),
    "large_long": lambda chain: chain.train_large(chain.setting.long_steps),
    "small_long": lambda chain: chain.train_small(chain.setting.long_steps),
    "vectors_long": lambda chain: chain.train_small(chain.setting.long_steps, "large_long", 0.0),
    "more": lambda chain: chain.train_more("small", 0),
    "more_2": lambda chain: chain.train_more("more", 1),
    "hard": lambda chain: chain.train_hard("small", 0, chain.setting.margin),
    "hard_2": lambda chain: chain.train_hard("hard", 1, chain.setting.margin),
    "any": lambda chain: chain.train_hard("small", 0, None),
    "reranker": Chain.train_reranker,
    "distilled": lambda chain: chain.train_distilled(
        chain.judged(chain.probability(chain.world.train), chain.setting.judge_weight)
    ),
    "truth": lambda chain: chain.train_distilled(chain.judged(_truth, chain.setting.judge_weight)),
}
"""Model -> its training. Each starts from models before it."""


FIFTHS = 5
"""Parts of a training whose mean losses are kept."""


def run(chain: Chain, name: str) -> Run:
    """Train a model, and return what it scores on the test pool."""
    _ = chain.world
    begun_s = time.process_time()
    found = _score_reranker(chain) if name == "reranker" else _score(chain, name)
    cpu_s = round(time.process_time() - begun_s, 1)
    losses = chain.trained(name)[1]
    parts = np.array_split(losses, min(FIFTHS, len(losses)))
    return {
        "cell": cell_of(chain.setting, name),
        "seed": chain.seed,
        "cpu_s": cpu_s,
        "losses": [round(float(part.mean()), 4) for part in parts],
        **found,
    }


def cell_of(setting: Setting, name: str) -> str:
    """Return what identifies the runs of a model."""
    return f"{name} {setting.key()}"


def _score(chain: Chain, name: str) -> Run:
    scores = chain.test(name)
    return {"hit": scores.metrics["hit@1"], "found": scores.metrics[f"hit@{chain.setting.shortlist}"]}


def _score_reranker(chain: Chain) -> Run:
    """Score the first candidates of `hard` in the orders of the re-ranker and of the teacher that is made of it."""
    scores, weight = chain.test("hard"), chain.setting.judge_weight
    rows, cosines = scores.ranked.rows, scores.ranked.scores
    pairs = np.stack([np.repeat(np.arange(len(rows)), rows.shape[1]), rows.ravel()], axis=1)
    log_odds = judge(chain.learner("reranker"), chain.world, chain.world.test, pairs).reshape(rows.shape)
    probability = torch.from_numpy(log_odds).sigmoid().numpy()
    teacher = (1 - weight) * cosines + weight * probability
    by_judge, by_teacher = (score_reranked(Shortlist(scores, order)) for order in (log_odds, teacher))
    return {
        "hit": by_judge.means["reranked"]["hit@1"],
        "teacher": by_teacher.means["reranked"]["hit@1"],
        "before": by_judge.means["before"]["hit@1"],
        "ceiling": by_judge.means["ceiling"]["hit@1"],
        "ece": by_judge.calibration.ece,
    }
