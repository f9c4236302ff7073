"""`cluster.chunk_tokens: auto`: the largest chunk that fits, found once before the first step of a run.

On a GPU, chunks of growing size are embedded, with a backward pass, until the memory ends. On the CPU, and in ZeRO
stage 3, their memory is counted instead (`rzen.training.memory`). All ranks take the smallest answer of all ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.errors import UserError
from rzen.config import AnyObjectiveConfig, ModelConfig, OptimConfig, prompt_setting
from rzen.model.activations import ChunkInputs, read_config
from rzen.training.learner import Learner
from rzen.training.memory import MemoryModel, WorkerShare, loss_bytes

_USED = 0.9  # of the memory; the rest is for the allocator, and for inputs that are packed less well


@dataclass(frozen=True)
class AutoChunk:
    """What the chunks of a run are fitted to."""

    shares: Sequence[WorkerShare]
    """What a worker has in a step, one entry for each kind of source."""
    memory_bytes: int | None
    """Memory of a worker. None: that of its GPU, or its share of the free memory of the machine."""

    @property
    def longest(self) -> int:
        """Tokens of the longest input, or of the longest list that is never divided."""
        return max(inputs.tokens * inputs.smallest for share in self.shares for inputs in share.inputs)

    @property
    def most(self) -> int:
        """As many of the longest inputs as have all tokens of a worker's step."""
        return max(-(-sum(some.num_tokens for some in share.inputs) // self.longest) for share in self.shares)


def settle_chunk(
    auto: AutoChunk,
    learner: Learner,
    backbone_dir: str,
    model: ModelConfig,
    objective: AnyObjectiveConfig,
    optim: OptimConfig,
) -> int:
    """Return the tokens of a chunk, equal on all ranks: a number of the longest inputs. A collective.

    Raises `UserError` on all ranks where not even one input fits on one of them.
    """
    device = learner.model.image_mean.device
    on_gpu = device.type == "cuda" and optim.zero_stage < 3
    fits = (
        _fits_by_trial(auto, learner, objective)
        if on_gpu
        else fits_by_estimate(auto, MemoryModel(read_config(backbone_dir), model), objective, optim)
    )
    count = torch.tensor(largest_count(fits, auto.most), device=device)
    if dist.is_initialized():
        dist.all_reduce(count, dist.ReduceOp.MIN)
    if not int(count):
        problem = f"not even one input of {auto.longest:,} tokens fits"
        fix = f"lower {prompt_setting(objective)}.max_visual_tokens, or use larger GPUs"
        raise UserError("cluster.chunk_tokens=auto", problem, fix)
    return int(count) * auto.longest


def largest_count(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest count in 1 .. `most` that fits, 0 if none does. Below one that fits, all counts fit."""
    fitting, above = 0, 1
    while above <= most and fits(above):
        fitting, above = above, 2 * above
    above = min(above, most + 1)
    while above - fitting > 1:
        middle = (fitting + above) // 2
        fitting, above = (middle, above) if fits(middle) else (fitting, middle)
    return fitting


def fits_by_estimate(
    auto: AutoChunk, memory: MemoryModel, objective: AnyObjectiveConfig, optim: OptimConfig
) -> Callable[[int], bool]:
    """Return whether chunks of a number of the longest inputs fit, by what their memory is counted to be."""
    limit = _USED * (auto.memory_bytes or _free_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def fits(count: int) -> bool:
        tokens = count * auto.longest
        return all(memory.worker(share, objective, optim, tokens).total <= limit for share in auto.shares)

    return fits


def fits_by_trial(
    auto: AutoChunk,
    objective: AnyObjectiveConfig,
    width: int,
    peak_bytes: Callable[[ChunkInputs], int],
    memory_bytes: int,
) -> Callable[[int], bool]:
    """Return whether chunks of a number of the longest inputs fit, by embedding them.

    `peak_bytes(inputs)` embeds some, with a backward pass, and returns the most memory that was used, or raises
    `torch.OutOfMemoryError`.
    """
    loss = max(loss_bytes(share, objective, width) for share in auto.shares)
    shapes = sorted({inputs for share in auto.shares for inputs in share.inputs}, key=lambda one: -one.visual_tokens)

    def fits(count: int) -> bool:
        chunks = dict.fromkeys(inputs.within(count * auto.longest) for inputs in shapes)
        try:
            return all(peak_bytes(chunk) + loss <= _USED * memory_bytes for chunk in chunks)
        except torch.OutOfMemoryError:
            return False

    return fits


def run_example(learner: Learner, inputs: ChunkInputs) -> None:
    """Run a chunk of empty inputs, with a backward pass that leaves the gradients of parameters as they are."""
    made = learner.example(inputs)
    trained = [parameter for parameter in learner.model.parameters() if parameter.requires_grad]
    # Not `backward`, which would start the communication of DeepSpeed.
    torch.autograd.grad(made.sum(), trained, allow_unused=True)


def _fits_by_trial(auto: AutoChunk, learner: Learner, objective: AnyObjectiveConfig) -> Callable[[int], bool]:
    device = learner.model.image_mean.device
    backbone: Any = learner.model.backbone

    def peak_bytes(inputs: ChunkInputs) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        run_example(learner, inputs)
        return torch.cuda.max_memory_allocated(device)

    memory_bytes = auto.memory_bytes or torch.cuda.get_device_properties(device).total_memory
    width = backbone.config.get_text_config().hidden_size
    return fits_by_trial(auto, objective, width, peak_bytes, memory_bytes)


def _free_bytes() -> int:
    """Return the free memory of this machine, or of the container that this process is in."""
    free = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return free
