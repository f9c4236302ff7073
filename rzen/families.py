"""Backbone families: what differs between them, one entry of a table each. Imports neither torch nor transformers.

The classes are transformers' own, found by `model_type`. rzen reads from a checkpoint what the checkpoint says (patch
size, means, token numbers). An entry holds what a checkpoint does not say, and the shape of a tiny one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from pipelines.errors import UserError
from pipelines.stored_json import read_json, stored_file
from rzen.config import BackboneFamily, Packing, ReadoutConfig, TinyBackbone

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
Configs = tuple[dict[str, Any], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of backbone."""

    title: str
    """Name for people, as the model card writes it."""
    timestamps: bool
    """Whether a video is written as its temporal patches one by one, each after its time (Qwen3-VL's processor)."""
    packs: bool
    """Whether inputs may lie end to end in one row. Recurrent layers would run on from one input into the next."""
    bidirectional: bool
    """Whether attention can go both ways in all layers of the language model."""
    tokenizer: str = "Qwen2Tokenizer"
    """transformers' class of a tiny one's tokenizer."""
    patch_px: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    tiny: Callable[[TinyBackbone], Configs]
    """Text and vision settings of a tiny random one, under the names of its configuration class."""

    @property
    def token_px(self) -> int:
        """Edge of the square that becomes one token: 2 x 2 patches, as in every published checkpoint."""
        return 2 * self.patch_px

    def check(self, readout: ReadoutConfig, packing: Packing) -> None:
        """Raise `UserError` for settings that this family cannot do."""
        if packing == "packed" and not self.packs:
            problem = f"{self.title} cannot be packed: some of its layers are recurrent and do not stop between inputs"
            raise UserError("model.packing=packed", problem, "set packing: auto, which pads here")
        if readout.direction == "bidirectional" and not self.bidirectional:
            problem = f"{self.title} cannot be bidirectional: some of its layers are recurrent and see the past only"
            raise UserError("model.readout.direction=bidirectional", problem, "set direction: causal")


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
    """All vision blocks but the last see windows only (here of 2 x 2 tokens); time counts in positions."""
    vision = _vision(config, "hidden_size", "out_hidden_size") | {
        "intermediate_size": 2 * config.vision_width,
        "window_size": 56,
        "fullatt_block_indexes": [config.vision_depth - 1],
        "tokens_per_second": 2,
    }
    return _text(config, _mrope(config)), vision


def _qwen3_vl(config: TinyBackbone) -> Configs:
    """The first vision block also feeds the first language layer (deepstack); frequencies are interleaved."""
    vision = _qwen3_vision(config) | {"deepstack_visual_indexes": [0]}
    text = _text(config, _interleaved_mrope(_head_dim(config) // 2))
    return text | {"head_dim": _head_dim(config)}, vision


def _qwen3_5(config: TinyBackbone) -> Configs:
    """All language layers but the last are recurrent; half of a head's values turn with the position (really 1/4)."""
    head = _head_dim(config)
    text = _text(config, _interleaved_mrope(head // 4) | {"partial_rotary_factor": 0.5}) | {
        "head_dim": head,
        "layer_types": ["linear_attention"] * (config.layers - 1) + ["full_attention"],
        "linear_key_head_dim": head,
        "linear_value_head_dim": head,
        "linear_num_key_heads": max(1, config.heads // 2),
        "linear_num_value_heads": config.heads,
    }
    return text, _qwen3_vision(config)


def _qwen3_vision(config: TinyBackbone) -> dict[str, Any]:
    return _vision(config, "hidden_size", "out_hidden_size") | {
        "intermediate_size": 2 * config.vision_width,
        "num_position_embeddings": 256,
    }


def _head_dim(config: TinyBackbone) -> int:
    return config.hidden // config.heads


def _mrope(config: TinyBackbone) -> dict[str, Any]:
    """Frequencies for time, height and width, in about Qwen2-VL's proportions 16 : 24 : 24."""
    half = _head_dim(config) // 2
    time = half // 4
    height = (half - time) // 2
    return {"mrope_section": [time, height, half - time - height]}


def _interleaved_mrope(num_frequencies: int) -> dict[str, Any]:
    """Frequencies for time, height and width, in about Qwen3-VL's proportions 24 : 20 : 20."""
    third = num_frequencies // 3
    return {"mrope_section": [num_frequencies - 2 * third, third, third], "mrope_interleaved": True}


# By `model_type` of config.json: the checkpoints whose prompts, patches and positions are tested.
FAMILIES: dict[BackboneFamily, Family] = {
    "qwen2_vl": Family(
        title="Qwen2-VL",
        timestamps=False,
        packs=True,
        bidirectional=True,
        patch_px=14,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        tiny=_qwen2_vl,
    ),
    "qwen2_5_vl": Family(
        title="Qwen2.5-VL",
        timestamps=False,
        packs=True,
        bidirectional=True,
        patch_px=14,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        tiny=_qwen2_5_vl,
    ),
    "qwen3_vl": Family(
        title="Qwen3-VL",
        timestamps=True,
        packs=True,
        bidirectional=True,
        patch_px=16,
        image_mean=HALF,
        image_std=HALF,
        tiny=_qwen3_vl,
    ),
    "qwen3_5": Family(
        title="Qwen3.5",
        timestamps=True,
        packs=False,
        bidirectional=False,
        tokenizer="Qwen3_5Tokenizer",
        patch_px=16,
        image_mean=HALF,
        image_std=HALF,
        tiny=_qwen3_5,
    ),
}


@stored_file
class BackboneFile(TypedDict):
    """What every `config.json` of a checkpoint has."""

    model_type: str


def read_family(folder: Path) -> Family:
    """Return the family of a checkpoint directory. Raises `UserError` where the table does not have it."""
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(str(folder), "has no config.json", "name the directory of a transformers checkpoint")
    return _family(read_json(config, BackboneFile, "name another checkpoint")["model_type"], str(folder))


def family_of(backbone: Any) -> Family:
    """Return the family of a loaded backbone, with or without adapters. Raises `UserError` as `read_family` does."""
    return _family(backbone.config.model_type, "backbone")


def _family(model_type: Any, place: str) -> Family:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(place, f"model_type {model_type!r} is not supported", f"use one of {sorted(FAMILIES)}")
    return FAMILIES[model_type]


def part_of(backbone: Any, path: str) -> Any:
    """Return the part of a backbone at a dotted path, with or without adapters.

    Whoever changes or calls a part of transformers' models asks for it here: a family that names it differently is
    refused instead of being left as it is. Raises `UserError` with family and part.
    """
    found = backbone
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            title = family_of(backbone).title
            raise UserError(f"backbone {title}", f"has no {path}", "give the family a hook of its own in rzen/model")
    return found
