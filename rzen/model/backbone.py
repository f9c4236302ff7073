"""Backbones: load a checkpoint of a known family, or build a tiny one of its classes where there are no weights."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipelines.errors import UserError
from pipelines.imports import NOT_FOR_SAVING, without_modules
from rzen.config import ModelConfig, TinyBackbone
from rzen.families import FAMILIES
from rzen.inputs.prompts import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    fixed_texts,
)
from rzen.model.checkpoints import checkpoint_dir
from rzen.model.loading import LOADING
from rzen.model.vision import use_fast_vision

SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)


def load_backbone(path_or_hub: str, model: ModelConfig) -> PreTrainedModel:
    """Return the bare model (vision tower and language model, no head), in `model.dtype` on the CPU, for evaluation.

    With `model.quantize` its linear layers hold 4 bits a weight. They are on the current GPU, which quantizes them.
    Threads load one after the other. Raises `UserError` as `checkpoint_dir` does, and where quantizing is impossible.
    """
    dtype = getattr(torch, model.dtype)
    folder, quantization = checkpoint_dir(path_or_hub), _nf4(dtype) if model.quantize else {}
    with LOADING:
        backbone = AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation=model.attention, **quantization)
    use_fast_vision(backbone)
    if model.gradient_checkpointing:
        # Non-reentrant checkpoints need no input that requires a gradient, so that adapters alone can be trained.
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return backbone


def _nf4(dtype: torch.dtype) -> dict[str, Any]:
    """Return arguments that load weights in 4 bits, as QLoRA (arXiv 2305.14314): NF4, quantized constants."""
    missing = [] if importlib.util.find_spec("bitsandbytes") else ["bitsandbytes is not installed"]
    missing += [] if torch.cuda.is_available() else ["there is no CUDA GPU"]
    if missing:
        fix = "install the extra rzen[qlora] on a machine with a CUDA GPU, or set model.quantize: null"
        raise UserError("model.quantize=nf4", f"is impossible here: {', '.join(missing)}", fix)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": settings, "device_map": {"": torch.cuda.current_device()}}


def build_tiny(folder: Path, config: TinyBackbone, texts: Iterable[str]) -> None:
    """Write a tiny, randomly initialized checkpoint of `config.family` with a tokenizer trained on `texts`.

    An ordinary directory for AutoModel, AutoTokenizer and the PIL image processor. Equal arguments, equal bytes.
    """
    family = FAMILIES[config.family]
    tokenizer = _train_tokenizer(texts, config.vocabulary, getattr(transformers, family.tokenizer))
    model_config = _tiny_config(config, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        with LOADING:
            model = AutoModel.from_config(model_config)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=family.patch_px, image_mean=list(family.image_mean), image_std=list(family.image_std)
    ).save_pretrained(folder)
    with without_modules(*NOT_FOR_SAVING):
        model.save_pretrained(folder)


def _train_tokenizer(texts: Iterable[str], vocabulary: int, kind: Any) -> PreTrainedTokenizerBase:
    corpus = list(texts)
    # Every sequence carries the prompt: its words weigh as much as they occur.
    corpus += fixed_texts() * max(1, len(corpus))
    bare = kind().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = bare.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    trained_tokenizer: PreTrainedTokenizerBase = kind(
        vocab=trained["vocab"], merges=merges, extra_special_tokens=list(SPECIAL_TOKENS[1:]), eos_token=IM_END
    )
    return trained_tokenizer


def _tiny_config(config: TinyBackbone, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    token_id = tokenizer.convert_tokens_to_ids
    text, vision = FAMILIES[config.family].tiny(config)
    text |= {
        "vocab_size": len(tokenizer),
        "bos_token_id": token_id(END_OF_TEXT),
        "eos_token_id": token_id(IM_END),
    }
    return AutoConfig.for_model(
        config.family,
        text_config=text,
        vision_config=vision,
        image_token_id=token_id(IMAGE_PAD),
        video_token_id=token_id(VIDEO_PAD),
        vision_start_token_id=token_id(VISION_START),
        vision_end_token_id=token_id(VISION_END),
        tie_word_embeddings=True,
    )
