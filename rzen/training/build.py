"""Builds the learner of a stage, an embedder or a re-ranker, by its settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from rzen.config import RerankObjectiveConfig
from rzen.inputs.processor import VisionLayout
from rzen.model.backbone import load_backbone
from rzen.model.checkpoints import check_base, checkpoint_dir
from rzen.model.embedding_model import EmbeddingModel
from rzen.model.lora import add_lora, load_adapter
from rzen.objective.loss import Objective
from rzen.reranking.encoder import JointEncoder
from rzen.reranking.head import answer_direction, is_tied
from rzen.reranking.model import ScoringModel
from rzen.training.chunk_size import AutoChunk
from rzen.training.init_adapter import read_init_adapter
from rzen.training.learner import Learner
from rzen.training.rerank import RerankLearner
from rzen.training.stage import Stage
from rzen.training.step import EmbeddingLearner
from rzen.training.temperatures import carried_temperatures


def build_learner(stage: Stage, backbone_dir: str, init_adapter: Path | None, tasks: Sequence[str]) -> Learner:
    """Return backbone, new or given adapter, and one temperature per task, on the CPU. Equal on all ranks.

    Raises `UserError` for a directory that is no checkpoint, for an adapter that does not fit or has another base than
    the backbone, and for settings that contradict it.
    """
    model, base = stage.model, checkpoint_dir(backbone_dir)
    if init_adapter is not None:
        if model.tune != "lora":
            raise UserError("init_adapter", "needs tune=lora", "export base and adapter, and train the result")
        read_init_adapter(init_adapter, model.lora)
        check_base(init_adapter, base)
    backbone = load_backbone(backbone_dir, model)
    if init_adapter is not None:
        backbone = load_adapter(backbone, init_adapter, trainable=True)
    elif model.tune == "lora":
        backbone = add_lora(backbone, model.lora, stage.seed)
    layout = VisionLayout.read(str(base))
    lockstep = stage.optim.zero_stage == 3
    chunk_tokens = None if isinstance(stage.chunk_tokens, AutoChunk) else stage.chunk_tokens
    objective = stage.objective
    if isinstance(objective, RerankObjectiveConfig):
        scorer = _build_scorer(stage, objective, backbone, base, layout)
        return RerankLearner(scorer, objective, chunk_tokens, lockstep=lockstep)
    embedder = EmbeddingModel(backbone, layout, model.readout, model.packing)
    first = carried_temperatures(objective.temperature, init_adapter or base)
    return EmbeddingLearner(embedder, Objective(objective, tasks, first=first), chunk_tokens, lockstep=lockstep)


def _build_scorer(
    stage: Stage, objective: RerankObjectiveConfig, backbone: Any, base: Path, layout: VisionLayout
) -> ScoringModel:
    """Return the model of a re-ranker. Its head is frozen, unless it is tied to embeddings that are trained."""
    answers = JointEncoder(str(base), objective.prompt).answer_ids
    direction = answer_direction(base, backbone, answers)
    trained = answers if stage.model.tune == "full" and is_tied(base) else None
    return ScoringModel(backbone, layout, direction, stage.model.packing, trained_answers=trained)
