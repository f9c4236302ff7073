"""Backbones of a real shape with random weights, and encoded batches of random content: no files, nothing decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from rzen.config import LoraConfig, PromptConfig, TinyBackbone
from rzen.families import CLIP_MEAN, CLIP_STD, FAMILIES
from rzen.inputs.pairs import EncodedPairs, PairEncoder
from rzen.inputs.processor import GRID_KINDS, EncodedBatch, Processor, VisionLayout
from rzen.inputs.prompts import VisionKind
from rzen.model.lora import add_lora
from rzen.model.vision import use_fast_vision

HEAD_TOKENS, TAIL_TOKENS = 30, 15  # about what a template puts around a side
LAYOUT = VisionLayout(14, 2, 2, CLIP_MEAN, CLIP_STD)
collate = PairEncoder(Processor("none", PromptConfig())).collate


@dataclass(frozen=True)
class Shape:
    """A backbone, and how much smaller than real its texts and visuals are."""

    settings: dict[str, Any]
    """Of `Qwen2VLConfig`."""
    shrink: int
    """Visuals have sides so many times shorter, texts so many times squared fewer tokens."""

    @property
    def config(self) -> PreTrainedConfig:
        """Of the real class."""
        return AutoConfig.for_model("qwen2_vl", **self.settings)


def _tiny() -> dict[str, Any]:
    text, vision = FAMILIES["qwen2_vl"].tiny(TinyBackbone())
    ids = {"vision_start_token_id": 636, "vision_end_token_id": 637, "image_token_id": 638, "video_token_id": 639}
    return {
        "text_config": text | {"vocab_size": 640, "bos_token_id": None, "eos_token_id": None},
        "vision_config": vision,
        "tie_word_embeddings": True,
    } | ids


_TEXT_2B = {  # config.json of Qwen/Qwen2-VL-2B-Instruct; the numbers of special tokens are the class's own
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
_VISION_2B = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4}
SHAPES = {
    "2b": Shape({"text_config": _TEXT_2B, "vision_config": _VISION_2B, "tie_word_embeddings": True}, shrink=1),
    "tiny": Shape(_tiny(), shrink=4),
}


def build(shape: Shape, device: str, attention: str, *, checkpointing: bool = True) -> peft.PeftModel:
    """A random backbone with an adapter of rank 64, on the device: bf16 on a GPU, as DeepSpeed holds it, else fp32."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        backbone: PreTrainedModel = AutoModel.from_config(shape.config, dtype=dtype, attn_implementation=attention)
    use_fast_vision(backbone)
    if checkpointing:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = add_lora(backbone, LoraConfig(), seed=0)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.train()


@dataclass(frozen=True)
class Content:
    """What a side consists of, before there are any pixels."""

    words: int = 0
    """Tokens of its text."""
    visuals: tuple[tuple[VisionKind, int, int, int], ...] = ()
    """Kind, and tokens along time, height and width."""

    @property
    def num_tokens(self) -> int:
        """Of the whole side."""
        seen = sum(t * h * w + 2 for _, t, h, w in self.visuals)
        return HEAD_TOKENS + seen + self.words + TAIL_TOKENS


Pair = tuple[Content, Content]


def images_of(num_tokens: int, num_pairs: int, shrink: int) -> list[Pair]:
    """Short texts, and images of 256, 576 or 1280 tokens."""
    height, width = {256: (16, 16), 576: (24, 24), 1280: (32, 40)}[num_tokens]
    target = Content(visuals=(("image", 1, height // shrink, width // shrink),))
    words = np.random.default_rng(0).integers(8, 40, num_pairs)
    return [(Content(max(1, int(number) // shrink**2)), target) for number in words]


def mixed(num_pairs: int, shrink: int) -> list[Pair]:
    """Texts of 20 to 600 tokens, images of 64 to 1225, pages of 1120 and clips of 320 to 1280, in turn.

    Queries are short texts; every fifth also has an image of 256 tokens.
    """
    rng = np.random.default_rng(0)
    pairs = []
    for number in range(num_pairs):
        height, width = (int(input) // shrink for input in rng.integers(8, 36, 2))
        target = (
            Content(words=max(1, int(rng.integers(20, 601)) // shrink**2)),
            Content(visuals=(("image", 1, height, width),)),
            Content(visuals=(("image", 1, 40 // shrink, 28 // shrink),)),
            Content(visuals=(("video", int(rng.choice([2, 4, 8])), 8 // shrink, 20 // shrink),)),
        )[number % 4]
        image: tuple[tuple[VisionKind, int, int, int], ...] = (("image", 1, 16 // shrink, 16 // shrink),)
        words = max(1, int(rng.integers(5, 60)) // shrink**2)
        pairs.append((Content(words, image if number % 5 == 4 else ()), target))
    return pairs


def encode(pairs: Sequence[Pair], config: Any) -> list[EncodedPairs]:
    """Each pair for a backbone of this configuration, with random ids and pixels. No two targets are duplicates."""
    rng = np.random.default_rng(1)
    return [
        EncodedPairs(
            queries=_encode(query, config, rng),
            targets=_encode(target, config, rng),
            target_ids=np.array([number]),
            query_ids=np.array([-1 - number]),
            instruction_ids=np.zeros(1, np.int64),
            negatives=None,
            negative_counts=np.zeros(1, np.int64),
            negative_ids=np.zeros(0, np.int64),
            keys=(f"synthetic/{number}",),
            relevance=np.full(1, np.nan),
            teacher_scores=np.full(1, np.nan, np.float32),
            negative_teacher_scores=np.zeros(0, np.float32),
            vector_ids=np.zeros((1, 2), "S32"),
        )
        for number, (query, target) in enumerate(pairs)
    ]


def _encode(content: Content, config: Any, rng: np.random.Generator) -> EncodedBatch:
    def text(num_tokens: int) -> list[int]:
        return rng.integers(config.vision_start_token_id, size=num_tokens).tolist()

    ids = text(HEAD_TOKENS)
    grids = []
    for kind, t, h, w in content.visuals:
        pad = config.image_token_id if kind == "image" else config.video_token_id
        ids += [config.vision_start_token_id, *[pad] * (t * h * w), config.vision_end_token_id]
        grids.append((t, LAYOUT.merge_patches * h, LAYOUT.merge_patches * w))
    ids += text(content.words + TAIL_TOKENS)
    num_frames = [LAYOUT.temporal_patch_frames if kind == "video" else 1 for kind, *_ in content.visuals]
    num_rows = sum(t * h * w * frames for (t, h, w), frames in zip(grids, num_frames, strict=True))
    kinds = [GRID_KINDS[kind] for kind, *_ in content.visuals]
    return EncodedBatch(
        input_ids=np.array(ids, np.int32),
        instruction=np.zeros(len(ids), np.bool_),
        lengths=np.array([len(ids)], np.int32),
        visual_counts=np.array([len(grids)], np.int32),
        patches=rng.integers(256, size=(num_rows, 3 * LAYOUT.patch_px**2), dtype=np.uint8),
        patch_frames=np.array(num_frames, np.uint8),
        grids=np.array(grids, np.int32).reshape(-1, 3),
        grid_kinds=np.array(kinds, np.uint8),
        grid_seconds=np.ones(len(grids), np.float32),
    )
