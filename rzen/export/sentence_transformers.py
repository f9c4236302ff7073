"""Files for sentence-transformers 6 and vLLM's pooling runner, so that both read a model as it was trained.

Both read the same files: a list of modules, the pooling, the sizes of images and videos, the chat template. Names and
their order are those that vLLM compares. It takes the first true value of the pooling's settings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipelines.samples import DecodedInput
from pipelines.stored_json import read_json
from rzen.config import ModelIdentity, PromptConfig
from rzen.embedding.tasks import named_tasks
from rzen.export.chat_template import FILE, chat_template
from rzen.families import read_family
from rzen.inputs.processor import Processor

POOLINGS = {"last_token": "lasttoken", "mean": "mean"}
_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
_MODULES = ("", "1_Pooling", "2_Normalize")
_OUTPUTS = {"feature-extraction": ("last_hidden_state", "token_embeddings"), "any-to-any": ("logits", "causal_logits")}
"""Task -> output of the model, and the library's name for it."""


def unsupported_reason(identity: ModelIdentity) -> str | None:
    """Return why other libraries cannot read a model as it was trained; None where they can."""
    if identity.readout.direction == "bidirectional":
        return "its tokens see those after them too, which other libraries cannot be told"
    if identity.readout.positions == "1d":
        return "its positions count all tokens, and other libraries give patches a time, a height and a width"
    return None


def write_files(folder: Path, identity: ModelIdentity, frames: int, instructions: Mapping[str, str]) -> None:
    """Add the files to an exported model. `unsupported_reason` of its identity must be None.

    The `frames` of a video share `max_visual_tokens`. `instructions` have names, for `encode(..., prompt_name=...)`.
    So have the tasks of rzen, but for a mean over all tokens, into which their tokens would enter.
    """
    config = read_json(folder / "config.json", dict[str, Any])
    width = config.get("text_config", config)["hidden_size"]
    mode = POOLINGS[identity.readout.pooling]
    pooling = {f"pooling_mode_{name}": name.removesuffix("_tokens") == mode for name in _MODES}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
        for number, (path, name) in enumerate(zip(_MODULES, ("Transformer", "Pooling", "Normalize"), strict=True))
    ]
    for path in _MODULES[1:]:
        (folder / path).mkdir()
    write_settings(folder / "modules.json", modules)
    write_settings(
        folder / "1_Pooling/config.json", {"word_embedding_dimension": width} | pooling | {"include_prompt": True}
    )
    write_settings(folder / "2_Normalize/config.json", {})
    write_settings(folder / "sentence_bert_config.json", transformer_settings("feature-extraction"))
    write_settings(folder / "config_sentence_transformers.json", _prompts(identity, instructions))
    write_processors(folder, identity.prompt, frames)
    write_template(folder, chat_template(identity, read_family(folder)))


def text_limit(folder: Path, prompt: PromptConfig) -> int:
    """Return the length at which a text input is cut: its token budget and the fixed tokens around it."""
    processor = Processor(str(folder), prompt.model_copy(update={"max_text_tokens": 1}))
    return len(processor.encode([DecodedInput(text="a")]).input_ids) - 1 + prompt.max_text_tokens


def transformer_settings(task: Literal["feature-extraction", "any-to-any"]) -> dict[str, Any]:
    """Return settings that send whole inputs through the chat template, to the last hidden states or to the logits.

    If it were cut, an input with visuals would lose the token that is read.
    """
    output_name, feature = _OUTPUTS[task]
    output = {"method": "forward", "method_output_name": output_name}
    modalities = dict.fromkeys(("text", "image", "video"), output)
    return {
        "transformer_task": task,
        "modality_config": modalities | {"message": output | {"format": "structured"}},
        "module_output_name": feature,
        "processing_kwargs": {"text": {"truncation": False}},
        "processor_kwargs": {"use_fast": False},  # Pillow's resize, with which it was trained; torchvision's is another
        "unpad_inputs": False,  # it knows no M-RoPE
    }


def _prompts(identity: ModelIdentity, instructions: Mapping[str, str]) -> dict[str, Any]:
    """Return the named prompts. An instruction is a system message, so it does not end in a space.

    vLLM refuses an `input_type` that is no name. The ones of Cohere stand for no instruction.
    """
    names = ("query", "document", "search_query", "search_document")
    tasks = {} if identity.readout.pooling == "mean" else named_tasks(instructions)
    return {
        "model_type": "SentenceTransformer",
        "prompts": dict.fromkeys(names, "")
        | {name: task["instruction"] for name, task in tasks.items()}
        | dict(instructions),
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }


def write_processors(folder: Path, prompt: PromptConfig, frames: int) -> None:
    """Write the sizes of images and of videos of `frames` frames, under the names of transformers 4 and 5."""
    path = folder / "preprocessor_config.json"
    settings = read_json(path, dict[str, Any])
    layout = Processor(str(folder), prompt).layout
    token_pixels = layout.factor_px**2
    low, high = prompt.min_visual_tokens, prompt.max_visual_tokens
    write_settings(path, settings | _sizes(low * token_pixels, high * token_pixels))
    share = max(1, high // math.ceil(frames / layout.temporal_patch_frames))
    # Qwen3-VL's processor counts the pixels of all frames, those of the others the pixels of one.
    family = read_family(folder)
    counted = token_pixels * (frames if family.timestamps else 1)
    video = {
        name: value
        for name, value in settings.items()
        if name not in ("image_processor_type", "min_pixels", "max_pixels", "processor_class", "resample")
    }
    video |= {
        "video_processor_type": "Qwen3VLVideoProcessor" if family.timestamps else "Qwen2VLVideoProcessor",
        "size": _sizes(min(low, share) * counted, share * counted)["size"],
        "resample": 3,
        "do_sample_frames": True,
        "num_frames": frames,
        "fps": None,
        "cap_pixels_per_frame": False,
    }
    write_settings(folder / "video_preprocessor_config.json", video)


def _sizes(min_pixels: int, max_pixels: int) -> dict[str, Any]:
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    return {"size": size, "min_pixels": min_pixels, "max_pixels": max_pixels}


def write_template(folder: Path, template: str) -> None:
    """Write a chat template as a file, and remove that of the base from the other files."""
    for path in (folder / "tokenizer_config.json", folder / "processor_config.json"):
        if path.is_file():
            settings = read_json(path, dict[str, Any])
            settings.pop("chat_template", None)
            write_settings(path, settings)
    (folder / FILE).write_text(template)


def write_settings(path: Path, content: Any) -> None:
    """Write a JSON file of the library."""
    path.write_text(json.dumps(content, indent=2) + "\n")
