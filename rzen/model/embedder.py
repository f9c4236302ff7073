"""The one way from inputs to vectors: evaluation, embedding jobs, search and Python users call `Embedder`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

from pipelines.config import MediaConfig
from pipelines.errors import UserError
from pipelines.media.decode import Decoder
from pipelines.media.files import kind_of, read_file
from pipelines.samples import DecodedInput, MediaKind, Visual
from rzen.config import ModelConfig, ModelIdentity
from rzen.inputs.processor import EncodedBatch, Processor
from rzen.model.backbone import load_backbone
from rzen.model.checkpoints import check_base, checkpoint_dir, read_identity, stored_dtype
from rzen.model.chunks import chunks_of, embed
from rzen.model.embedding_model import EmbeddingModel
from rzen.model.lora import load_adapter

CHUNK_TOKENS = 16_384
_CHUNKS_AT_ONCE = 8
"""Chunks whose inputs are encoded before they are grouped by length: at most 0.7 GB of patches."""
Dtype = Literal["float32", "bfloat16"]
Embeddable = str | Path | Image.Image | DecodedInput
"""A text, a file (image, PDF page, video), an image, or any mix of text, pixels and instruction."""
Vectors = npt.NDArray[np.float32]


class Embedder:
    """Processor and model as one: inputs in, unit vectors out.

    `model` is frozen and in evaluation mode. `chunk_tokens` limits what is embedded at once, visual tokens and padding
    included. Vectors do not depend on it, but for rounding. `media` says how files become pixels. Videos and documents
    are decoded in a child process with limits.
    """

    def __init__(
        self,
        processor: Processor,
        model: EmbeddingModel,
        chunk_tokens: int = CHUNK_TOKENS,
        media: MediaConfig | None = None,
    ) -> None:
        self.processor = processor
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.media = (media or MediaConfig()).for_model(processor.visual_pixels)
        self._decoder = Decoder(self.media)

    def embed(self, inputs: Sequence[Embeddable], instruction: str = "") -> Vectors:
        """Return unit vectors `[len(inputs), D]` in fp32, in the order given; at least one input.

        `instruction` goes with all inputs, except those that have one of their own (`DecodedInput`). Raises `BadMedia`
        for an input that cannot be decoded or that the backbone cannot take.
        """
        decoded = (as_input(some, instruction, self.media, self._decoder) for some in inputs)
        return np.concatenate([self.embed_encoded(group) for group in self._groups(decoded)])

    def decode(self, kind: MediaKind, data: bytes) -> Visual:
        """Return the pixels of a file, by the limits and frames of `media`. Raises `BadMedia`."""
        return self._decoder.member(kind, data)

    def embed_encoded(self, inputs: Sequence[EncodedBatch]) -> Vectors:
        """Return unit vectors `[len(inputs), D]` of inputs that were encoded elsewhere, each a batch of one."""
        lengths = np.concatenate([one.lengths for one in inputs])
        chunks = chunks_of(lengths, self.chunk_tokens, packed=self.model.packs)
        with torch.inference_mode():
            vectors: Vectors = embed(self.model, inputs, chunks, twice=False).cpu().numpy()
        return vectors

    def _groups(self, inputs: Iterator[DecodedInput]) -> Iterator[list[EncodedBatch]]:
        """Encoded inputs, as many at a time as memory allows."""
        group: list[EncodedBatch] = []
        num_tokens = 0
        for one in inputs:
            group.append(self.processor.encode([one]))
            num_tokens += int(group[-1].lengths.sum())
            if num_tokens >= _CHUNKS_AT_ONCE * self.chunk_tokens:
                yield group
                group, num_tokens = [], 0
        if group:
            yield group


def load(
    path: str | Path,
    adapter: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: Dtype | None = None,
    identity: ModelIdentity | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    media: MediaConfig | None = None,
) -> Embedder:
    """Load a checkpoint directory, an exported model or a hub name, with or without a LoRA adapter.

    `device` is a GPU if there is one. `dtype` is that of the export; without one, float32 on a CPU and bfloat16 on a
    GPU. `identity` holds for models that do not say how they are read (`rzen.json`). Raises `UserError` for anything
    that is not a checkpoint of a supported family, and for an adapter that was trained on another checkpoint.
    """
    base = checkpoint_dir(str(path))
    if adapter is not None:
        check_base(Path(adapter), base)
    read = read_identity(Path(adapter) if adapter else base, identity or ModelIdentity())
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = ModelConfig(
        backbone=str(base), dtype=dtype or _default_dtype(base, where), gradient_checkpointing=False, tune="full"
    )
    backbone = load_backbone(str(base), config)
    processor = Processor(str(base), read.prompt)
    model = EmbeddingModel(
        load_adapter(backbone, Path(adapter)) if adapter else backbone, processor.layout, read.readout
    )
    return Embedder(processor, model.requires_grad_(False).eval().to(where), chunk_tokens, media)


def as_input(some: Embeddable, instruction: str, media: MediaConfig, decoder: Decoder) -> DecodedInput:
    """Return what a user passed as a decoded input. Raises `BadMedia`, and `UserError` for what is none."""
    match some:
        case DecodedInput():
            return some
        case str():
            return DecodedInput(text=some, instruction=instruction)
        case Image.Image():
            pixels = np.asarray(ImageOps.exif_transpose(some).convert("RGB"))
            return DecodedInput(visuals=(Visual("image", pixels[None]),), instruction=instruction)
        case Path():
            visual = decoder.member(kind_of(some), read_file(str(some), media))
            return DecodedInput(visuals=(visual,), instruction=instruction)
    raise UserError(
        f"embed({type(some).__name__})", "is not an input", "pass a str, a Path, a PIL image or a DecodedInput"
    )


def _default_dtype(folder: Path, device: str) -> Dtype:
    default: Dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return cast(Dtype | None, stored_dtype(folder)) or default
