"""An exported model in mteb: every readout and kind of input, because rzen itself reads them. Needs mteb 2.

mteb.evaluate(load("runs/model"), mteb.get_tasks(["NFCorpus"]))
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipelines.errors import UserError
from pipelines.samples import DecodedInput, Visual
from rzen.model import embedder
from rzen.model.embedder import Embedder


class MtebEncoder:
    """What mteb calls an encoder (`mteb.EncoderProtocol`).

    `instructions` by name of a task, or `query` and `document`; where they name none, the task's own prompt is taken.
    Of a video that comes as a decoder, `frames` are taken, uniform over their order, the first and the last included.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        instructions: Mapping[str, str] | None = None,
        frames: int = 8,
    ) -> None:
        self._frames = frames
        self._embedder = embedder.load(model_name, device=device)
        self._instructions = instructions or {}
        self.mteb_model_meta = model_meta(model_name, self._embedder, revision, instructions)

    def encode(
        self, inputs: Iterable[Mapping[str, Any]], *, task_metadata: Any, prompt_type: Any = None, **kwargs: Any
    ) -> npt.NDArray[np.float32]:
        """Unit vectors `[N, D]` of the batches in `inputs`, in their order."""
        instruction = self._instruction(task_metadata, prompt_type)
        vectors = [self._embedder.embed(inputs_of(batch, instruction, self._frames)) for batch in inputs]
        return np.concatenate(vectors)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Inner products `[N, M]` of unit vectors."""
        return torch.as_tensor(embeddings1) @ torch.as_tensor(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Inner products `[N]` of rows with rows."""
        return (torch.as_tensor(embeddings1) * torch.as_tensor(embeddings2)).sum(dim=-1)

    def _instruction(self, task_metadata: Any, prompt_type: Any) -> str:
        kind = prompt_type.value if prompt_type else ""
        for name in ("document",) if kind == "document" else (task_metadata.name, kind):
            if name in self._instructions:
                return self._instructions[name]
        prompt = task_metadata.prompt
        if isinstance(prompt, Mapping):
            return str(prompt.get(kind) or "")
        return "" if kind == "document" else str(prompt or "")


def inputs_of(batch: Mapping[str, Any], instruction: str, frames: int) -> list[DecodedInput]:
    """One input for each row of a batch of mteb: texts, PIL images, videos as torchcodec's decoders.

    A query that brings an instruction of its own is read with that. Raises `UserError` for sound.
    """
    if "audio" in batch:
        raise UserError("mteb", "the task has sound", "choose tasks of texts, images and videos")
    size = len(next(iter(batch.values())))
    texts, instructions = batch.get("text") or [""] * size, [instruction] * size
    if "instruction" in batch:
        texts, instructions = batch["query"], batch["instruction"]
    images, videos = batch.get("image") or [None] * size, batch.get("video") or [None] * size
    return [
        DecodedInput(text=text or "", visuals=(*_images(some), *_videos(video, frames)), instruction=own or "")
        for text, some, video, own in zip(texts, images, videos, instructions, strict=True)
    ]


def _images(images: Any) -> list[Visual]:
    several = images if isinstance(images, list | tuple) else [images]
    return [Visual("image", np.asarray(image.convert("RGB"))[None]) for image in several if image is not None]


def _videos(video: Any, frames: int) -> list[Visual]:
    if video is None:
        return []
    last = video.metadata.num_frames - 1
    count = min(frames, last + 1)
    shown = video.get_frames_at([number * last // max(count - 1, 1) for number in range(count)])
    return [Visual("video", shown.data.numpy().transpose(0, 2, 3, 1), tuple(shown.pts_seconds.tolist()))]


def model_meta(
    model_dir: str,
    embedder: Embedder,
    revision: str | None = None,
    instructions: Mapping[str, str] | None = None,
) -> Any:
    """The `mteb.ModelMeta` of an exported model: what its directory says, and None for what it does not."""
    backbone: Any = embedder.model.backbone
    num_parameters = sum(parameter.numel() for parameter in backbone.parameters())
    module: Any = importlib.import_module("mteb.models")  # by name: it is not installed where types are checked
    return module.ModelMeta(
        loader=partial(MtebEncoder, instructions=instructions),
        name=f"rzen/{Path(model_dir).resolve().name}",
        revision=revision or "unknown",
        release_date=None,
        languages=None,
        n_parameters=num_parameters,
        n_embedding_parameters=backbone.get_input_embeddings().weight.numel(),
        memory_usage_mb=None,
        max_tokens=embedder.processor.prompt.max_text_tokens,
        embed_dim=backbone.config.get_text_config().hidden_size,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch", "Transformers", "safetensors"],
        similarity_fn_name="cosine",
        use_instructions=True,
        training_datasets=None,
        modalities=["text", "image", "video"],
    )


def load(model_dir: str, instructions: Mapping[str, str] | None = None, frames: int = 8) -> MtebEncoder:
    """The encoder of an exported model. Raises `UserError` where mteb is not installed."""
    if importlib.util.find_spec("mteb") is None:
        raise UserError("mteb", "is not installed", "pip install rzen[mteb]")
    return MtebEncoder(model_dir, instructions=instructions, frames=frames)
