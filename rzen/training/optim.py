"""The optimizer: which parameters decay, the learning rate of a step, temperatures within bounds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from rzen.config import OptimConfig
from rzen.training.learner import Learner


def lr_at(step: int, num_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of step 0 <= step < num_steps: linear warm-up, then half a cosine (paper, section 4).

    The first step after the warm-up has the peak rate, the last step `final_lr_fraction` of it. It is a pure function
    of the step, so that a resumed run needs no state for it.
    """
    warmup_steps = int(config.warmup_fraction * num_steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine)


def build_optimizer(learner: Learner, config: OptimConfig) -> AdamW:
    """Return AdamW over the trained parameters. It projects temperatures onto their bounds after each step.

    The projection is a hook of this optimizer. DeepSpeed hands the optimizer the fp32 master copy of each group, so the
    master copy is what the hook clamps.
    """
    first, second = config.betas
    optimizer = AdamW(parameter_groups(learner, config), lr=config.lr, betas=(first, second))
    optimizer.register_step_post_hook(_clamp_temperatures)
    return optimizer


def parameter_groups(learner: Learner, config: OptimConfig) -> list[dict[str, Any]]:
    """Return the groups of parameters. Matrices decay; norms, biases, temperatures and the step of int8 do not.

    `lr_scale` multiplies the rate of a group; temperatures have their own. `bounds` (None or low, high) clamp a group.
    Empty groups are left out.
    """
    trained = [p for p in learner.model.parameters() if p.requires_grad]

    def group(name: str, params: list[nn.Parameter], decay: float, scale: float, bounds: Any) -> dict[str, Any]:
        return {"name": name, "params": params, "weight_decay": decay, "lr_scale": scale, "bounds": bounds}

    objective = learner.objective
    steps = [] if objective is None or objective.log_step is None else [objective.log_step]
    groups = [
        group("matrices", [p for p in trained if p.ndim >= 2], config.weight_decay, 1.0, None),
        group("vectors", [p for p in trained if p.ndim < 2] + steps, 0.0, 1.0, None),
    ]
    if objective is not None and objective.theta_T.requires_grad:
        lr_scale = objective.config.temperature.lr_scale
        groups.append(group("temperatures", [objective.theta_T], 0.0, lr_scale, objective.bounds))
    return [group for group in groups if group["params"]]


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group, each times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


@torch.no_grad()
def _clamp_temperatures(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if group["bounds"] is not None:
            for parameter in group["params"]:
                parameter.clamp_(*group["bounds"])
