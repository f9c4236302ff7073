"""Settings of a model: backbone, prompt, readout, adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipelines.config import Config, Fraction, NonNegativeInt, PositiveFloat, PositiveInt

PromptName = Literal["rzen_paper", "rzen_release", "plain", "umarvel"]
BackboneFamily = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]
Packing = Literal["auto", "packed", "padded"]
Dtype = Literal["float32", "bfloat16"]


class TinyBackbone(Config):
    """A small, randomly initialized backbone of transformers' real classes, for machines without weights."""

    family: BackboneFamily = "qwen2_vl"
    """Family whose classes, patches and positions it has (`model_type` of transformers)."""
    hidden: PositiveInt = 64
    """Width of the language model, and so of the vectors."""
    layers: PositiveInt = 2
    """Layers of the language model."""
    heads: PositiveInt = 4
    """Attention heads. There are half as many key-value heads."""
    vision_width: PositiveInt = 64
    """Width of the vision tower."""
    vision_depth: PositiveInt = 2
    """Blocks of the vision tower."""
    vocabulary: PositiveInt = 2048
    """Size of the byte-level BPE trained on the captions of the data, without special tokens."""
    init_std: PositiveFloat = 0.1
    """Standard deviation of the initial weights. At this width the usual 0.02 does not start to learn."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights."""


class PromptConfig(Config):
    """How an input becomes a token sequence. Part of a model's identity, and saved with every checkpoint."""

    template: PromptName = "rzen_paper"
    """Named template (README of rzen/). Published RzenEmbed weights expect `rzen_release`."""
    max_text_tokens: PositiveInt = 2000
    """Tokens of text, instruction included, that an input keeps. Longer text is cut (as in the released script)."""
    min_visual_tokens: PositiveInt = 4
    """Smaller images are enlarged to at least this many tokens. Our choice."""
    max_visual_tokens: PositiveInt = 1280
    """At most this many tokens for an image, and for all frames of a video together (paper, section 4). A token is a
    square of the backbone's own size: 28 x 28 pixels in Qwen2-VL, 32 x 32 in Qwen3-VL."""

    @model_validator(mode="after")
    def _possible(self) -> PromptConfig:
        if self.min_visual_tokens > self.max_visual_tokens:
            raise ValueError(
                f"min_visual_tokens={self.min_visual_tokens} is above max_visual_tokens={self.max_visual_tokens}"
            )
        return self


LoraScope = Literal["all", "language_model"]


class LoraConfig(Config):
    """Low-rank adapters on linear layers of the backbone."""

    scope: LoraScope = "all"
    """`all`: every linear layer of the vision tower, the projector and the language model (paper, section 4).
    `language_model` leaves the vision tower and the projector as they are (U-MARVEL)."""

    rank: PositiveInt = 64
    """Rank of the adapters (paper)."""
    alpha: PositiveInt | PositiveFloat | None = None
    """Scale numerator. `null`: twice the rank. Our choice, because the paper is silent."""
    dropout: Fraction = 0.0
    """Dropout before the adapters. Our choice, because the paper is silent."""


class ReadoutConfig(Config):
    """How a token sequence becomes a vector. Part of a model's identity, and saved with every checkpoint."""

    positions: Literal["mrope", "1d"] = "mrope"
    """`mrope` gives patches a time, a height and a width, as transformers does. `1d` counts all tokens, as the script
    released with RzenEmbed."""
    direction: Literal["causal", "bidirectional"] = "causal"
    """Whether a token sees the tokens before it, or every token of its input (U-MARVEL, arXiv 2507.14902)."""
    pooling: Literal["last_token", "mean"] = "last_token"
    """`last_token` (RzenEmbed), or `mean` over all tokens except those of the input's instruction. System prompt and
    template count (U-MARVEL)."""


class ModelIdentity(Config):
    """What decides the vector of an input, next to the weights. `rzen.json` of every model and adapter holds it."""

    prompt: PromptConfig = PromptConfig()
    """Prompt template and token budgets."""
    readout: ReadoutConfig = ReadoutConfig()
    """Positions, direction of attention, pooling."""

    @model_validator(mode="after")
    def _readable(self) -> ModelIdentity:
        if self.prompt.template == "umarvel" and self.readout.pooling == "last_token":
            raise ValueError(
                "the prompt umarvel ends with an answer, whose last token says nothing; set readout.pooling: mean"
            )
        return self

    @property
    def identity(self) -> ModelIdentity:
        """Return the identity without the settings of a subclass, as it is saved with the weights."""
        return ModelIdentity(prompt=self.prompt, readout=self.readout)


class ModelConfig(ModelIdentity):
    """The backbone, which of its weights are trained, and how it reads its input."""

    backbone: str | TinyBackbone
    """A checkpoint directory (path or s3:// URL), a hub name, or a `TinyBackbone` that is built from the data."""
    tune: Literal["lora", "full"] = "lora"
    """`lora` trains adapters (`lora.scope` says on which layers). `full` trains every weight."""
    lora: LoraConfig = LoraConfig()
    """Settings of a new adapter. With `init_adapter`, that adapter decides, and what is set here must agree."""
    quantize: Literal["nf4"] | None = None
    """`nf4` holds the frozen weights in 4 bits (QLoRA, arXiv 2305.14314): less memory, slower. Needs bitsandbytes, a
    CUDA GPU and `tune: lora`. Export merges into the weights as they were before."""
    dtype: Dtype = "bfloat16"
    """Compute type (paper: bf16). CPUs need float32."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    packing: Packing = "auto"
    """`packed` lays all inputs end to end in one row. `padded` gives each a row of its own. The vectors are the same.
    `auto` packs with flash attention, if the family can be packed; other attention would score all tokens against all.
    """
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time (paper)."""

    @model_validator(mode="after")
    def _possible(self) -> ModelConfig:
        if self.quantize and self.tune == "full":
            raise ValueError(f"quantize={self.quantize} freezes the weights, so that it needs tune=lora")
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            raise ValueError("attention=flash_attention_2 has no float32; set dtype=bfloat16 or attention=sdpa")
        return self
