"""How a spec names a trained model."""

from __future__ import annotations

from pipelines.config import Config


class ModelRef(Config):
    """A trained model: a checkpoint, with an adapter if it was tuned with LoRA."""

    base: str
    """Checkpoint: a directory, an s3:// URL or a hub name."""
    adapter: str | None = None
    """Adapter: a directory or an s3:// URL."""
    instructions: bool = True
    """Whether to evaluate with instructions. Models of stage 1 were trained without them: set false."""
