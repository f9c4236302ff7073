"""The workers of the shared cluster are forks, and still differ in what they draw at random."""

import os
from pathlib import Path

import numpy as np
import pytest
import ray

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0)
class Worker:
    def parent(self) -> str:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text()

    def draw(self) -> float:
        return float(np.random.rand())

    def id(self) -> str:
        return str(ray.ObjectRef.from_random().hex())


@pytest.mark.skipif(os.environ.get("RZEN_TEST_FORK_RAY") != "1", reason="RZEN_TEST_FORK_RAY=1 is not set")
def test_workers_are_forks_of_one_process(ray_cluster: None) -> None:
    workers = [Worker.remote() for _ in range(2)]
    assert all("tests.ray_workers.server" in parent for parent in ray.get([w.parent.remote() for w in workers]))
    first, second = ray.get([worker.draw.remote() for worker in workers])
    assert first != second
    first_id, second_id = ray.get([worker.id.remote() for worker in workers])
    assert first_id != second_id
