"""Memory of one worker by part, from settings and a backbone's configuration. No weights are read, and no GPU is asked.

Weights, gradients and optimizer are counted exactly as DeepSpeed holds them. Activations are those of a pass on the
meta device (`rzen.model.activations`). The loss and the buffers of communication are formulas. The allocator of a GPU
needs a few percent more, and CUDA and NCCL about 1 GiB. tests/unit/rzen/test_memory.py compares with torch on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil

from torch import nn
from transformers import PreTrainedConfig

from rzen.config import AnyObjectiveConfig, ModelConfig, ObjectiveConfig, OptimConfig
from rzen.model.activations import ChunkInputs, PassBytes, count_pass, meta_backbone

# Gradients sent at once: DeepSpeed's 500 million would be buffers larger than an adapter. In ZeRO stage 3 also weights
# gathered ahead. Our choice.
BUCKET_ELEMENTS = 50_000_000
# Parameters that ZeRO stage 3 leaves whole on all ranks, being smaller: DeepSpeed's number.
WHOLE_ELEMENTS = 100_000
_FP32 = 4
_ALIGNED_PER_RANK = 2
"""DeepSpeed fills up each group of parameters to a multiple of this number times the workers (ZeRO stages 1 and 2)."""
_NF4 = 0.5 + 1 / 64 + _FP32 / (64 * 256)
"""Bytes of a weight in 4 bits: a scale of 8 bits for 64 weights, and one of 32 bits for 256 scales."""
_VECTOR_COPIES = 5
"""Vectors that are gathered, their gradients, the scaled ones, the positives, and the sum over ranks. Counted."""
_TILE_COPIES, _COPIES_PER_WIDTH = 7, 2.2
"""Matrices of a tile's scores at the same time, and those of each further width. Counted."""


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes of one worker by part."""

    weights: int
    gradients: int
    optimizer: int
    """fp32 copies of the trained weights, and both moments of AdamW."""
    activations: int
    """The most at any moment of the forward and backward pass of a chunk, or of all inputs without chunks."""
    loss: int
    """Gathered vectors, and the scores of a tile."""
    update: int
    """Gradients in fp32 and temporary values of the optimizer's step, when activations and loss are gone."""
    buffers: int
    """What is sent at once, and in ZeRO stage 3 the weights that are gathered."""

    @property
    def total(self) -> int:
        """The most at any moment."""
        in_pass = self.activations + self.loss
        return self.weights + self.gradients + self.optimizer + self.buffers + max(in_pass, self.update)

    def as_json(self) -> dict[str, int]:
        """Return the parts and the total."""
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class WorkerShare:
    """What one worker has in a step."""

    workers: int
    pairs: int
    inputs: tuple[ChunkInputs, ...]
    """All queries, all targets, and all mined negatives, at their largest. Of a re-ranker, all pairs."""
    negatives_per_pair: int
    num_tasks: int


