"""An exported model in mteb: every readout and kind of input, because rzen itself reads them. Needs mteb 2.

mteb.evaluate(load("runs/model"), mteb.get_tasks(["NFCorpus"]))

mteb keeps scores by name and revision. The revision is a digest of weights, prompt and readout, so that another model
in a folder of the same name is scored again. Frames and instructions that are not the defaults make an experiment.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

from pipelines.config import MediaConfig
from pipelines.errors import UserError
from pipelines.imports import import_extra
from pipelines.samples import DecodedInput, MediaKind, Visual
from rzen.config import ModelIdentity
from rzen.embedding import embedder
from rzen.embedding.embedder import Embedder
from rzen.model.checkpoints import HUB_NAME, checkpoint_dir, checkpoint_sha256, read_identity, read_identity_file

FRAMES = 8
"""Frames of a video by default, as MMEB-V2."""


class MtebEncoder:
    """What mteb calls an encoder (`mteb.EncoderProtocol`).

    `instructions` by name or type of a task, or `query` and `document`. Where they name none, the task's own prompt is
    taken, and where it has none, that of its kind in mteb. Documents have an instruction only if one is given for them.

    Of a video, `frames` are taken, uniform over its length. Files are decoded as in training, so that mteb's decoder
    need not be installed. The first and the last frame are included where mteb passes a decoder.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        instructions: Mapping[str, str] | None = None,
        frames: int = FRAMES,
    ) -> None:
        self._frames = frames
        self._embedder = embedder.load(model_name, device=device, media=MediaConfig(frames=frames))
        self._instructions = dict(instructions or {})
        self.mteb_model_meta = model_meta(model_name, self._embedder, revision, self._instructions, frames)

    def encode(
        self, inputs: Iterable[Mapping[str, Any]], *, task_metadata: Any, prompt_type: Any = None, **kwargs: Any
    ) -> npt.NDArray[np.float32]:
        """Unit vectors `[N, D]` of the batches in `inputs`, in their order."""
        kind = prompt_type.value if prompt_type else ""
        instruction = instruction_of(task_metadata, kind, self._instructions, _prompt_of_kind)
        vectors = []
        for batch in with_video_files(inputs):
            vectors.append(self._embedder.encode(inputs_of(batch, instruction, self._frames, self._embedder.decode)))
        return np.concatenate(vectors)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Inner products `[N, M]` of unit vectors."""
        return torch.as_tensor(embeddings1) @ torch.as_tensor(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Inner products `[N]` of rows with rows."""
        return (torch.as_tensor(embeddings1) * torch.as_tensor(embeddings2)).sum(dim=-1)


def instruction_of(
    task_metadata: Any, kind: str, instructions: Mapping[str, str], prompt_of_kind: Callable[[str], str]
) -> str:
    """Return the instruction of a task's inputs of this kind: `query`, `document`, or empty for tasks without both.

    `prompt_of_kind` gives the prompt of the task's kind, by the task's name.
    """
    names = ("document",) if kind == "document" else (task_metadata.name, task_metadata.type, kind)
    for name in names:
        if name in instructions:
            return instructions[name]
    prompt = task_metadata.prompt
    if isinstance(prompt, Mapping):
        return str(prompt.get(kind or "query") or "")
    if kind == "document":
        return ""
    return str(prompt or prompt_of_kind(task_metadata.name))


def _prompt_of_kind(task: str) -> str:
    """Return what mteb asks for tasks of this kind, such as all retrieval tasks."""
    found: str = importlib.import_module("mteb.abstasks.abstask").get_abstask_prompt(task)
    return found


def with_video_files(loader: Any) -> Any:
    """Return a data loader of mteb that passes videos as files, undecoded; any other iterable as it is."""
    features = getattr(getattr(loader, "dataset", None), "features", None) or {}
    stored = [name for name, feature in features.items() if type(feature).__name__ == "Video" and feature.decode]
    if not stored:
        return loader
    dataset = loader.dataset
    for name in stored:
        dataset = dataset.cast_column(name, type(features[name])(decode=False))
    return DataLoader(dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn)


def inputs_of(
    batch: Mapping[str, Any], instruction: str, frames: int, decode: Callable[[MediaKind, bytes], Visual]
) -> list[DecodedInput]:
    """One input for each row of a batch of mteb: texts, PIL images, videos as files or torchcodec's decoders.

    A query that brings an instruction of its own is read with that. Raises `UserError` for sound, and `BadMedia` for a
    video that `decode` cannot read.
    """
    if "audio" in batch:
        raise UserError("mteb", "the task has sound", "choose tasks of texts, images and videos")
    size = len(next(iter(batch.values())))
    texts, instructions = batch.get("text") or [""] * size, [instruction] * size
    if "instruction" in batch:
        texts, instructions = batch["query"], batch["instruction"]
    images, videos = batch.get("image") or [None] * size, batch.get("video") or [None] * size
    return [
        DecodedInput(text=text or "", visuals=(*_images(some), *_videos(video, frames, decode)), instruction=own or "")
        for text, some, video, own in zip(texts, images, videos, instructions, strict=True)
    ]


