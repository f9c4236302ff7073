"""Settings of a re-ranker's prompt: how a query and a document become one sequence."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipelines.config import Config, PositiveInt

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
