"""How much memory the forward and backward pass of a chunk takes, counted without running it.

The real classes are built on torch's meta device: tensors have shapes and no content. A pass over them makes and frees
the same tensors as a real pass, so that counting them gives its memory (tests/unit/rzen/test_memory.py). It takes
seconds for a model of any size, on any machine.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from rzen.config import ModelConfig, TinyBackbone
from rzen.families import FAMILIES, part_of
from rzen.model.backbone import SPECIAL_TOKENS
from rzen.model.loading import LOADING
from rzen.model.lora import add_lora
from rzen.model.vision import use_fast_vision


@dataclass(frozen=True)
class ChunkInputs:
    """Equal inputs that are read together: those of an embedder, or pairs of a re-ranker."""

    count: int
    tokens: int
    """Tokens of one input, visual tokens included."""
    visual_tokens: int
    """Tokens of its image, page or video; 0 for text. Of a pair, those of both."""
    list_pairs: int = 0
    """Pairs of a query, which are next to each other. 0: no pairs."""
    query_visual_tokens: int = 0
    """Visual tokens of the query of a pair. The tower reads them once for a list."""
    whole_lists: bool = False
    """Whether pairs of a query are always read together."""

    @property
    def smallest(self) -> int:
        """Inputs that are read together at least."""
        return self.list_pairs if self.whole_lists else 1

    @property
    def num_tokens(self) -> int:
        """Tokens of the chunk."""
        return self.count * self.tokens

    def within(self, num_tokens: int) -> ChunkInputs:
        """Return a chunk of `num_tokens` tokens that is full of such inputs, one at least, or one whole list."""
        units = max(1, num_tokens // (self.tokens * self.smallest))
        return replace(self, count=units * self.smallest)

    @property
    def media_tokens(self) -> list[int]:
        """Tokens of each image, page or video that the tower reads. Pairs have those of the queries first."""
        if not self.list_pairs:
            return [self.visual_tokens] * self.count if self.visual_tokens else []
        queries = [self.query_visual_tokens] * ceil(self.count / self.list_pairs)
        return [tokens for tokens in (*queries, *[self._target_tokens] * self.count) if tokens]

    @property
    def shown(self) -> list[int]:
        """Numbers of the media in the order of their places in the pairs."""
        numbers = []
        num_queries = ceil(self.count / self.list_pairs) if self.query_visual_tokens else 0
        for pair in range(self.count):
            numbers += [pair // self.list_pairs] if self.query_visual_tokens else []
            numbers += [num_queries + pair] if self._target_tokens else []
        return numbers

    @property
    def _target_tokens(self) -> int:
        return self.visual_tokens - self.query_visual_tokens


@dataclass(frozen=True)
class PassBytes:
    """Memory of a forward and backward pass, without weights and without the gradients of parameters."""

    kept: int
    """What the forward pass leaves for the backward pass."""
    peak: int
    """The most at any moment of both."""


class AllocationTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made while it is active, until they are freed.

    The weights of `module` and their gradients are left out. Hold it as a context manager around both passes.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._weights = {part.untyped_storage()._cdata for part in (*module.parameters(), *module.buffers())}
        self._trained: list[Any] = [part for part in module.parameters() if part.requires_grad]
        self._counted: dict[int, Any] = {}  # address of a storage -> what runs when it is freed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count the memory of what it makes. Views have the memory of their base."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def __enter__(self) -> AllocationTracker:
        """Start counting."""
        self._hooks = [one.register_post_accumulate_grad_hook(self._leave_out_gradient) for one in self._trained]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def _leave_out_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if finalizer := self._counted.get(parameter.grad.untyped_storage()._cdata):
            finalizer()

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self._counted and address not in self._weights:
            self._counted[address] = weakref.finalize(storage, self._free, address, storage.nbytes())
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)

    def _free(self, address: int, num_bytes: int) -> None:
        del self._counted[address]
        self.live -= num_bytes


def read_config(backbone: str | TinyBackbone) -> PreTrainedConfig:
    """Return the configuration of a checkpoint directory, or of a tiny backbone whose tokenizer does not exist yet."""
    if isinstance(backbone, str):
        config: PreTrainedConfig = AutoConfig.from_pretrained(Path(backbone))
        return config
    text, vision = FAMILIES[backbone.family].tiny(backbone)
    text |= {"vocab_size": backbone.vocabulary + len(SPECIAL_TOKENS), "bos_token_id": None, "eos_token_id": None}
    return AutoConfig.for_model(backbone.family, text_config=text, vision_config=vision, tie_word_embeddings=True)


def meta_backbone(config: PreTrainedConfig, model: ModelConfig) -> nn.Module:
    """Return the backbone as it is trained, on the meta device: in `model.dtype`, with its adapter.

    Flash attention keeps what fused attention keeps, so that it need not be installed.
    """
    attention = "eager" if model.attention == "eager" else "sdpa"
    with torch.device("meta"):
        dtype = getattr(torch, model.dtype)
        with LOADING:
            backbone: PreTrainedModel = AutoModel.from_config(config, dtype=dtype, attn_implementation=attention)
        use_fast_vision(backbone)
        if model.gradient_checkpointing:
            backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trained: nn.Module = add_lora(backbone, model.lora, seed=0) if model.tune == "lora" else backbone
    return trained.to(dtype).train()  # DeepSpeed rounds adapters as well


def count_pass(backbone: nn.Module, inputs: ChunkInputs) -> PassBytes:
    """Return the memory of embedding a chunk and of its backward pass. `backbone` is a `meta_backbone`."""
    _use_fused_attention_on_meta()
    with AllocationTracker(backbone) as tracker:
        pooled = _embed(backbone, inputs)
        kept = tracker.live
        pooled.sum().backward()  # type: ignore[no-untyped-call]
    backbone.zero_grad()
    return PassBytes(kept, tracker.peak)


def _embed(backbone: nn.Module, inputs: ChunkInputs) -> Tensor:
    """Return the pooled vectors: what `EmbeddingModel` does, or `ScoringModel`, on tensors without content."""
    language = part_of(backbone, "language_model")
    meta = torch.device("meta")
    shape = (inputs.count, inputs.tokens)
    embedded = language.embed_tokens(torch.zeros(shape, dtype=torch.int64, device=meta))
    visuals: dict[str, Tensor] = {}  # pixels, held until the end, as by the caller of a real backbone
    if inputs.visual_tokens:
        visuals = _visuals(backbone, inputs)
        tower = part_of(backbone, "visual")
        if inputs.list_pairs:
            features = _features_of_pairs(tower, visuals, inputs)
            visuals = {}  # the scorer holds no pixels
        else:
            features = tower(**visuals).pooler_output
        is_visual = torch.zeros((*shape, 1), dtype=torch.bool, device=meta)
        embedded = embedded.masked_scatter(is_visual, features)
    hidden: Tensor = language(
        inputs_embeds=embedded,
        position_ids=torch.zeros((3, *shape), dtype=torch.int64, device=meta),
        attention_mask=None,
        use_cache=False,
    ).last_hidden_state
    return hidden[:, -1].clone().float()  # not a view, which would keep all of it


def _features_of_pairs(tower: nn.Module, visuals: dict[str, Tensor], inputs: ChunkInputs) -> Tensor:
    """Return the features of all visuals in the order of their tokens. What several pairs show is read once."""
    is_trained = any(weight.requires_grad for weight in tower.parameters())
    with torch.set_grad_enabled(is_trained):
        media = tower(**visuals).pooler_output.split(inputs.media_tokens)
    return torch.cat([media[number] for number in inputs.shown])


def _visuals(backbone: nn.Module, inputs: ChunkInputs) -> dict[str, Tensor]:
    """Return the arguments of the vision tower for the media of a chunk."""
    visual, meta = part_of(backbone, "visual"), torch.device("meta")
    config = visual.config
    edge = config.spatial_merge_size
    grids = torch.tensor([[1, edge, edge * tokens] for tokens in inputs.media_tokens])  # on the CPU
    num_patches = int(grids.prod(dim=1).sum())
    patch_values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    visuals = {"hidden_states": torch.zeros(num_patches, patch_values, device=meta), "grid_thw": grids}
    # transformers computes these from the grids, on the device of the grids, unless they are given.
    visuals["position_ids"] = torch.zeros(num_patches, 2, dtype=torch.int64, device=meta)
    if hasattr(visual, "pos_embed"):
        visuals["interp_indices"] = torch.zeros(num_patches, 4, dtype=torch.int64, device=meta)
        visuals["interp_weights"] = torch.zeros(num_patches, 4, device=meta)
    return visuals


@cache
def _use_fused_attention_on_meta() -> object:
    """Let attention on the meta device keep what it keeps on CPUs and GPUs. By itself, torch keeps all scores there."""
    make_library: Any = torch.library.Library
    library = make_library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", _fused_attention, "AutogradMeta")
    return library  # kept by the cache: what it registers is gone with it


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return attended
