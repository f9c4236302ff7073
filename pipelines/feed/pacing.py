"""A limit on the idle rounds of Ray Data's scheduling loop.

The loop runs in the process that deals tasks to the ranks. While finished tasks wait for memory, `ray.wait` returns at
once, and the loop takes most of a core.
"""

from __future__ import annotations

import time

from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor

IDLE_ROUND_S = 0.05
"""Seconds that a round takes at least if it changed nothing. Where no task has ended, `ray.wait` takes up to 0.1 s."""


class PacedRounds(ExecutionCallback):  # type: ignore[misc]
    """Lets a round that changed nothing wait, unless a rank has nothing to take."""

    def __init__(self) -> None:
        self._counts: list[int] = []
        self._ended_s = time.monotonic()

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Wait if no task was started, has ended or gave a block since the last call."""
        counts = [
            count
            for operator in executor._topology
            for count in (
                operator.metrics.num_tasks_submitted,
                operator.metrics.num_task_outputs_generated,
                operator.metrics.num_tasks_finished,
            )
        ]
        if counts == self._counts and not executor._consumer_idling():
            time.sleep(max(0.0, self._ended_s + IDLE_ROUND_S - time.monotonic()))
        self._counts = counts
        self._ended_s = time.monotonic()
