"""Backbone families: what differs between them, one entry of a table each. Imports neither torch nor transformers.

The classes are transformers' own, found by `model_type`. Everything that a checkpoint says itself (patch size, means,
token numbers) is read from it; an entry holds what it does not say, and the shape of a tiny one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from rzen.config import BackboneFamily, TinyBackbone

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Configs = tuple[dict[str, Any], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """One kind of backbone."""

    title: str
    """What people call it."""
    timestamps: bool
    """Whether a video is written as its temporal patches one by one, each after its time (Qwen3-VL's processor)."""
    patch_px: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    tiny: Callable[[TinyBackbone], Configs]
    """Text and vision settings of a tiny random one, in the words of its configuration class."""


def _text(config: TinyBackbone, rope: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden,
        "intermediate_size": 2 * config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": max(1, config.heads // 2),
        "initializer_range": config.init_std,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6} | rope,
    }


def _vision(config: TinyBackbone, width: str, out: str) -> dict[str, Any]:
    return {
        "depth": config.vision_depth,
        width: config.vision_width,
        out: config.hidden,
        "num_heads": config.heads,
        "initializer_range": config.init_std,
    }


def _qwen2_vl(config: TinyBackbone) -> Configs:
    return _text(config, _mrope(config)), _vision(config, "embed_dim", "hidden_size")


def _qwen2_5_vl(config: TinyBackbone) -> Configs:
    """Its blocks look through windows (here of 2 x 2 tokens), all but some; its times count in positions."""
    vision = _vision(config, "hidden_size", "out_hidden_size") | {
        "intermediate_size": 2 * config.vision_width,
        "window_size": 56,
        "fullatt_block_indexes": [config.vision_depth - 1],
        "tokens_per_second": 2,
    }
    return _text(config, _mrope(config)), vision


def _qwen3_vl(config: TinyBackbone) -> Configs:
    """Its first vision block also feeds the first language layer (deepstack); its frequencies are interleaved."""
    vision = _vision(config, "hidden_size", "out_hidden_size") | {
        "intermediate_size": 2 * config.vision_width,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0],
    }
    half = config.hidden // config.heads // 2
    section = [half - 2 * (half // 3), half // 3, half // 3]  # about 24 : 20 : 20
    text = _text(config, {"mrope_section": section, "mrope_interleaved": True})
    return text | {"head_dim": config.hidden // config.heads}, vision


def _mrope(config: TinyBackbone) -> dict[str, Any]:
    """Frequencies for time, height and width, in about Qwen2-VL's proportions 16 : 24 : 24."""
    half = config.hidden // config.heads // 2
    time = half // 4
    height = (half - time) // 2
    return {"mrope_section": [time, height, half - time - height]}


# By `model_type` of config.json: the checkpoints whose prompts, patches and positions are tested.
FAMILIES: dict[BackboneFamily, Family] = {
    "qwen2_vl": Family("Qwen2-VL", False, 14, CLIP_MEAN, CLIP_STD, _qwen2_vl),
    "qwen2_5_vl": Family("Qwen2.5-VL", False, 14, CLIP_MEAN, CLIP_STD, _qwen2_5_vl),
    "qwen3_vl": Family("Qwen3-VL", True, 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), _qwen3_vl),
}


def read_family(folder: Path) -> Family:
    """What is particular to the checkpoint in a directory. Raises `UserError` where it is none of the table."""
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(str(folder), "has no config.json", "name the directory of a transformers checkpoint")
    model_type = json.loads(config.read_text()).get("model_type")
    if model_type not in FAMILIES:
        raise UserError(str(folder), f"model_type {model_type!r} is not supported", f"use one of {sorted(FAMILIES)}")
    return FAMILIES[model_type]
