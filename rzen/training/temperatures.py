"""Temperatures: in fp32 whatever the model computes in, saved with every model, carried to the next stage if asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from rzen.config import TemperatureConfig
from rzen.model.checkpoints import read_temperatures
from rzen.training import checkpoint

SETTING = "objective.temperature.carried"


def carried_temperatures(config: TemperatureConfig, folder: Path) -> dict[str, float]:
    """Return the temperatures that a stage takes over from the model or adapter in `folder`: none, unless asked.

    Raises `UserError` where the model has none, or one out of bounds.
    """
    if not config.carried:
        return {}
    found = read_temperatures(folder)
    if not found:
        raise UserError(SETTING, f"{folder} names no temperatures", "set it to false, to start from `initial`")
    for task, value in found.items():
        if not config.minimum <= value <= config.maximum:
            bounds = f"[minimum={config.minimum}, maximum={config.maximum}]"
            raise UserError(SETTING, f"task {task!r} of {folder} has {value:g}, outside of {bounds}", "widen them")
    return found


def use_fp32_temperatures(engine: Any) -> None:
    """Let the objective use the fp32 temperatures of the optimizer. A collective of a few numbers.

    In bf16, DeepSpeed rounds the parameter: 0.012 would be 0.01183. Call it whenever the optimizer's copy has changed.
    """
    objective = engine.module.objective
    if objective is not None and objective.config.temperature.learnable:
        theta_T = checkpoint.full_fp32(objective.theta_T)
        objective.exact_theta_T.copy_(theta_T)
