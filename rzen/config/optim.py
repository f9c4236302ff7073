"""Settings of the optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipelines.config import Config, Fraction, NonNegativeInt, PositiveFloat
from rzen.config.objective import NonNegativeFloat


class OptimConfig(Config):
    """AdamW with warm-up and cosine decay (paper, section 4)."""

    lr: PositiveFloat = 2.0e-4
    """Peak learning rate (paper)."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay of matrices. Temperatures, norms and biases have none (paper: 0.05)."""
    warmup_fraction: Fraction = 0.03
    """Share of the steps in which the rate rises linearly. Our choice."""
    final_lr_fraction: Fraction = 0.0
    """Rate at the last step relative to the peak."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """Decay rates of AdamW's moments, below 1."""
    max_grad_norm: PositiveFloat = 1.0
    """The global gradient norm is clipped to this. Our choice."""
    max_skipped_steps: NonNegativeInt = 5
    """Steps in a row that may be skipped because their loss or gradient is not finite. One more ends the run with the
    names of the samples. Our choice."""
    zero_stage: Literal[1, 2, 3] = 1
    """What DeepSpeed ZeRO shards across workers: 1 the optimizer's state, 2 also gradients, 3 also all weights. Stage 3
    gathers weights whenever they are used. It is for models that do not fit otherwise."""
