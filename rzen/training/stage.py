"""What decides the weights of a training run, next to its data."""

from __future__ import annotations

from dataclasses import dataclass

from rzen.config import AnyObjectiveConfig, ModelConfig, ModelIdentity, OptimConfig, RerankerIdentity, identity_of
from rzen.training.chunk_size import AutoChunk


@dataclass(frozen=True)
class Stage:
    """Everything that decides the weights, except the data and the number of workers."""

    model: ModelConfig
    objective: AnyObjectiveConfig
    optim: OptimConfig
    num_steps: int
    seed: int
    """Seed of new adapters and of dropout."""
    checkpoint_every_steps: int
    plan_fingerprint: str
    """Fingerprint of the batches. A checkpoint of another plan is refused."""
    chunk_tokens: int | AutoChunk | None = None
    """Tokens of a chunk for gradient caching (`rzen.model.chunks`). Decides memory and time, not the weights. Found
    before the first step where it is an `AutoChunk`."""
    stop: int | None = None
    """Pause with a checkpoint after this many steps. A model is written only after the last step. None: no pause."""
    run: str = ""
    """Id of the run, for its checkpoints."""
    settings_sha256: str = ""
    """Hash of the settings and data that decide the weights, for its checkpoints."""

    @property
    def identity(self) -> ModelIdentity | RerankerIdentity:
        """What decides the vectors, or the scores, of the trained model next to its weights."""
        return identity_of(self.model, self.objective)
