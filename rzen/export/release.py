"""Export for the inference script released with RzenEmbed, under the transformers 4.51 that it needs.

The script counts positions in one dimension and brings its own prompt. Only models that were trained that way give the
same vectors there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from pipelines.errors import UserError
from pipelines.stored_json import read_json, stored_file
from rzen.config import ModelIdentity
from rzen.families import BackboneFile

# What transformers 5 has added to a configuration, each with the meaning of what stands there in 4.51.
_NEW = {"dtype", "layer_types", "model_type", "rope_parameters", "text_config", "transformers_version", "vision_config"}


@stored_file
class _Images(TypedDict):
    patch_size: int
    merge_size: int


def check(base: Path, identity: ModelIdentity) -> None:
    """Raise `UserError` for a model that the script would read in another way than it was trained."""
    model_type = read_json(base / "config.json", BackboneFile)["model_type"]
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

    transformers 5 and rzen read them as well.
    """
    config = read_json(folder / "config.json", dict[str, Any])
    _write(folder / "config.json", flat_config(config))
    tokenizer = read_json(folder / "tokenizer_config.json", dict[str, Any])
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    _write(folder / "tokenizer_config.json", tokenizer)
    images = read_json(folder / "preprocessor_config.json", _Images)
    pixels = (images["patch_size"] * images["merge_size"]) ** 2
    size = {
        "min_pixels": identity.prompt.min_visual_tokens * pixels,
        "max_pixels": identity.prompt.max_visual_tokens * pixels,
    }
    edges = {"shortest_edge": size["min_pixels"], "longest_edge": size["max_pixels"]}
    _write(folder / "preprocessor_config.json", {**images, **size, "size": edges})


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a Qwen2-VL configuration of transformers 4, from one of 4 or 5."""
    if "text_config" not in config:
        return config
    text, vision, root = (
        {name: value for name, value in part.items() if name not in _NEW}
        for part in (config["text_config"], config["vision_config"], config)
    )
    rope = config["text_config"]["rope_parameters"]
    return {
        **text,
        **root,
        "model_type": config["model_type"],
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "torch_dtype": config["dtype"],
        "vision_config": vision | {"model_type": config["model_type"]},
    }


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
