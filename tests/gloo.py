"""Run a function in several plain processes, as gloo ranks or without a process group, without Ray."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Importing torch and DeepSpeed takes 8 s of CPU a process. The fork server imports them once; workers are forks of it.
multiprocessing.set_forkserver_preload(
    ["torch", "deepspeed", "rzen.training.worker", "pipelines.feed.reader", "pytest"]
)


def run_workers(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Run `function(rank, world_size, *args)` in each process of a gloo group and return the results in rank order.

    The function must be importable (module level). Results travel through `torch.save`. The first exception of a
    worker is raised here with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_processes(_work, world_size, function, world_size, folder, args)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


def run_processes(function: Callable[..., Any], num_processes: int, *args: Any) -> None:
    """Run `function(number, *args)` in each process, with this process's environment. Results are dropped."""
    mp.start_processes(_in_environment, (dict(os.environ), function, args), num_processes, start_method="forkserver")


def _in_environment(number: int, environment: dict[str, str], function: Callable[..., Any], args: tuple[Any]) -> None:
    # The fork server has the environment of the test that started it, not of the test that runs.
    os.environ.clear()
    os.environ.update(environment)
    function(number, *args)


def _work(rank: int, function: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=60), world_size, rank)
    try:
        torch.save(function(rank, world_size, *args), Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()
