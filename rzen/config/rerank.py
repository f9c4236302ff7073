"""Settings of a re-ranker: how a query and a document become one sequence, and what it is trained to do."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, model_validator

from pipelines.config import Config, PositiveFloat, PositiveInt
from rzen.config.model import ModelIdentity
from rzen.config.objective import ObjectiveConfig

PairTemplateName = Literal["qwen3_reranker", "lamra"]


class PairPromptConfig(Config):
    """How a query and a document become one sequence, which a model answers with yes or no."""

    template: PairTemplateName = "qwen3_reranker"
    """Named template (README of rzen/reranking/): `qwen3_reranker` of Qwen3-VL-Reranker, or `lamra` of LamRA and
    U-MARVEL. Other models understand both."""
    max_text_tokens: PositiveInt = 2000
    """Tokens of text that the query keeps, and the document. Longer texts are cut."""
    min_visual_tokens: PositiveInt = 4
    """Smaller images are enlarged to at least this many tokens (Qwen3-VL-Reranker)."""
    max_visual_tokens: PositiveInt = 1280
    """At most this many tokens for an image, and for all frames of a video together. A token is a square of the
    backbone's own size: 28 x 28 pixels in Qwen2-VL, 32 x 32 in Qwen3-VL."""

    @model_validator(mode="after")
    def _possible(self) -> PairPromptConfig:
        if self.min_visual_tokens > self.max_visual_tokens:
            raise ValueError(
                f"min_visual_tokens={self.min_visual_tokens} is above max_visual_tokens={self.max_visual_tokens}"
            )
        return self


class RerankerIdentity(Config):
    """What decides the score of a pair, next to the weights. `rzen.json` of every trained re-ranker holds it."""

    pair_prompt: PairPromptConfig = PairPromptConfig()
    """Prompt template and token budgets."""


class RerankObjectiveConfig(Config):
    """Train a re-ranker: a query and each of its candidates in one sequence, answered with yes or no.

    z is the log-odds of yes against no, the difference of two logits. The list of a query is its positive and up to
    `data.negatives_per_sample` negatives: those of the sample, then candidates of `data.candidates`. Negatives with the
    content of the positive, or of a negative before them, are left out.
    """

    kind: Literal["rerank"]
    """`contrastive`, the default, trains an embedder. `rerank` trains a re-ranker."""
    loss: Literal["bce", "listwise"] = "bce"
    """`bce`: binary cross-entropy of sigmoid(z), averaged over the pairs of a query, then over queries
    (Qwen3-VL-Reranker, LamRA). `listwise`: cross-entropy of the softmax of z over the list of a query, whose answer is
    the positive. It needs a negative, and all pairs of a list in one chunk."""
    positive_weight: PositiveFloat = 1.0
    """Weight of the positive in the mean of `bce`, where a negative has 1. The number of negatives balances yes and no.
    Our choice."""
    list_temperature: PositiveFloat = 1.0
    """Divides z in `listwise`. 1 is the cross-entropy of the log-odds themselves."""
    prompt: PairPromptConfig = PairPromptConfig()
    """How a pair is asked about. Saved with the model. `model.prompt` and `model.readout` are those of embedders."""

    @property
    def distills(self) -> bool:
        """Whether a teacher's scores are learned. They are not."""
        return False

    @property
    def distills_vectors(self) -> bool:
        """Whether a teacher's vectors are learned. They are not."""
        return False

    def check_tasks(self, tasks: Collection[str]) -> None:
        """Accept all tasks: they share all settings."""


def _kind_of(settings: Any) -> Any:
    kind = settings.get("kind", "contrastive") if isinstance(settings, dict) else getattr(settings, "kind", None)
    return kind if isinstance(kind, str) else ""


AnyObjectiveConfig = Annotated[
    Annotated[ObjectiveConfig, Tag("contrastive")] | Annotated[RerankObjectiveConfig, Tag("rerank")],
    Discriminator(
        _kind_of,
        custom_error_type="objective_kind",
        custom_error_message="must be a mapping, whose `kind` is `contrastive` (the default) or `rerank`",
    ),
]
"""What is trained: an embedder (`kind: contrastive`, the default) or a re-ranker (`kind: rerank`)."""


def prompt_setting(objective: AnyObjectiveConfig) -> str:
    """Return the setting that decides the prompt: that of an embedder, or that of a re-ranker."""
    return "objective.prompt" if isinstance(objective, RerankObjectiveConfig) else "model.prompt"


def identity_of(model: ModelIdentity, objective: AnyObjectiveConfig) -> ModelIdentity | RerankerIdentity:
    """Return what a trained model is saved with: prompt and readout of an embedder, or the prompt of a re-ranker."""
    if isinstance(objective, RerankObjectiveConfig):
        return RerankerIdentity(pair_prompt=objective.prompt)
    return model.identity
