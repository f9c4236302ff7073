"""The learning half: batches in, trained embedding models out.

    import rzen

    embedder = rzen.load("runs/model")                   # a checkpoint, an export, or a hub name
    vectors = embedder.embed(["a red circle", image])    # float32 [2, D], of length 1

`load` and `Embedder` are imported on first use, so that `import rzen` loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rzen.model.embedder import Embedder, load

__all__ = ["Embedder", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'rzen' has no attribute {name!r}")
    from rzen.model import embedder

    return getattr(embedder, name)