class MemoryModel:
    """The memory of training a backbone. Building it takes seconds, and each chunk size some more."""

    def __init__(self, config: PreTrainedConfig, model: ModelConfig) -> None:
        self._model = model
        self._width = config.get_text_config().hidden_size
        self._backbone = meta_backbone(config, model)
        self._value_bytes = 2 if model.dtype == "bfloat16" else _FP32
        self._passes: dict[ChunkInputs, PassBytes] = {}

    def worker(
        self, share: WorkerShare, objective: AnyObjectiveConfig, optim: OptimConfig, chunk_tokens: int | None
    ) -> WorkerMemory:
        """Return the memory of a worker with these settings."""
        num_temperatures = num_steps = 0
        if isinstance(objective, ObjectiveConfig):
            num_temperatures = share.num_tasks if objective.temperature.learnable else 0
            num_steps = int(objective.quantized is not None and "int8" in objective.quantized.types)
        groups = self._trained_groups(num_temperatures, num_steps)
        num_trained = sum(map(sum, groups))
        own_elements = _elements_of_rank(groups, share.workers, optim.zero_stage)
        return WorkerMemory(
            weights=self._weights(groups, share.workers, optim.zero_stage),
            gradients=num_trained * self._value_bytes,  # whole until the end of the backward pass, in every stage
            optimizer=3 * _FP32 * own_elements,
            activations=self.activations(share.inputs, chunk_tokens),
            loss=loss_bytes(share, objective, self._width),
            update=2 * _FP32 * own_elements,
            buffers=self._buffers(num_trained, optim.zero_stage),
        )

    def activations(self, inputs: Sequence[ChunkInputs], chunk_tokens: int | None) -> int:
        """Return the bytes of the activations. Without chunks, those of all inputs are kept until the backward pass."""
        if chunk_tokens is None or sum(some.num_tokens for some in inputs) <= chunk_tokens:
            passes = [self._pass(some) for some in inputs]
            return sum(one.kept for one in passes) + max(one.peak - one.kept for one in passes)
        return max(self._pass(some.within(chunk_tokens)).peak for some in inputs)

    def _pass(self, inputs: ChunkInputs) -> PassBytes:
        if inputs not in self._passes:
            self._passes[inputs] = count_pass(self._backbone, inputs)
        return self._passes[inputs]

    def _trained_groups(self, num_temperatures: int, num_steps: int) -> list[list[int]]:
        """Return the sizes of the trained parameters in each group of the optimizer (`parameter_groups`)."""
        trained = [parameter for parameter in self._backbone.parameters() if parameter.requires_grad]
        matrices = [parameter.numel() for parameter in trained if parameter.ndim >= 2]
        vectors = [parameter.numel() for parameter in trained if parameter.ndim < 2] + [1] * num_steps
        temperatures = [num_temperatures] if num_temperatures else []
        return [group for group in (matrices, vectors, temperatures) if group]

    def _weights(self, groups: Sequence[Sequence[int]], workers: int, zero_stage: int) -> int:
        if zero_stage == 3:
            sizes = [parameter.numel() for parameter in self._backbone.parameters()] + list(groups[-1])[:1]
            pieces = sum(ceil(size / workers) for size in sizes)
            return self._value_bytes * (pieces + sum(size for size in sizes if size < WHOLE_ELEMENTS))
        trained = sum(_aligned(sum(group), workers) for group in groups) * self._value_bytes
        return trained + round(sum(self._frozen_bytes(module) for module in self._backbone.modules()))

    def _frozen_bytes(self, module: nn.Module) -> float:
        """Return the bytes of the frozen parameters that a module holds itself."""
        frozen = [parameter for parameter in module.parameters(recurse=False) if not parameter.requires_grad]
        if self._model.quantize and type(module) is nn.Linear:
            return sum(
                _NF4 * parameter.numel() if parameter.ndim == 2 else 2 * parameter.numel() for parameter in frozen
            )
        return sum(self._value_bytes * parameter.numel() for parameter in frozen)

    def _buffers(self, num_trained: int, zero_stage: int) -> int:
        if zero_stage < 3:
            return min(BUCKET_ELEMENTS, num_trained) * (
                self._value_bytes + _FP32
            )  # and its copy in fp32, which is sent
        num_all = sum(parameter.numel() for parameter in self._backbone.parameters())
        # DeepSpeed keeps the frozen weights that it gathers in the backward pass until its end.
        return self._value_bytes * (num_all - num_trained + min(BUCKET_ELEMENTS, num_all))


def _aligned(num_elements: int, workers: int) -> int:
    unit = _ALIGNED_PER_RANK * workers
    return ceil(num_elements / unit) * unit


def _elements_of_rank(groups: Sequence[Sequence[int]], workers: int, zero_stage: int) -> int:
    """Return how many trained values a rank updates, with what fills up the last rank's piece."""
    if zero_stage == 3:
        return sum(ceil(size / workers) for group in groups for size in group)
    return sum(_aligned(sum(group), workers) // workers for group in groups)


def loss_bytes(share: WorkerShare, objective: AnyObjectiveConfig, width: int) -> int:
    """Return the bytes of the loss: vectors of this width that are gathered, and the scores of a tile.

    A re-ranker has one number a pair, which counts for nothing.
    """
    if not isinstance(objective, ObjectiveConfig):
        return 0
    all_pairs = share.workers * share.pairs
    objectives = [objective, *map(objective.of_task, objective.tasks)]  # the task that needs the most
    gathers_queries = any(some.symmetric or "queries" in some.same_side for some in objectives)
    shares_mined = any(some.mined.shared for some in objectives)
    mined = share.negatives_per_pair * (all_pairs if shares_mined else share.pairs)
    mined_columns = share.negatives_per_pair * (all_pairs if shares_mined else 1)
    columns = all_pairs * (1 + max(len(some.same_side) for some in objectives)) + mined_columns
    vectors = share.pairs + all_pairs * (1 + gathers_queries) + mined
    rows = min(share.pairs, objective.tile_rows or share.pairs)
    num_roundings = len(objective.quantized.types) if objective.quantized else 0
    num_views = (1 + len(objective.matryoshka)) * (1 + num_roundings)
    copies = _TILE_COPIES + _COPIES_PER_WIDTH * (num_views - 1)
    return round(_FP32 * (_VECTOR_COPIES * vectors * width + copies * rows * columns))
