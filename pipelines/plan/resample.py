"""Draw sources that converge slowly more often (RzenEmbed, arXiv 2510.27350, section 4).

The paper gives no rule. Our choice: a source's share grows with the fraction of its first loss that is left. The run
records the new weights. They are an input of the plan, which stays a pure function of recorded values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.config import ResampleConfig
from pipelines.plan.plan import Plan
from pipelines.plan.types import MixturePhase


def next_mixture_change(
    plan: Plan, rows: Sequence[Mapping[str, Any]], step: int, config: ResampleConfig
) -> MixturePhase | None:
    """Return the phase that begins at `step`, or None if none begins or the plan has it already.

    `rows` hold source and loss of every step.

        weight = share without resampling x (mean loss since the last change / mean loss before the first)^strength
    """
    if step % config.every_steps or step in (0, *plan.phase_starts) or step >= plan.num_steps:
        return None
    first = _mean_losses(rows, 0, config.every_steps)
    last = _mean_losses(rows, step - config.every_steps, step)
    weights = {}
    for name, share in plan.shares.items():
        ratio = last[name] / first[name] if name in first and name in last and first[name] > 0 else 1.0
        factor = max(ratio, 0.0) ** config.strength
        weights[name] = share * min(max(factor, 1 / config.max_factor), config.max_factor)
    return MixturePhase(step, weights)


def _mean_losses(rows: Sequence[Mapping[str, Any]], start: int, stop: int) -> dict[str, float]:
    losses: dict[str, list[float]] = {}
    for row in rows:
        if start <= row["step"] < stop and math.isfinite(row["loss"]):  # a skipped step has no finite loss
            for source in row["source"].split("+"):  # each of several blocks counts with the mean loss of all
                losses.setdefault(source, []).append(float(row["loss"]))
    return {name: sum(values) / len(values) for name, values in losses.items()}
