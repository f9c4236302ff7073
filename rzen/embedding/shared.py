"""Several adapters on one base: its weights are in memory once, and each adapter gives vectors of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from rzen.config import ModelIdentity
from rzen.embedding.embedder import Embedder, Vectors
from rzen.inputs.processor import EncodedBatch, Processor
from rzen.model.checkpoints import MadeBy, check_base, checkpoint_sha256, read_identity
from rzen.model.embedding_model import EmbeddingModel
from rzen.model.locate import local_folder
from rzen.model.lora import AdapterBank


class SharedEmbedder(Embedder):
    """One adapter, or none, on a base that others share. They may not be used by several threads at once."""

    def __init__(self, *arguments: Any, bank: AdapterBank, name: str | None, made_by: MadeBy, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._bank, self._name, self._made_by = bank, name, made_by

    def embed_encoded(self, inputs: Sequence[EncodedBatch], batch_size: int | None = None) -> Vectors:
        """Return unit vectors `[len(inputs), D]` of inputs that were encoded elsewhere, each a batch of one."""
        with self._bank.active(self._name):
            return super().embed_encoded(inputs, batch_size)


def share(base: Embedder, adapters: Mapping[str, str], endpoint: str | None = None) -> dict[str | None, SharedEmbedder]:
    """Put adapters on the base of an embedder without one, in place. Return name -> embedder, and None -> the base.

    Use the returned ones instead of `base`. Raises `UserError` for an adapter of another base, or with another readout.
    """
    backbone: Any = base.model.backbone
    device = next(backbone.parameters()).device
    bank = AdapterBank(backbone)
    whole = base.made_by

    def shared(name: str | None, processor: Processor, adapter: Path | None) -> SharedEmbedder:
        model = EmbeddingModel(backbone, processor.layout, base.model.readout, base.model.packing).to(device)
        tuned = None if adapter is None else checkpoint_sha256(adapter)
        identity = ModelIdentity(prompt=processor.prompt, readout=base.model.readout)
        return SharedEmbedder(
            processor,
            model,
            base.chunk_tokens,
            base.media,
            base=base.base,
            adapter=adapter,
            endpoint=endpoint,
            bank=bank,
            name=name,
            made_by=MadeBy(base=whole["base"], adapter=tuned, identity=identity),
        )

    found: dict[str | None, SharedEmbedder] = {None: shared(None, base.processor, None)}
    for name, url in adapters.items():
        folder = Path(local_folder(url, endpoint))
        check_base(folder, base.base)
        identity = read_identity(folder, whole["identity"])
        if identity.readout != base.model.readout:
            problem = f"was trained with the readout {identity.readout}, and its base has {base.model.readout}"
            raise UserError(f"adapters.{name} {url}", problem, "serve it by itself: model and adapter")
        bank.add(name, folder)
        found[name] = shared(name, Processor(str(base.base), identity.prompt), folder)
    backbone.requires_grad_(False).eval().to(device)
    return found
