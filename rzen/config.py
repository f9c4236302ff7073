"""Settings of the learning half, each documented where it is declared, importable without torch.

Defaults are the recipe of RzenEmbed (arXiv 2510.27350v1) where it gives one; our choices say so.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipelines.config import Config, Fraction, NonNegativeInt, PositiveFloat, PositiveInt

PromptName = Literal["rzen_paper", "rzen_release", "plain"]
BackboneFamily = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]
Packing = Literal["auto", "packed", "padded"]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class TinyBackbone(Config):
    """A small, randomly initialized backbone of transformers' real classes, for machines without weights."""

    family: BackboneFamily = "qwen2_vl"
    """Whose classes, patches and positions (`model_type` of transformers)."""
    hidden: PositiveInt = 64
    """Width of the language model."""
    layers: PositiveInt = 2
    """Layers of the language model."""
    heads: PositiveInt = 4
    """Attention heads; half as many key-value heads."""
    vision_width: PositiveInt = 64
    """Width of the vision tower."""
    vision_depth: PositiveInt = 2
    """Blocks of the vision tower."""
    vocabulary: PositiveInt = 2048
    """Size of the byte-level BPE trained on the captions of the data, special tokens apart."""
    init_std: PositiveFloat = 0.1
    """Standard deviation of the initial weights; at this width the usual 0.02 does not start to learn."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights."""


class PromptConfig(Config):
    """How a side becomes a token sequence. Part of a model's identity: it is saved with every checkpoint."""

    template: PromptName = "rzen_paper"
    """Named template (README of rzen/). Published RzenEmbed weights expect `rzen_release`."""
    max_text_tokens: PositiveInt = 2000
    """Text of a side (instruction included) is cut to this many tokens (as the released script)."""
    min_visual_tokens: PositiveInt = 4
    """Smaller images are enlarged to at least this many tokens. Our choice."""
    max_visual_tokens: PositiveInt = 1280
    """At most this many tokens for an image, and for all frames of a video together (paper, section 4)."""


class LoraConfig(Config):
    """Low-rank adapters on every linear layer of the vision tower and the language model (paper, section 4)."""

    rank: PositiveInt = 64
    """Rank (paper)."""
    alpha: PositiveInt | None = None
    """Scale numerator; twice the rank where not given. Our choice, the paper is silent."""
    dropout: Fraction = 0.0
    """Our choice, the paper is silent."""


class ReadoutConfig(Config):
    """How a token sequence becomes a vector. Part of a model's identity: it is saved with every checkpoint."""

    positions: Literal["mrope", "1d"] = "mrope"
    """`mrope` gives patches a time, a height and a width, as transformers does; `1d` counts all tokens, as the script
    released with RzenEmbed."""
    direction: Literal["causal", "bidirectional"] = "causal"
    """Whether a token sees those before it, or every token of its side (U-MARVEL, arXiv 2507.14902)."""
    pooling: Literal["last_token", "mean"] = "last_token"
    """`last_token` (RzenEmbed), or `mean`: of all tokens but those of the side's instruction, system prompt and
    template included (U-MARVEL)."""


class ModelIdentity(Config):
    """What decides the vector of a side besides the weights; `rzen.json` of every model and adapter says it."""

    prompt: PromptConfig = PromptConfig()
    """Prompt template and token budgets."""
    readout: ReadoutConfig = ReadoutConfig()
    """Positions, direction of attention, pooling."""

    @property
    def identity(self) -> ModelIdentity:
        """This much of it, as it is saved with the weights."""
        return ModelIdentity(prompt=self.prompt, readout=self.readout)


class ModelConfig(ModelIdentity):
    """Backbone, what of it is trained, and how it reads its input."""

    backbone: str | TinyBackbone
    """A checkpoint directory (path or s3:// URL), a hub name, or a `TinyBackbone` to be built from the data."""
    tune: Literal["lora", "full"] = "lora"
    """`lora` trains adapters on all linear layers; `full` trains every weight."""
    lora: LoraConfig = LoraConfig()
    """Used when `tune` is `lora`."""
    quantize: Literal["nf4"] | None = None
    """`nf4` holds the frozen weights in 4 bits (QLoRA, arXiv 2305.14314): less memory, slower. Needs bitsandbytes, a
    CUDA GPU and `tune: lora`. Export merges into the weights as they were before."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type (paper: bf16). CPUs want float32."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    packing: Packing = "auto"
    """`packed` lays all sides end to end in one row, `padded` each in a row of its own; the vectors are the same.
    `auto` packs with flash attention, which cuts the row into sides; others would score all tokens against all."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time (paper)."""

    @model_validator(mode="after")
    def _possible(self) -> ModelConfig:
        if self.quantize and self.tune == "full":
            raise ValueError(f"quantize={self.quantize} freezes the weights, so that it needs tune=lora")
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            raise ValueError("attention=flash_attention_2 has no float32; set dtype=bfloat16 or attention=sdpa")
        return self


