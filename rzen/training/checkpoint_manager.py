"""When a checkpoint is due, and writing it while the next steps run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist

from rzen.training import checkpoint
from rzen.training.telemetry import Row

# Between two looks for a notice, which ranks take together. Spot machines are announced two minutes ahead, or half.
ASK_S = 2.0


class CheckpointStore(Protocol):
    """Where checkpoints live. What a folder holds is the business of `rzen.training.checkpoint`."""

    def latest(self) -> Path | None:
        """Local folder of the newest published checkpoint; the same checkpoint on all ranks of one start."""

    def publish(self, folder: Path, step: int) -> None:
        """Take over a finished folder, all or nothing for readers; it may be moved. Called in a thread of rank 0."""

    def best(self) -> Path | None:
        """Local folder of the best published checkpoint, if it is not the newest. Called on rank 0 at the end."""


class CheckpointManager:
    """Looks before and after each step whether to take a checkpoint. Every rank has one; a thread of rank 0 writes.

    As a context it ends when the last checkpoint is written, and raises what went wrong with it. There is a checkpoint
    of `start` steps already, or nothing to save. Every few seconds all ranks ask `preempted`, which may
    be a collective; one that says so is enough.
    """

    def __init__(
        self,
        engine: Any,
        store: CheckpointStore,
        *,
        start: int,
        every_steps: int,
        plan_fingerprint: str,
        preempted: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._store = store
        self._taken = start
        self._every_steps = every_steps
        self._plan_fingerprint = plan_fingerprint
        self._preempted = preempted
        self._asked_s = time.monotonic()
        self._noticed = False
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def all_ready(self, ready: bool, done: int) -> bool:
        """Whether every rank is `ready` for the step after `done` steps. A collective, to be repeated until it is.

        Looks for a notice now and then, and takes a checkpoint then: also while no batch comes, as where the node that
        is about to go takes no more tasks of the feed.
        """
        # Ranks must ask together, and by clocks of their own some would ask earlier than others.
        recent = self._noticed or time.monotonic() - self._asked_s < ASK_S
        flags = torch.tensor([ready, recent], dtype=torch.int32, device=self._engine.device)
        dist.all_reduce(flags, dist.ReduceOp.MIN)
        all_are_ready, recent = (bool(flag) for flag in flags.tolist())
        if not recent:
            self._asked_s = time.monotonic()
            noticed = torch.tensor([self._preempted()], dtype=torch.int32, device=self._engine.device)
            dist.all_reduce(noticed, dist.ReduceOp.MAX)  # one rank is enough
            self._noticed = bool(noticed)
            if self._noticed and done > self._taken:
                self._take(done)
        return all_are_ready

    def after(self, row: Row, *, is_last: bool) -> None:
        """A collective. `row` is that of the step that has been done."""
        done = int(row["step"]) + 1
        # Not while steps are skipped: it may be the weights, and then the last checkpoint is a better one.
        if is_last or (done % self._every_steps == 0 and not row["skipped"]):
            self._take(done)

    def _take(self, done: int) -> None:
        self._taken = done
        taken = checkpoint.snapshot(self._engine, step=done, plan_fingerprint=self._plan_fingerprint)
        if taken is not None:
            if self._writing is not None:
                self._writing.result()  # one at a time: each holds a copy of the state
            self._writing = self._thread.submit(self._write, taken)

    def _write(self, taken: checkpoint.Snapshot) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / f"step-{taken.state.step:06d}"
            taken.write(folder)
            self._store.publish(folder, taken.state.step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
        if kind is None and self._writing is not None:
            self._writing.result()
