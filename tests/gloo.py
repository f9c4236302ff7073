"""Run a function in several plain gloo processes, without Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_workers(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`function(rank, world_size, *args)` in each process; their results in rank order.

    The function must be importable (module level). Results travel through `torch.save`. The first exception of a
    worker is raised here with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (function, world_size, folder, args), nprocs=world_size)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


def _work(rank: int, function: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=60), world_size, rank)
    try:
        torch.save(function(rank, world_size, *args), Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()
