"""Torch's process group of a group of workers, without torch in any other process.

Ray's own `TorchConfig` imports torch into the driver and the controller, and into the workers before they start to
read. Each import takes 2.5 s of CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray.train
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig


class Rendezvous(BackendConfig):  # type: ignore[misc]
    """Gives each worker its rank and the address of the first one, as `torchrun` does."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Return what Ray Train calls when it starts the workers."""
        return _Rendezvous


class _Rendezvous(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True  # NCCL reaches the other GPUs of a node only if they are visible

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Set the variables of `init_process_group` in each worker."""
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(_set_variables, address, port)


def _set_variables(address: str, port: int) -> None:
    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }


@contextmanager
def process_group(*, on_gpu: bool) -> Iterator[None]:
    """Join the process group of all workers: NCCL on the worker's GPU, or gloo.

    It is left at the end. After an error it is not, because the other workers may not answer: the process ends anyway.
    """
    import torch.distributed as dist

    device = "cpu"
    if on_gpu:
        import torch
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
        device = str(get_device())
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # a lost worker is an error, and no hang
    os.environ["ACCELERATE_TORCH_DEVICE"] = device
    dist.init_process_group("nccl" if on_gpu else "gloo")
    yield
    dist.destroy_process_group()
