"""The session's Ray has forks of one process for workers. They are as Ray's own, but for imported libraries."""

import os
import signal
import sys
from typing import Any

import pytest
import ray
from ray._raylet import UniqueID

from tests.ray_forks import is_off

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.skipif(is_off(), reason="RZEN_TEST_RAY_WORKERS=own"),
]


@ray.remote(num_cpus=0)
class Worker:
    def describe(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "parent": os.getppid(),
            "group": os.getpgid(0),
            "variable": os.environ.get("RZEN_TEST_VARIABLE"),
            "job": ray.get_runtime_context().get_job_id(),
            "modules": {name.partition(".")[0] for name in sys.modules},
            "id": UniqueID.from_random().hex(),
            "argument": os.path.basename(sys.argv[0]),  # noqa: PTH119
        }


def test_workers_are_forks_with_their_own_ids_groups_and_variables() -> None:
    variables = [{}, {}, {"RZEN_TEST_VARIABLE": "a b"}]
    actors = [Worker.options(runtime_env={"env_vars": some}).remote() for some in variables]  # type: ignore[attr-defined]
    found = ray.get([actor.describe.remote() for actor in actors])
    assert len({one["parent"] for one in found}) == 1, "not forks of one process"
    for name in ("pid", "id", "group"):
        assert len({one[name] for one in found}) == len(actors), name
    assert [one["variable"] for one in found] == [None, None, "a b"]
    for one in found:
        assert one["job"] == ray.get_runtime_context().get_job_id()
        assert one["argument"] == "default_worker.py"
        assert "torch" in one["modules"]
        assert not one["modules"] & {"pipelines", "rzen", "jobs"}, "the fork would not import this project itself"
    for actor in actors:
        ray.kill(actor)


def test_others_live_when_one_is_killed() -> None:
    actors = [Worker.remote() for _ in range(3)]  # type: ignore[attr-defined]
    pids = [one["pid"] for one in ray.get([actor.describe.remote() for actor in actors])]
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(actors[0].describe.remote())
    assert [one["pid"] for one in ray.get([actor.describe.remote() for actor in actors[1:]])] == pids[1:]
    for actor in actors[1:]:
        ray.kill(actor)
