"""Limits on what Ray Data's scheduling loop does in a round. It runs in the process that deals tasks to the ranks.

While finished tasks wait for memory, `ray.wait` returns at once, and the loop takes most of a core: `PacedRounds`.

A round reads what a task has made until there is nothing, or until the limit of bytes. The rows of the schedule have a
few bytes, and their task makes them as fast as they are read. So a round would read the whole schedule, and start no
other task for a minute: `FewRowsAhead`.
"""

from __future__ import annotations

import time

from ray.data._internal.execution.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer
from ray.data._internal.execution.streaming_executor import StreamingExecutor

ROWS_AHEAD = 128
"""Rows of the schedule that wait for their task at most. A round starts fewer."""
_ROW_BYTES = 24  # three integers
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


class FewRowsAhead(BackpressurePolicy):  # type: ignore[misc]
    """Reads rows of the schedule, which is what the first operator makes, only as far as tasks will soon need them."""

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        """Return the bytes of the rows that are missing. None for other operators."""
        if not any(isinstance(source, InputDataBuffer) for source in op.input_dependencies):
            return None
        waiting: int = sum(self._topology[reader].total_enqueued_input_blocks() for reader in op.output_dependencies)
        return max(0, ROWS_AHEAD - waiting) * _ROW_BYTES
