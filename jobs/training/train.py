"""Job of kind `train`."""

from __future__ import annotations

from typing import Any

from jobs.training.launch import launch
from jobs.training.runs import Run
from jobs.training.specs import TrainSpec


def run(spec: TrainSpec) -> dict[str, Any]:
    """Train, or resume training. A finished run stays as it is."""
    launch([spec], max_parallel=1)
    return {"outputs": [Run(spec).result_url]}
