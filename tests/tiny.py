"""A tiny real backbone of each family and a few inputs of every kind."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from pipelines.samples import DecodedInput, MediaKind, Visual
from rzen.config import ModelConfig, ModelIdentity, PromptConfig, TinyBackbone
from rzen.model.backbone import build_tiny
from rzen.training import worker

TEXTS = (
    "a red circle left of a blue square",
    "a green star above a yellow triangle",
    "the pink moon moves from left to right",
    "Which page shows the grey cross? Find it, please.",
    "Ein grüner Kreis, naïve café, 12 × 3 = 36",
)
TINY = TinyBackbone(vocabulary=640)
PROMPT = PromptConfig(max_visual_tokens=24)


def tiny_checkpoint(folder: Path, config: TinyBackbone = TINY) -> str:
    """Write the backbone into `folder` and return its path. A process builds each backbone once and copies it."""
    shutil.copytree(_built(config.model_dump_json()), folder, dirs_exist_ok=True)
    return str(folder)


def tiny_export(folder: Path) -> str:
    """An exported model below `folder`, in fp32, of few visual tokens."""
    from rzen.export.export import ExportOptions, export_model  # here, because every process of a test imports this

    identity = ModelIdentity(prompt=PromptConfig(max_visual_tokens=4))
    export_model(tiny_checkpoint(folder / "base"), None, folder / "model", identity, ExportOptions(dtype="float32"))
    return str(folder / "model")


@functools.cache
def _built(config_json: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="rzen-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build_tiny(folder, TinyBackbone.model_validate_json(config_json), TEXTS)
    return folder


def tiny_model(model_dir: str, prompt: PromptConfig = PROMPT) -> ModelConfig:
    """Settings for a tiny backbone on a CPU."""
    return ModelConfig(backbone=model_dir, prompt=prompt, dtype="float32", gradient_checkpointing=False)


def small_pieces() -> None:
    """Let this process, a worker of its own, send and spread the parameters of a tiny model as if they were large.

    Otherwise ZeRO stage 3 would leave all of them whole.
    """
    worker.WHOLE_ELEMENTS, worker.BUCKET_ELEMENTS = 0, 10_000


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}


def noise(
    kind: MediaKind, frames: int, height_px: int, width_px: int, seed: int = 0, times_s: tuple[float, ...] = ()
) -> Visual:
    """A visual of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, height_px, width_px, 3), dtype=np.uint8)
    return Visual(kind, pixels, times_s)


def mixed_inputs() -> list[DecodedInput]:
    """Text, image, page, video (odd number of frames), several of them, and fused inputs, with sizes that divide
    nothing.
    """
    image, page, video = noise("image", 1, 61, 97), noise("document", 1, 120, 85, 1), noise("video", 5, 59, 83, 2)
    timed = noise("video", 4, 70, 66, 3, times_s=(0.0, 0.7, 1.4, 2.1))
    return [
        DecodedInput(text=TEXTS[0]),
        DecodedInput(visuals=(image,)),
        DecodedInput(text=TEXTS[3], instruction="Find the page that answers the question."),
        DecodedInput(visuals=(page,), instruction="Represent the page."),
        DecodedInput(visuals=(video,)),
        DecodedInput(text=TEXTS[2], visuals=(timed, image, video), instruction="Find the video."),
        DecodedInput(text="x"),
        DecodedInput(text=TEXTS[1], visuals=(image, page)),
        DecodedInput(visuals=(page, page, image)),
    ]
