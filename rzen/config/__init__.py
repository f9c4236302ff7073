"""Settings of the learning half, each documented where it is declared. Imports neither torch nor transformers.

Defaults are the recipe of RzenEmbed (arXiv 2510.27350v1), "the paper", where it gives one. Our own choices say so.
"""

from rzen.config.card import ModelCard
from rzen.config.model import (
    BackboneFamily,
    Dtype,
    LoraConfig,
    LoraScope,
    ModelConfig,
    ModelIdentity,
    Packing,
    PromptConfig,
    PromptName,
    ReadoutConfig,
    TinyBackbone,
)
from rzen.config.objective import (
    DistillationConfig,
    EmbeddingDistillationConfig,
    FalseNegativeConfig,
    HardnessConfig,
    MinedConfig,
    ObjectiveConfig,
    QuantizedConfig,
    TaskObjectiveConfig,
    TemperatureConfig,
)
from rzen.config.optim import OptimConfig
from rzen.config.rerank import (
    AnyObjectiveConfig,
    PairPromptConfig,
    PairTemplateName,
    RerankerIdentity,
    RerankObjectiveConfig,
    identity_of,
    prompt_setting,
)
from rzen.config.soup import (
    DareSoup,
    GreedySoup,
    MeanSoup,
    SearchedSoup,
    SlerpSoup,
    SoupConfig,
    TiesSoup,
    WeightedSoup,
)

__all__ = [
    "AnyObjectiveConfig",
    "BackboneFamily",
    "DareSoup",
    "DistillationConfig",
    "EmbeddingDistillationConfig",
    "Dtype",
    "FalseNegativeConfig",
    "GreedySoup",
    "HardnessConfig",
    "LoraConfig",
    "LoraScope",
    "MeanSoup",
    "MinedConfig",
    "ModelCard",
    "ModelConfig",
    "ModelIdentity",
    "ObjectiveConfig",
    "OptimConfig",
    "Packing",
    "PairPromptConfig",
    "PairTemplateName",
    "PromptConfig",
    "QuantizedConfig",
    "PromptName",
    "ReadoutConfig",
    "RerankObjectiveConfig",
    "RerankerIdentity",
    "SearchedSoup",
    "SlerpSoup",
    "SoupConfig",
    "TaskObjectiveConfig",
    "TemperatureConfig",
    "TiesSoup",
    "TinyBackbone",
    "WeightedSoup",
    "identity_of",
    "prompt_setting",
]
