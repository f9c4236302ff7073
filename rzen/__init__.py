"""The learning half: batches in, trained embedding models out.

    import rzen

    model = rzen.load("runs/model")                                   # a folder, an s3:// or gs:// URL, a hub name
    vectors = model.encode(["a red circle", "photo.jpg", image])      # float32 [3, D], of length 1
    hits = model.search("runs/vectors", "a red circle")               # what `rzen embed` wrote
    ranked = rzen.load_reranker("reranker").rank("a red circle", ["photo.jpg", image])

All names are imported on first use, so that `import rzen` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.errors import BadMedia, UserError
    from rzen.embedding.embedder import Embedder, load
    from rzen.reranking.reranker import Reranker, load_reranker

    __version__: str

__all__ = ["BadMedia", "Embedder", "Reranker", "UserError", "__version__", "load", "load_reranker"]
_MODULES = {
    "BadMedia": "pipelines.errors",
    "UserError": "pipelines.errors",
    "Embedder": "rzen.embedding.embedder",
    "load": "rzen.embedding.embedder",
    "Reranker": "rzen.reranking.reranker",
    "load_reranker": "rzen.reranking.reranker",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("rzen")
    if name not in _MODULES:
        raise AttributeError(f"module 'rzen' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
