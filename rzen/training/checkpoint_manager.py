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
from safetensors import SafetensorError

from pipelines.errors import TakenError, UserError
from rzen.training import checkpoint
from rzen.training.checkpoint_state import Origin
from rzen.training.telemetry import Row

LAST_PATIENCE_S = 600.0
_PAUSE_S = 1.0
ASK_S = 2.0  # between two checks for a preemption notice, which comes two minutes or 30 s before the machine goes


class CheckpointStore(Protocol):
    """Where checkpoints are stored. `rzen.training.checkpoint` decides what a folder holds."""

    def latest(self) -> Path | None:
        """Return the local folder of the checkpoint to resume from, the same one on all ranks of a start."""

    def publish(self, folder: Path, step: int) -> None:
        """Publish a finished folder, which may be moved. Readers see all or nothing. A thread of rank 0 calls it.

        Raises `TakenError` if another run owns the place by now.
        """

    def report(self, event: str) -> None:
        """Report a checkpoint that could not be written. A thread of rank 0 calls it."""

    def best(self) -> Path | None:
        """Return the local folder of the best checkpoint, if it is not the newest. Called on rank 0 at the end."""


class CheckpointManager:
    """Decides before and after each step whether to take a checkpoint. Every rank has one. A thread of rank 0 writes.

    A checkpoint that cannot be written, because the disk is full or the store does not answer, is taken again after the
    next step. As a context it ends when the last checkpoint is written. That one is tried again for `last_patience_s`,
    then what went wrong is raised. There is already a checkpoint of `start` steps, or nothing to save. Every few
    seconds all ranks ask `preempted`, which may be a collective. One rank that says yes is enough.
    """

    def __init__(
        self,
        engine: Any,
        store: CheckpointStore,
        *,
        start: int,
        every_steps: int,
        origin: Origin,
        preempted: Callable[[], bool],
        last_patience_s: float = LAST_PATIENCE_S,
    ) -> None:
        self._engine = engine
        self._store = store
        self._taken = start
        self._every_steps = every_steps
        self._origin = origin
        self._preempted = preempted
        self._last_patience_s = last_patience_s
        self._failed = False
        self._asked_s = time.monotonic()
        self._noticed = False
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[bool] | None = None
        self._unwritten: checkpoint.Snapshot | None = None
        self._problem: Exception | None = None

    def all_ready(self, ready: bool, done: int) -> bool:
        """Return whether every rank is `ready` for the step after `done` steps. A collective, repeated until it is.

        Every few seconds it checks for a preemption notice, and takes a checkpoint if there is one. It does so also
        while no batch comes: a node that is about to go takes no more tasks of the data loader.
        """
        # Ranks must ask together, and by clocks of their own some would ask earlier than others.
        recent = self._noticed or time.monotonic() - self._asked_s < ASK_S
        written = self._writing is None or not self._writing.done() or self._writing.result()
        flags = torch.tensor([ready, recent, written], dtype=torch.int32, device=self._engine.device)
        dist.all_reduce(flags, dist.ReduceOp.MIN)
        all_are_ready, recent, written = (bool(flag) for flag in flags.tolist())
        self._failed = not written
        if not recent:
            self._asked_s = time.monotonic()
            noticed = torch.tensor([self._preempted()], dtype=torch.int32, device=self._engine.device)
            dist.all_reduce(noticed, dist.ReduceOp.MAX)  # one rank is enough
            self._noticed = bool(noticed)
            if self._noticed and done > self._taken:
                self._take(done)
        return all_are_ready

    def after(self, row: Row, *, is_last: bool) -> None:
        """Take a checkpoint if one is due after the step of `row`. A collective."""
        done = int(row["step"]) + 1
        # Not while steps are skipped: it may be the weights, and then the last checkpoint is a better one.
        if is_last or ((self._failed or done % self._every_steps == 0) and not row["skipped"]):
            self._take(done)

    def _take(self, done: int) -> None:
        self._taken = done
        taken = checkpoint.snapshot(self._engine, step=done, origin=self._origin)
        if taken is not None:
            if self._writing is not None:
                self._writing.result()  # one at a time: each holds a copy of the state
                self._unwritten = None
            self._writing = self._thread.submit(self._write, taken)

    def _write(self, taken: checkpoint.Snapshot) -> bool:
        """Return whether the checkpoint was written. Raises `TakenError`."""
        step = taken.state.step
        try:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / f"step-{step:06d}"
                taken.write(folder)
                self._store.publish(folder, step)
        except TakenError:
            raise
        except (OSError, SafetensorError, UserError) as error:
            if self._problem is None:
                self._store.report(f"checkpoint of step {step} not written, trying again after the next step: {error}")
            self._unwritten, self._problem = taken, error
            return False
        if self._problem is not None:
            self._store.report(f"checkpoint of step {step} written")
        self._unwritten = self._problem = None
        return True

    def _write_last(self) -> None:
        """Write the last checkpoint again until it is there. Raises what went wrong after `last_patience_s`."""
        deadline_s = time.monotonic() + self._last_patience_s
        while self._unwritten is not None and self._problem is not None:
            if time.monotonic() > deadline_s:
                raise self._problem
            time.sleep(_PAUSE_S)
            self._write(self._unwritten)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
        if kind is None and self._writing is not None:
            self._writing.result()
            self._write_last()
