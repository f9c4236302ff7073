"""Rounds of Ray Data's loop that change nothing wait, all others do not, and none reads the whole schedule."""

import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from ray.data import DataContext
from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer

from pipelines.feed import pacing


class Executor:
    """What a round sees of Ray Data's executor."""

    def __init__(self) -> None:
        self.metrics = SimpleNamespace(num_tasks_submitted=0, num_task_outputs_generated=0, num_tasks_finished=0)
        self._topology = [SimpleNamespace(metrics=self.metrics)]
        self.is_starving = False

    def _consumer_idling(self) -> bool:
        return self.is_starving


def waited_s(rounds: Any, executor: Any) -> float:
    begun_s = time.monotonic()
    rounds.on_execution_step(executor)
    return time.monotonic() - begun_s


def test_only_a_round_that_changed_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "IDLE_ROUND_S", 0.2)
    executor: Any = Executor()
    rounds = pacing.PacedRounds()
    assert waited_s(rounds, executor) < 0.1  # the first one
    assert waited_s(rounds, executor) > 0.15
    for name in vars(executor.metrics):
        setattr(executor.metrics, name, 1)
        assert waited_s(rounds, executor) < 0.1, name
    assert waited_s(rounds, executor) > 0.15
    executor.is_starving = True
    assert waited_s(rounds, executor) < 0.1
    executor.is_starving = False
    time.sleep(0.2)
    assert waited_s(rounds, executor) < 0.1, "the round itself took as long"


class Operator:
    """What the policy sees of a stage of Ray Data."""

    def __init__(self, source: Any) -> None:
        self.input_dependencies, self.output_dependencies = [source], list[Any]()


def test_rows_are_read_as_far_as_tasks_will_soon_need_them() -> None:
    schedule: Any = Operator(InputDataBuffer.__new__(InputDataBuffer))
    tasks: Any = Operator(schedule)
    schedule.output_dependencies.append(tasks)

    def limit(waiting: int) -> int | None:
        topology: Any = {tasks: SimpleNamespace(total_enqueued_input_blocks=lambda: waiting)}
        policy = pacing.FewRowsAhead(DataContext(), topology, Mock())
        assert policy.max_task_output_bytes_to_read(tasks) is None, "batches have the limits of Ray Data"
        return policy.max_task_output_bytes_to_read(schedule)

    ahead = pacing.ROWS_AHEAD
    assert [limit(waiting) for waiting in (0, ahead - 1, ahead, 10 * ahead)] == [24 * ahead, 24, 0, 0]
