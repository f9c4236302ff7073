"""Processes of a local Ray that have imported what the data loader needs, before it asks for them."""

from __future__ import annotations

import importlib
import os

from pipelines.imports import without_garbage_collection

_MAX_PROCESSES = 8


def warm_up(*modules: str) -> None:
    """Import modules in idle processes of a local Ray, and return at once.

    The first tasks of the data loader take such a process. A new one would import Ray Data and the encoder for 3 s when
    everything else waits for the first batch. Actors always take a new process. On a cluster, nobody knows which nodes
    a job will use, and nothing happens.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    import ray

    task = ray.remote(num_cpus=0, max_retries=0, runtime_env={"env_vars": _variables()})(_import_all)
    for _ in range(min(_MAX_PROCESSES, os.cpu_count() or 1)):
        task.remote(modules)


def _variables() -> dict[str, str]:
    """Return the variables that Ray Train sets for its processes. It takes only idle ones that have the same."""
    from ray.train.v2._internal import constants
    from ray.train.v2.api import data_parallel_trainer as trainer

    name = trainer.RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
    variables: dict[str, str] = {name: trainer.DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE}
    variables |= constants.get_env_vars_to_propagate()
    return variables


def _import_all(modules: tuple[str, ...]) -> None:
    with without_garbage_collection():
        for name in modules:
            importlib.import_module(name)
