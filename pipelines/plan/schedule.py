"""Which source fills each block of each step: exact shares, spread evenly over the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.plan.types import LANE_STREAM, SOURCE_STREAM, Int64Array

Phase = tuple[int, tuple[float, ...]]
"""First step, and the share of each source from there on."""
_Ordinals = npt.NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Lane:
    """Sources that fill global batches together: one source with whole batches, or all sources with one block size."""

    sources: tuple[int, ...]  # ordinals in the plan
    blocks: int  # of a global batch


class Schedule:
    """The sources of every step below `num_steps`. Shares are those of a run of `planned_steps`."""

    def __init__(
        self, lanes: Sequence[Lane], phases: Sequence[Phase], num_steps: int, planned_steps: int, seed: int
    ) -> None:
        self._lanes = tuple(lanes)
        lane_parts: list[_Ordinals] = []
        source_parts: list[list[_Ordinals]] = [[] for _ in lanes]
        stops = [min(first, num_steps) for first, _ in phases[1:]] + [num_steps]
        for (first, shares), stop in zip(phases, stops, strict=True):
            # Planned to the end of the run, as if no phase followed: a later phase changes nothing before it.
            lane_shares = [sum(shares[ordinal] for ordinal in lane.sources) for lane in lanes]
            lane_counts = apportion(lane_shares, planned_steps - first)
            lane_of_step = spread(lane_counts, [seed, LANE_STREAM, first])[: max(0, stop - first)]
            lane_parts.append(lane_of_step)
            num_used = np.bincount(lane_of_step, minlength=len(lanes))
            for number, lane in enumerate(lanes):
                source_shares = [shares[ordinal] for ordinal in lane.sources]
                source_counts = apportion(source_shares, lane.blocks * lane_counts[number])
                sequence = spread(source_counts, [seed, SOURCE_STREAM, first, number])[: lane.blocks * num_used[number]]
                source_parts[number].append(np.array(lane.sources, np.int16)[sequence])
        self._lane_of_step = np.concatenate(lane_parts)
        self._nth_of_lane = _count_earlier(self._lane_of_step, len(lanes))
        self._source_of_block = [np.concatenate(parts) for parts in source_parts]
        all_blocks = np.concatenate(self._source_of_block)
        num_sources = sum(len(lane.sources) for lane in lanes)
        # Each source is in one lane only. Counting through the lanes one after the other counts within each source.
        nth = _count_earlier(all_blocks, num_sources)
        self._nth_of_source = np.split(nth, np.cumsum([len(blocks) for blocks in self._source_of_block])[:-1])
        self.counts: tuple[int, ...] = tuple(np.bincount(all_blocks, minlength=num_sources).tolist())
        """Blocks of each source in the whole schedule."""

    def blocks(self, step: int) -> Iterator[tuple[int, int]]:
        """Yield (ordinal of the source, number of earlier blocks of that source) for each block of a step."""
        number, nth = int(self._lane_of_step[step]), int(self._nth_of_lane[step])
        num_blocks = self._lanes[number].blocks
        for at in range(nth * num_blocks, (nth + 1) * num_blocks):
            yield int(self._source_of_block[number][at]), int(self._nth_of_source[number][at])


def apportion(shares: Sequence[float], steps: int) -> tuple[int, ...]:
    """Split `steps` by largest remainder: exact to one step for every source."""
    if steps == 0:
        return (0,) * len(shares)
    exact = np.asarray(shares) / sum(shares) * steps
    counts = np.floor(exact).astype(int)
    missing = steps - int(counts.sum())
    # The steps that rounding down has left go to the largest remainders. Stable: the first of equal ones wins.
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return tuple(int(c) for c in counts)


def spread(counts: Sequence[int], seed: list[int]) -> _Ordinals:
    """Order ordinals so that each is spread evenly.

    The run is cut into c equal spans for an ordinal that comes c times. Each span gets one, at a random point.
    """
    rng = np.random.default_rng(seed)
    at = np.concatenate([(np.arange(c) + rng.random(c)) / max(c, 1) for c in counts])
    ordinal = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    return ordinal[np.argsort(at, kind="stable")]


def _count_earlier(values: _Ordinals, num_values: int) -> Int64Array:
    """Count, for each value, how often it came before."""
    nth = np.zeros(len(values), np.int64)
    for value in range(num_values):
        same = values == value
        nth[same] = np.arange(int(same.sum()))
    return nth
