"""What a leaderboard wants to know about a model."""

from __future__ import annotations

from datetime import date
from typing import Literal

from pydantic import Field, model_validator

from pipelines.config import Config, PositiveInt


class ModelCard(Config):
    """What an entry of the leaderboard of MMEB-V2 says about its model."""

    model_name: str = Field(min_length=1)
    """Name on the leaderboard."""
    model_backbone: str = Field(min_length=1)
    """Backbone, for example `Qwen2-VL`."""
    model_size: str = Field(min_length=1)
    """Number of parameters, for example `2B parameters`."""
    embedding_dimension: PositiveInt
    """Width of its vectors."""
    max_length_tokens: PositiveInt
    """Longest sequence that it was evaluated with."""
    model_release_date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    """Year, month and day."""
    data_source: Literal["Self-Reported"] = "Self-Reported"
    """Who measured."""
    url: str = Field(pattern=r"^https?://")
    """Address of the paper, code or weights."""

    @model_validator(mode="after")
    def _is_a_day(self) -> ModelCard:
        date.fromisoformat(self.model_release_date)
        return self
