"""Lists the training runs below a folder, from what they keep in their store: nothing is started or connected to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jobs.runtime.lease import active_holder
from jobs.training.runs import (
    DONE,
    FAILED,
    KIND,
    LOG,
    METRICS,
    SPEC,
    STARTS,
    parse_rows,
    read_held_out,
    read_spec,
)
from pipelines.storage.publish import read_mark
from pipelines.storage.store import Store

_LAST_BYTES = 64_000  # of the metrics, which hold the last row
_START = re.compile(rf"{STARTS} \d+ of (\d+)")


@dataclass(frozen=True)
class RunSummary:
    """What `rzen runs` prints of a run."""

    name: str
    state: str
    """`running`, `finished`, `failed`, `interrupted`, or `new` before its first start."""
    step: int
    """Steps that are done, as its metrics say. They are some seconds old."""
    steps: int | None
    """Steps of the whole run. None before its first start."""
    loss: float | None
    """Loss of the last step."""
    held_out: float | None
    """Newest held-out score: hit@1, mean over the sources."""
    best_held_out: float | None
    """Best held-out score."""
    started: str | None
    """Time of the first start, in UTC."""
    folder: str


def runs_below(store: Store) -> Iterator[RunSummary]:
    """Yield the runs in a folder and below, by their paths. Raise `UserError` for damaged files of one."""
    specs = sorted(path for path in store.walk() if path.rpartition("/")[2] == SPEC)
    for path in specs:
        folder = store.child(path.rpartition("/")[0]) if "/" in path else store
        mark, _ = read_mark(folder)
        if mark is not None and mark.kind == KIND:
            with suppress(FileNotFoundError):  # the run has restarted from scratch, or was deleted, in the meantime
                yield summarize(folder)


def summarize(store: Store) -> RunSummary:
    """Return the summary of the run in a folder. Raise `FileNotFoundError` if there is none."""
    spec = read_spec(store)["spec"]
    log = store.read(LOG).decode().splitlines() if store.exists(LOG) else []
    row = _last_row(store)
    starts = [found[1] for line in log if (found := _START.search(line))]
    loss = row.get("loss")
    scores = [score["hit"] for score in read_held_out(store)]
    return RunSummary(
        name=str(spec["name"]),
        state=_state(store, log),
        step=int(row["step"]) + 1 if row else 0,
        steps=int(starts[-1]) if starts else None,
        loss=loss if loss is not None and math.isfinite(loss) else None,
        held_out=scores[-1] if scores else None,
        best_held_out=max(scores, default=None),
        started=log[0].partition("  ")[0] if log else None,
        folder=store.url,
    )


def _state(store: Store, log: list[str]) -> str:
    if store.exists(DONE):
        return "finished"
    if active_holder(store):
        return "running"
    if log and FAILED in log[-1]:
        return "failed"
    return "interrupted" if log else "new"


def _last_row(store: Store) -> dict[str, Any]:
    """Return the newest row of the metrics. Empty if there is none yet."""
    try:
        size = store.size(METRICS)
        start = max(0, size - _LAST_BYTES)
        lines = store.read_range(METRICS, start, size - start).splitlines()
    except FileNotFoundError:
        return {}
    return parse_rows(lines[-1], f"{store.url}/{METRICS}")[0] if lines else {}
