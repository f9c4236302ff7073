"""Exports opened in sentence-transformers. Without torchvision, they take texts and images, and no videos.

transformers alone has no processor for these backbones without torchvision: its processor of videos needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from PIL import Image
from transformers import AutoProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import ProcessorMixin

from pipelines.samples import DecodedInput
from rzen.config import BackboneFamily
from rzen.evaluation.vectors import FloatArray

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def has_torchvision() -> bool:
    """Return whether torchvision is installed, so that videos can be processed, too."""
    return find_spec("torchvision") is not None


def open_in_sentence_transformers(folder: str | Path, device: str | None = None) -> SentenceTransformer:
    """Return `SentenceTransformer(folder)`. Without torchvision, `register_processors` is called before.

    Raises `ImportError` where sentence-transformers is not installed.
    """
    from sentence_transformers import SentenceTransformer

    if not has_torchvision():
        register_processors()
    return SentenceTransformer(str(folder), device=device)


def encode_decoded(model: SentenceTransformer, inputs: Sequence[DecodedInput], **settings: Any) -> FloatArray:
    """Return the vectors `[N, D]` that `encode` gives with `settings`, one input a call: each has its instruction."""
    vectors = [
        model.encode([_parts(given)], prompt=given.instruction or None, show_progress_bar=False, **settings)[0]
        for given in inputs
    ]
    return np.stack(vectors)


def _parts(given: DecodedInput) -> dict[str, Any]:
    """Return an input as sentence-transformers takes it."""
    images = [Image.fromarray(visual.frames[0]) for visual in given.visuals if visual.kind != "video"]
    videos = [visual.frames.transpose(0, 3, 1, 2) for visual in given.visuals if visual.kind == "video"]
    parts = {"image": images, "video": videos, "text": given.text}
    return {name: part for name, part in parts.items() if part}


@cache
def register_processors() -> None:
    """Let `AutoProcessor` of this process open all backbone families without their processor of videos.

    The processors are those of transformers in everything else. They raise `ImportError` for a video.
    """
    for family in get_args(BackboneFamily):
        config = CONFIG_MAPPING[family]
        AutoProcessor.register(config, _without_videos(PROCESSOR_MAPPING[config]), exist_ok=True)


class _DropVideoProcessor(ProcessorMixin):  # type: ignore[misc]
    """Stands between a processor and its base class, and passes no processor of videos on."""

    def __init__(self, image_processor: Any, tokenizer: Any, video_processor: None, **others: Any) -> None:
        super().__init__(image_processor, tokenizer, **others)


def _without_videos(processor: type[ProcessorMixin]) -> type[ProcessorMixin]:
    class WithoutVideos(processor, _DropVideoProcessor):  # type: ignore[misc]
        # transformers loads what the signature names.
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

        def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **others: Any) -> Any:
            if videos is not None:
                raise ImportError("videos need torchvision: pip install torchvision")
            return super().__call__(images=images, text=text, **others)

    WithoutVideos.__name__ = processor.__name__
    return WithoutVideos
