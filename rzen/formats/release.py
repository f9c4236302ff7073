"""A directory that the inference script released with RzenEmbed reads, under the transformers 4.51 that it needs.

The script counts positions in one dimension and brings its own prompt, so that only models trained alike give the same
vectors there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from rzen.config import ModelIdentity

# What transformers 4.51 knows of a configuration; all else has the same meaning under another name, or none.
_TEXT = (
    "attention_dropout bos_token_id eos_token_id hidden_act hidden_size initializer_range intermediate_size "
    "max_position_embeddings max_window_layers num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps "
    "sliding_window use_cache use_sliding_window vocab_size"
).split()
_VISION = (
    "depth embed_dim hidden_act hidden_size in_channels initializer_range mlp_ratio num_heads patch_size "
    "spatial_merge_size temporal_patch_size"
).split()
_ROOT = "architectures image_token_id video_token_id vision_start_token_id vision_end_token_id model_type".split()


def check(base: Path, identity: ModelIdentity) -> None:
    """Raises `UserError` for a model that the script would read in another way than it was trained."""
    model_type = json.loads((base / "config.json").read_text())["model_type"]
    readout, fix = identity.readout, "export it with format: model, or train a model for the script"
    wanted = {
        "model_type": (model_type, "qwen2_vl"),
        "prompt.template": (identity.prompt.template, "rzen_release"),
        "readout.positions": (readout.positions, "1d"),
        "readout.direction": (readout.direction, "causal"),
        "readout.pooling": (readout.pooling, "last_token"),
    }
    for name, (value, only) in wanted.items():
        if value != only:
            raise UserError("format=rzen_release", f"the released script reads only {name}={only}, not {value}", fix)


def write_files(folder: Path, identity: ModelIdentity) -> None:
    """Rewrite configuration, tokenizer's settings and image sizes of an exported Qwen2-VL for transformers 4.51.

    transformers 5, and all of rzen, read them as well.
    """
    config = json.loads((folder / "config.json").read_text())
    _write(folder / "config.json", flat_config(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    _write(folder / "tokenizer_config.json", tokenizer)
    images = json.loads((folder / "preprocessor_config.json").read_text())
    pixels = (images["patch_size"] * images["merge_size"]) ** 2
    size = {
        "min_pixels": identity.prompt.min_visual_tokens * pixels,
        "max_pixels": identity.prompt.max_visual_tokens * pixels,
    }
    edges = {"shortest_edge": size["min_pixels"], "longest_edge": size["max_pixels"]}
    _write(folder / "preprocessor_config.json", images | size | {"size": edges})


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """A Qwen2-VL configuration of transformers 4, from one of 4 or 5."""
    if "text_config" not in config:
        return config
    text, vision = config["text_config"], config["vision_config"]
    rope = text["rope_parameters"]
    return {
        **{name: config[name] for name in _ROOT},
        **{name: text[name] for name in _TEXT if name in text},
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "tie_word_embeddings": config["tie_word_embeddings"],
        "torch_dtype": config["dtype"],
        "vision_config": {name: vision[name] for name in _VISION if name in vision} | {"model_type": "qwen2_vl"},
    }


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