class TemperatureConfig(Config):
    """tau_t = exp(theta_t), one learnable theta per task (paper, section 3); it always divides the similarity."""

    initial: PositiveFloat = 0.02
    """Start (as VLM2Vec-V2; the paper is silent)."""
    minimum: PositiveFloat = 0.005
    """Lower clamp. Our choice."""
    maximum: PositiveFloat = 0.5
    """Upper clamp. Our choice."""
    learnable: bool = True
    """Off keeps `initial` for every task."""
    lr_scale: NonNegativeFloat = 5.0
    """Learning rate of theta relative to the model's. Our choice; theta has no weight decay."""

    @model_validator(mode="after")
    def _possible(self) -> TemperatureConfig:
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(f"initial={self.initial} must lie in [minimum={self.minimum}, maximum={self.maximum}]")
        if self.learnable and self.minimum == self.maximum:
            raise ValueError(
                f"minimum and maximum are both {self.minimum}, which leaves nothing to learn; set learnable: false"
            )
        return self


class FalseNegativeConfig(Config):
    """False-negative elimination: negative i is dropped where cos(k_i, k+) exceeds the threshold (paper, section 3)."""

    threshold: Annotated[float, Field(gt=-1, lt=1)] = 0.95
    """Cosine above which a negative counts as a copy of the positive (paper)."""
    warmup_steps: NonNegativeInt = 100
    """Steps before the rule applies: an untrained model finds every pair alike and would drop them all. Our choice."""
    max_dropped_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """At most this share of a query's negatives is dropped, the most similar first. Our choice."""


class HardnessConfig(Config):
    """Hard negatives weigh more: w_i = exp(alpha * s(q, k_i)), a factor of their term (paper, section 3)."""

    alpha: PositiveFloat = 9.0
    """Strength (paper)."""
    gradient: Literal["detached", "flowing"] = "detached"
    """Whether the weight is a constant (as LLaVE, where it comes from) or part of what is differentiated. The paper is
    silent."""
    normalized: bool = False
    """Divide a query's weights by their mean over its kept negatives (Robinson et al., arXiv 2010.04592): they then
    move weight between negatives and add none. The paper writes none."""


class MinedConfig(Config):
    """How mined hard negatives count: those that samples bring, as many as `data.negatives_per_sample` lets in."""

    shared: bool = True
    """They are negatives of every query of the global batch; `false`: only of the query they were mined for."""
    hardness: HardnessConfig | None = HardnessConfig()
    """Their weights, apart from those of in-batch negatives; `null`: all 1."""


class ObjectiveConfig(Config):
    """InfoNCE with the recipe's additions, and others by choice. All compose; raw loss values are not comparable.

    Pairs with a `relevance` are trained on its order (CoSENT) by the temperature and `matryoshka` alone.
    """

    hardness: HardnessConfig | None = HardnessConfig()
    """Weights of in-batch negatives; `null`: all 1 (stage 1)."""
    false_negatives: FalseNegativeConfig | None = FalseNegativeConfig()
    """`null` turns the rule off."""
    temperature: TemperatureConfig = TemperatureConfig()
    """One learnable temperature per task."""
    mined: MinedConfig = MinedConfig()
    """Mined hard negatives."""
    duplicates: Literal["drop", "positive"] = "drop"
    """Other targets of the batch with the content of the positive: left out, or positives too, with the mean of the
    losses of a query's positives."""
    margin: Annotated[float, Field(ge=0, lt=2)] | None = None
    """Drop negatives with s > s(q, k+) + margin: too good to be negative (Qwen3-Embedding has 0.1)."""
    focal_gamma: Annotated[float, Field(ge=1)] | None = None
    """Weigh each query by (1 - p)^gamma, p the probability of its positive: queries that are right already count less
    (KaLM-Embedding-V2; Lin et al., arXiv 1708.02002)."""
    symmetric: Fraction = 0.0
    """Share of the reverse direction, target -> queries, in the loss: 0.5 is the usual two-way loss."""
    same_side: list[Literal["queries", "targets"]] = Field(default=[])
    """Further negatives of query i: other queries, by s(q_i, q_j), and other targets, by s(k_i+, k_j) (GTE)."""
    matryoshka: list[PositiveInt] = Field(default=[])
    """Widths below the full one at which the first numbers of a vector are to be a vector of their own: the loss is the
    mean over these and the full width (Kusupati et al., arXiv 2205.13147)."""
    tile_rows: PositiveInt | None = 512
    """Score so many queries of a worker at a time against all columns: memory of tile_rows x columns in place of all
    queries x columns, no more work, and the same numbers. `null`: all at once. Our choice."""

    @model_validator(mode="after")
    def _compatible(self) -> ObjectiveConfig:
        if len(set(self.same_side)) < len(self.same_side) or len(set(self.matryoshka)) < len(self.matryoshka):
            raise ValueError("same_side and matryoshka must not name anything twice")
        if self.symmetric == 1 and self.same_side:
            raise ValueError(
                "same_side adds to query -> targets, of which symmetric: 1 leaves nothing; lower symmetric"
            )
        return self