def _images(images: Any) -> list[Visual]:
    several = images if isinstance(images, list | tuple) else [images]
    return [Visual("image", np.asarray(image.convert("RGB"))[None]) for image in several if image is not None]


def _videos(video: Any, frames: int, decode: Callable[[MediaKind, bytes], Visual]) -> list[Visual]:
    if video is None:
        return []
    if isinstance(video, Mapping):
        return [decode("video", video["bytes"] or Path(video["path"]).read_bytes())]
    last = video.metadata.num_frames - 1
    count = min(frames, last + 1)
    shown = video.get_frames_at([number * last // max(count - 1, 1) for number in range(count)])
    return [Visual("video", shown.data.numpy().transpose(0, 2, 3, 1), tuple(shown.pts_seconds.tolist()))]


def model_meta(
    model_dir: str,
    embedder: Embedder,
    revision: str | None = None,
    instructions: Mapping[str, str] | None = None,
    frames: int = FRAMES,
) -> Any:
    """The `mteb.ModelMeta` of an exported model: what its directory says, and None for what it does not."""
    backbone: Any = embedder.model.backbone
    folder = checkpoint_dir(model_dir)
    saved = read_identity_file(folder)
    base = saved.get("lineage", {}).get("base", "")
    num_parameters = sum(parameter.numel() for parameter in backbone.parameters())
    module: Any = importlib.import_module("mteb.models")  # by name: it is not installed where types are checked
    return module.ModelMeta(
        loader=partial(_load_again, model_dir, dict(instructions or {}), frames),
        name=f"rzen/{Path(model_dir).resolve().name}",
        revision=revision or model_revision(folder),
        release_date=None,
        languages=None,
        n_parameters=num_parameters,
        n_embedding_parameters=backbone.get_input_embeddings().weight.numel(),
        memory_usage_mb=None,
        max_tokens=embedder.processor.prompt.max_text_tokens,
        embed_dim=backbone.config.get_text_config().hidden_size,
        license=_known_license(saved.get("license")),
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch", "Transformers", "safetensors"],
        similarity_fn_name="cosine",
        use_instructions=True,
        training_datasets=set(saved["training_data"]) if saved.get("training_data") else None,
        adapted_from=base if HUB_NAME.fullmatch(base) and not Path(base).exists() else None,
        modalities=["text", "image", "video"],
        experiment_kwargs=experiment(instructions or {}, frames),
    )


def model_revision(folder: Path) -> str:
    """Return 40 hex digits that identify the vectors of a model: its weights, prompt and readout. Reads all weights."""
    identity = read_identity(folder, ModelIdentity()).model_dump()
    content = json.dumps([checkpoint_sha256(folder), identity], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:40]


def experiment(instructions: Mapping[str, str], frames: int) -> dict[str, Any] | None:
    """Return what changes the scores of one revision, None for the defaults. mteb makes the name of a folder of it."""
    changed: dict[str, Any] = {}
    if frames != FRAMES:
        changed["frames"] = frames
    if instructions:
        changed["instructions"] = hashlib.sha256(json.dumps(instructions, sort_keys=True).encode()).hexdigest()[:12]
    return changed or None


def _load_again(
    model_dir: str,
    instructions: Mapping[str, str],
    frames: int,
    name: str,
    revision: str | None = None,
    device: str | None = None,
    **experiment: Any,
) -> MtebEncoder:
    """Load the same encoder. mteb passes the name of the model, and as options what `experiment` has returned."""
    return MtebEncoder(model_dir, revision, device=device, instructions=instructions, frames=frames)


def _known_license(license: str | None) -> str | None:
    """Return the license as mteb writes it: one of its list, or a link. None for another one."""
    if license is None or license.startswith("https://"):
        return license
    types: Any = importlib.import_module("mteb.types")
    return license.lower() if license.lower() in get_args(types.Licenses) else None


def load(model_dir: str, instructions: Mapping[str, str] | None = None, frames: int = FRAMES) -> MtebEncoder:
    """The encoder of an exported model. Raises `UserError` where mteb is not installed."""
    import_extra("mteb", "mteb", "rzen.export.mteb")
    return MtebEncoder(model_dir, instructions=instructions, frames=frames)
