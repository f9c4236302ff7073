"""Backbones: load a Qwen2-VL checkpoint, or build a tiny one of the same classes where no weights can be had."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModel, PreTrainedModel, Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rzen.checkpoints import checkpoint_dir
from rzen.config import ModelConfig, TinyBackbone
from rzen.prompts import END_OF_TEXT, IM_END, IM_START, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, fixed_texts

SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)


def load_backbone(path_or_hub: str, model: ModelConfig) -> PreTrainedModel:
    """The bare model (vision tower and language model, no head), in `model.dtype` on the CPU, in evaluation mode.

    Raises `UserError` as `checkpoint_dir` does.
    """
    backbone = AutoModel.from_pretrained(
        checkpoint_dir(path_or_hub), dtype=getattr(torch, model.dtype), attn_implementation=model.attention
    )
    if model.gradient_checkpointing:
        # Non-reentrant checkpoints need no input that requires a gradient, so that adapters alone can be trained.
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return backbone


def build_tiny(folder: Path, config: TinyBackbone, texts: Iterable[str]) -> None:
    """Write a tiny, randomly initialised Qwen2-VL checkpoint with a tokenizer trained on `texts`.

    An ordinary directory for AutoModel, AutoTokenizer and the PIL image processor. Equal arguments, equal bytes.
    """
    tokenizer = _train_tokenizer(texts, config.vocabulary)
    model_config = _tiny_config(config, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Qwen2VLModel(model_config)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    model.save_pretrained(folder)


def _train_tokenizer(texts: Iterable[str], vocabulary: int) -> Qwen2Tokenizer:
    corpus = list(texts)
    # Every sequence carries the prompt: its words weigh as much as they occur.
    corpus += fixed_texts() * max(1, len(corpus))
    bare = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = bare.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    return Qwen2Tokenizer(
        vocab=trained["vocab"], merges=merges, extra_special_tokens=list(SPECIAL_TOKENS[1:]), eos_token=IM_END
    )


def _tiny_config(config: TinyBackbone, tokenizer: Qwen2Tokenizer) -> Qwen2VLConfig:
    token_id = tokenizer.convert_tokens_to_ids
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": config.hidden,
            "intermediate_size": 2 * config.hidden,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": max(1, config.heads // 2),
            "initializer_range": config.init_std,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": _mrope_section(config.hidden // config.heads),
            },
            "bos_token_id": token_id(END_OF_TEXT),
            "eos_token_id": token_id(IM_END),
        },
        vision_config={
            "depth": config.vision_depth,
            "embed_dim": config.vision_width,
            "hidden_size": config.hidden,
            "num_heads": config.heads,
            "initializer_range": config.init_std,
        },
        image_token_id=token_id(IMAGE_PAD),
        video_token_id=token_id(VIDEO_PAD),
        vision_start_token_id=token_id(VISION_START),
        vision_end_token_id=token_id(VISION_END),
        tie_word_embeddings=True,
    )


def _mrope_section(head_width: int) -> list[int]:
    """Frequencies for time, height and width, in about Qwen2-VL's proportions 16 : 24 : 24."""
    half = head_width // 2
    time = half // 4
    height = (half - time) // 2
    return [time, height, half - time - height]