class OptimConfig(Config):
    """AdamW with warm-up and cosine decay (paper, section 4)."""

    lr: PositiveFloat = 2.0e-4
    """Peak learning rate (paper)."""
    weight_decay: NonNegativeFloat = 0.05
    """On matrices only, never on temperatures, norms and biases (paper: 0.05)."""
    warmup_fraction: Fraction = 0.03
    """Share of the steps with linearly rising rate. Our choice."""
    final_lr_fraction: Fraction = 0.0
    """Rate at the last step relative to the peak."""
    betas: list[Fraction] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """AdamW moments."""
    max_grad_norm: PositiveFloat = 1.0
    """Global gradient norm is clipped to this. Our choice."""
    max_skipped_steps: NonNegativeInt = 5
    """So many steps in a row may be skipped because their loss or gradient is not finite; one more ends the run, which
    then names the samples. Our choice."""
    zero_stage: Literal[1, 2, 3] = 1
    """What DeepSpeed ZeRO spreads over the workers: 1 the optimizer's state, 2 gradients too, 3 all weights too, which
    are gathered whenever they are used: for models that do not fit otherwise."""


class WeightedSoup(Config):
    """What all soups of named parents share."""

    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    """Parent -> its relative weight; parents not named are left out. `null`: all alike. To take a new fine-tune into a
    soup, give the soup its `total_weight` (README of rzen/): the result is the mean over all."""
    rank: PositiveInt | None = None
    """Rank of the soup of adapters: where it is lower than the sum of their ranks, an SVD of each module leaves the
    rest out, and the lineage says how much. `null`: the sum, with which mean and SLERP are exact."""


class MeanSoup(WeightedSoup):
    """The weighted mean of what the parents do to the model (paper, section 4)."""

    method: Literal["mean"] = "mean"
    """The default."""


class SlerpSoup(WeightedSoup):
    """The way from one parent to the next on a sphere, which keeps the length of a delta (Shoemake, 1985)."""

    method: Literal["slerp"] = "slerp"
    """Of more than two parents one after another, in the order of their names."""


class TiesSoup(WeightedSoup):
    """Largest entries of each delta, an elected sign for each entry, mean of those with it (arXiv 2306.01708)."""

    method: Literal["ties"] = "ties"
    """Full checkpoints need their base."""
    density: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the entries of a weight's delta that is kept, the largest (TIES: 20%)."""
    signs: Literal["total", "frequency"] = "total"
    """A sign is elected by the sum of the entries (TIES) or by their number."""


class DareSoup(WeightedSoup):
    """Drop entries of each delta by chance and enlarge the others to the same mean (arXiv 2311.03099)."""

    method: Literal["dare"] = "dare"
    """Full checkpoints need their base."""
    density: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the entries that is kept. Our choice; DARE drops up to 90% of a full fine-tune, but what is left has no
    low rank."""
    merge: Literal["linear", "ties"] = "linear"
    """Then take the mean, or that of entries of the elected sign (TIES)."""
    seed: NonNegativeInt = 0
    """Which entries are dropped."""


class GreedySoup(Config):
    """Parents from the best down, each kept if the mean scores higher with it (Wortsman et al., arXiv 2203.05482)."""

    method: Literal["greedy"] = "greedy"
    """Needs validation scores."""
    rank: PositiveInt | None = None
    """As in `mean`."""


class SearchedSoup(Config):
    """The mean with the weights that score best on a small set, found in a few evaluations."""

    method: Literal["searched"] = "searched"
    """Needs scores of soups."""
    evaluations: PositiveInt = 24
    """Soups that are scored at most. Our choice: with three parents the weights are then right to a few hundredths."""
    at_once: PositiveInt = 4
    """Soups that are scored side by side; the next ones follow from their scores. Our choice."""
    seed: NonNegativeInt = 0
    """Of the samples."""
    rank: PositiveInt | None = None
    """As in `mean`."""


SoupConfig = Annotated[
    MeanSoup | GreedySoup | SearchedSoup | SlerpSoup | TiesSoup | DareSoup, Field(discriminator="method")
]
"""How fine-tunes become one model."""


class ModelCard(Config):
    """What an entry of the leaderboard of MMEB-V2 says about its model."""

    model_name: str = Field(min_length=1)
    """As it shall stand on the leaderboard."""
    model_backbone: str = Field(min_length=1)
    """`Qwen2-VL` for example."""
    model_size: str = Field(min_length=1)
    """`2B parameters` for example."""
    embedding_dimension: PositiveInt
    """Width of its vectors."""
    max_length_tokens: PositiveInt
    """Longest sequence that it was evaluated with."""
    model_release_date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    """Year, month and day."""
    data_source: Literal["Self-Reported"] = "Self-Reported"
    """Who measured."""
    url: str = Field(pattern=r"^https?://")
    """Paper, code or weights."""

    @model_validator(mode="after")
    def _is_a_day(self) -> ModelCard:
        date.fromisoformat(self.model_release_date)
        return self
