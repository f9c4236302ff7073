"""Which samples form global batch t: a pure function of (what the sources hold, mixture, seed, t).

Nothing here depends on the number of workers, on files or on time. A run resumed at step t on any number of workers
gets the batches that the uninterrupted run would have got.

    schedule.py    step -> (source, n-th batch of that source)    exact shares, spread evenly; new shares in each phase
    weights.py     epoch -> which samples with a weight it takes  as many in every epoch
    subset.py      source -> its samples that are used            at most so many, in runs of adjacent samples
    placement.py   constrained samples -> their batches           duplicates apart, clusters together (packing.py)
    epoch.py       n-th batch -> its samples                      placed ones, then permuted runs of the rest

State is a few bytes for each run of adjacent samples, not for each sample. A batch costs no more than its rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from typing import TypedDict

import numpy as np

from pipelines.errors import UserError
from pipelines.plan.epoch import Epoch
from pipelines.plan.schedule import Lane, Phase, Schedule
from pipelines.plan.sources import PlanSource
from pipelines.plan.types import RESERVE_STREAM, Block, GlobalBatch, MixturePhase, Row


class SourceDescription(TypedDict):
    """What decides the batches of one source."""

    members: dict[str, int]
    tables: str
    batch: int
    run_length: int


class PlanDescription(TypedDict):
    """What decides every batch of a plan, apart from its phases."""

    seed: int
    steps: int
    global_batch: int
    sources: dict[str, SourceDescription]
    shares: dict[str, float]


class Plan:
    """The schedule of a run. Build it with `build_plan`. Not thread-safe; pickles without its caches."""

    def __init__(
        self,
        sources: tuple[PlanSource, ...],
        global_batch: int,
        num_steps: int,
        phases: tuple[Phase, ...],
        seed: int,
        planned_steps: int | None = None,
    ) -> None:
        self.sources = sources
        self.global_batch = global_batch
        self.num_steps = num_steps
        self.seed = seed
        self._phases = phases
        self._planned_steps = planned_steps or num_steps  # of the whole run, which `until` does not change
        self._schedule = Schedule(_lanes(sources), phases, num_steps, self._planned_steps, seed)
        self._epochs: OrderedDict[tuple[int, int], Epoch] = OrderedDict()

    def __reduce__(self) -> tuple[type[Plan], tuple[object, ...]]:
        arguments = (self.sources, self.global_batch, self.num_steps, self._phases, self.seed, self._planned_steps)
        return Plan, arguments

    @property
    def shares(self) -> dict[str, float]:
        """Source -> its relative share of the steps, as long as no phase changes it."""
        return dict(zip([source.name for source in self.sources], self._phases[0][1], strict=True))

    @property
    def members(self) -> list[str]:
        """Names of the sources of the dataset that the plan draws from, each of them in one source of the plan."""
        return [member for source in self.sources for member in source.members]

    @property
    def phase_starts(self) -> list[int]:
        """First steps of the phases, ascending."""
        return [first for first, _ in self._phases[1:]]

    def with_mixture_phase(self, phase: MixturePhase) -> Plan:
        """Return the plan with other weights from a step on. Raises `UserError` unless it is after the last phase."""
        starts = [*self.phase_starts, phase.first_step]
        if starts != sorted(set(starts)) or not 0 < phase.first_step < self.num_steps:
            problem = f"begin at steps {starts}"
            raise UserError("phases", problem, f"ascending steps between 0 and {self.num_steps} are needed")
        shares = tuple(source_weight(phase.weights, source) for source in self.sources)
        phases = (*self._phases, (phase.first_step, shares))
        return Plan(self.sources, self.global_batch, self.num_steps, phases, self.seed)

    def until(self, stop: int) -> Plan:
        """Return the first `stop` steps of this plan."""
        return Plan(self.sources, self.global_batch, stop, self._phases, self.seed, self._planned_steps)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> GlobalBatch:
        """Return the global batch of `step`, or one rank's contiguous share of each block, which must divide evenly."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is outside 0..{self.num_steps - 1}")
        blocks = []
        for ordinal, nth in self._schedule.blocks(step):
            source = self.sources[ordinal]
            epoch, position = divmod(nth, source.batches_per_epoch)
            share = source.batch // world_size
            numbers = self._epoch(ordinal, epoch).numbers(position, rank * share, (rank + 1) * share)
            blocks.append(Block(source.name, epoch, source.rows(numbers, epoch)))
        return GlobalBatch(step, tuple(blocks))

    def reserves(self, step: int, position: int, count: int) -> list[Row]:
        """Return up to `count` samples that may replace row `position` of a step: of its member, not in its batch.

        A pure function of seed, step and position, so that every number of workers takes the same. No two rows of a
        batch share one, unless the member is too small.
        """
        blocks = self.batch(step).blocks
        rows = [row for block in blocks for row in block.rows]
        epochs = [block.epoch for block in blocks for _ in block.rows]
        member = rows[position][0]
        used = np.array([index for name, index in rows if name == member])
        rng = np.random.default_rng([self.seed, RESERVE_STREAM, step])
        source = next(source for source in self.sources if member in source.members)
        return source.reserves(rng, member, epochs[position], used, position, count)

    def _epoch(self, ordinal: int, epoch: int) -> Epoch:
        key = (ordinal, epoch)
        if key not in self._epochs:
            self._epochs[key] = self.sources[ordinal].draw_epoch(self.seed, epoch)
            if len(self._epochs) > 2 * len(self.sources):  # tasks run ahead: two epochs of a source are in use
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(key)
        return self._epochs[key]

    def check_world_size(self, world_size: int) -> None:
        """Raise `UserError` unless every batch can be dealt evenly to `world_size` ranks."""
        for source in self.sources:
            if source.batch % world_size:
                raise UserError(
                    "global_batch",
                    f"batches of source {source.name!r} have {source.batch} samples, which {world_size} workers"
                    " cannot share evenly",
                    f"choose a multiple of {world_size}, or another cluster.workers",
                )

    def describe(self) -> PlanDescription:
        """Describe what decides every batch, apart from the phases.

        Plans with equal descriptions and phases give equal batches. A run saves the description, so that an error can
        name what differs in a changed plan.
        """
        sources: dict[str, SourceDescription] = {}
        for source in self.sources:
            sources[source.name] = {
                "members": dict(zip(source.members, source.sizes, strict=True)),
                "tables": source.tables_fingerprint,
                "batch": source.batch,
                "run_length": source.run_length,
            }
        return {
            "seed": self.seed,
            "steps": self._planned_steps,
            "global_batch": self.global_batch,
            "sources": sources,
            "shares": self.shares,
        }

    def fingerprint(self) -> str:
        """Return a hash of `describe`, which is saved with checkpoints and compared on resume."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]

    def steps_of_sources(self) -> list[float]:
        """Return the steps of each source, in their order. A block of a global batch is a part of a step."""
        counts = zip(self.sources, self._schedule.counts, strict=True)
        return [count / source.blocks for source, count in counts]

    def summary(self) -> list[str]:
        """Return one line for each source, and one for each thing that could not be met in full."""
        lines = []
        for source, steps in zip(self.sources, self.steps_of_sources(), strict=True):
            what = f"{'blocks' if source.blocks > 1 else 'batches'} of {source.batch}"
            lines.append(
                f"{source.name}: {source.num_samples} samples, {what}, {steps:g} of {self.num_steps}"
                f" steps ({steps * source.step_samples / source.num_samples:.2f} epochs)"
            )
            lines += [f"{source.name}: {note}" for note in source.notes()]
        return lines


def source_weight(weights: dict[str, float], source: PlanSource) -> float:
    """Return the weight of a source. A merged source has that of its own name, or the sum of its members' weights."""
    return weights.get(source.name) or sum(weights.get(member, 0.0) for member in source.members)


def _lanes(sources: tuple[PlanSource, ...]) -> list[Lane]:
    """Sources with whole global batches have a lane each. Sources with blocks of one size share a lane."""
    by_size: dict[int, list[int]] = {}
    for ordinal, source in enumerate(sources):
        by_size.setdefault(source.batch if source.blocks > 1 else -ordinal, []).append(ordinal)
    return [Lane(tuple(lane), sources[lane[0]].blocks) for lane in by_size.values()]
