"""A small dataset with a candidate table, and what jobs of kind `judge` make of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from jobs.judging import judge as judge_job
from jobs.judging import local
from jobs.judging.specs import JudgeSpec
from pipelines.candidates.table import open_table
from pipelines.candidates.types import MANIFEST
from pipelines.storage.location import open_store
from tests.candidate_tables import publish_candidates
from tests.data import publish

SIZES = {"red": ("text_image", 20), "blue": ("text_image", 10)}
# Red has the numbers 0 to 19, blue 20 to 29. Red 3 shows what red 0 shows, red 4 asks what red 1 asks.
CANDIDATES = {
    **{("red", i): [(i + 1) % 20, 20 + i % 10, (i + 7) % 20] for i in range(20)},
    ("blue", 2): [0, 3, 7],
    ("blue", 9): [],
}
BAD, DROPPED = 7, ("red", 12)
PROMPT = {"max_visual_tokens": 4}


def make_table(folder: Path, equal_queries: Sequence[int] = (4,)) -> None:
    """Write a dataset and a table of its candidates. These samples of red ask what red 1 asks."""
    store = open_store(str(folder / "data"))
    manifest = publish(store, SIZES, bad={"red": [BAD]}, duplicates={"red": [3]}, equal_queries={"red": equal_queries})
    publish_candidates(open_store(str(folder / "table")), str(folder / "data"), manifest, CANDIDATES, [DROPPED])


def spec_of(folder: Path, out: Path, judge: dict[str, Any], **changes: Any) -> JudgeSpec:
    """`judge` is `{"model": ...}` or `{"api": ...}`."""
    fields: dict[str, Any] = {
        "kind": "judge",
        "table": str(folder / "table"),
        "data": {"root": str(folder / "data")},
        "out": str(out),
        "cpus_per_actor": 0.5,
        "cpus_per_task": 0.5,
    }
    return JudgeSpec.model_validate(fields | judge | changes)


def distinct_pairs(equal_queries: Sequence[int] = (4,)) -> set[tuple[str, int]]:
    """Query and color of each pair that can be judged. Red 3 shows what red 0 shows."""
    colors = [0 if number == 3 else number for number in range(20)] + list(range(10))
    found = set()
    for source, count in (("red", 20), ("blue", 10)):
        for index in range(count):
            if (source, index) != DROPPED:
                query = f"{source} {1 if source == 'red' and index in equal_queries else index}"
                own = index if source == "red" else 20 + index
                numbers = [own, *CANDIDATES.get((source, index), [])]
                found |= {(query, colors[number]) for number in numbers if number != BAD}
    return found


def table_files(out: Path) -> dict[str, bytes]:
    """The files of a table by name, without kept scores and listings."""
    names = [MANIFEST, *open_store(str(out)).list("parts"), *open_store(str(out)).list("plan")]
    return {name: (out / name).read_bytes() for name in names}


def scores_of(out: Path) -> dict[tuple[str, int], tuple[float, list[float]]]:
    """(source, index) -> score of the positive, scores of the candidates."""
    table = open_table(str(out))
    found = {}
    for source, parts in table.manifest.parts.items():
        start = 0
        for ordinal in range(len(parts)):
            rows = table.rows(source, ordinal)
            for i in range(len(rows)):
                found[source, start + i] = float(rows.positive_teacher[i]), rows.teacher[rows.span(i)].tolist()
            start += len(rows)
    return found


def by_model(model: str) -> dict[str, Any]:
    return {"model": {"base": model, "prompt": PROMPT}}


def through_actors_here(actors: int = 1, backwards: bool = False, stop_after: int | None = None) -> Any:
    """Return what stands for `through_actors`: tasks and actors in this process. The actors take turns."""

    def through(
        rows: Sequence[dict[str, Any]], prepare: Any, prepare_args: Any, actor: Any, actor_args: Any, workers: Any
    ) -> Iterator[dict[str, Any]]:
        made = [actor(*actor_args) for _ in range(actors)]
        for number, row in enumerate(rows[::-1] if backwards else rows):
            if number == stop_after:
                raise KeyboardInterrupt
            yield made[number % actors](prepare(row, *prepare_args))

    return through


def run_judges_here(
    patch: pytest.MonkeyPatch, actors: int = 1, backwards: bool = False, stop_after: int | None = None
) -> None:
    """Let jobs run tasks and actors in this process, without Ray."""
    patch.setattr(local, "through_actors", through_actors_here(actors, backwards, stop_after))
    patch.setattr(judge_job, "ray_cluster", nullcontext)
    patch.setattr(judge_job, "check_workers", lambda workers: None)
