"""The evaluation sets that samples must not leak from: held-out splits, public benchmarks, custom datasets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.runtime.progress import say
from pipelines.benchmarks.catalog import check_datasets, open_dataset
from pipelines.benchmarks.custom import read_custom
from pipelines.benchmarks.types import Dataset
from pipelines.config import DataConfig
from pipelines.curate.features import FileInputs, Inputs, shard_inputs
from pipelines.curate.settings import LeakageRule
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.items.types import Item
from pipelines.items.units import windows

HELD_OUT = "held_out"


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """One evaluation set, and all of its inputs that count."""

    name: str
    inputs: list[Inputs]

    @property
    def num_inputs(self) -> int:
        """Return the number of queries and candidates."""
        return sum(map(len, self.inputs))


def find_evaluation_sets(rule: LeakageRule, data: DataConfig) -> list[EvaluationSet]:
    """Return the evaluation sets that the rule names. Raises `UserError` for one that cannot be read.

    Datasets of a suite that are not there are counted and left out. The split that is judged is never one of them.
    """
    found = []
    held_out = data.model_copy(update={"split": HELD_OUT})
    if rule.held_out and data.split != HELD_OUT and Reader(held_out).exists():
        found.append(_split(f"{HELD_OUT} of the data", held_out))
    for root in rule.data:
        found.append(_split(root, held_out.model_copy(update={"root": root})))
    found += [_files(name, dataset, rule) for name, dataset in _suites(rule)]
    found += [_files(name, read_custom(Path(path), name), rule) for name, path in rule.custom.items()]
    return found


def _split(name: str, data: DataConfig) -> EvaluationSet:
    return EvaluationSet(name, [*shard_inputs(data)])


def _suites(rule: LeakageRule) -> Iterator[tuple[str, Dataset]]:
    roots: dict[str, Path] = {suite: Path(root) for suite, root in rule.suites.items()}
    found = check_datasets(roots)
    if unknown := sorted(set(rule.datasets or []) - {one.row.name for one in found}):
        problem = f"{unknown[0]!r} is in none of the suites"
        raise UserError("rules.leakage.datasets", problem, "see `rzen evaluate --list`")
    wanted = [one for one in found if rule.datasets is None or one.row.name in rule.datasets]
    there = [one for one in wanted if not one.missing]
    if wanted and not there:
        raise UserError(
            "rules.leakage.suites", f"no dataset is there; the first lacks: {wanted[0].missing}", "fetch it"
        )
    if len(there) < len(wanted):
        say(f"  {len(wanted) - len(there)} of {len(wanted)} datasets of the suites are missing: not compared", "yellow")
    for one in there:
        yield f"{one.row.suite} {one.row.name}", open_dataset(one.row, roots[one.row.suite])


def _files(name: str, dataset: Dataset, rule: LeakageRule) -> EvaluationSet:
    units = (unit for window in windows(_items(dataset, rule)) for unit in window)
    return EvaluationSet(name, [FileInputs(tuple(unit)) for unit in units])


def _items(dataset: Dataset, rule: LeakageRule) -> Iterator[Item]:
    yield from (query.item for query in dataset.queries)
    relevant = {id for query in dataset.queries for id in query.relevance}
    for item in dataset.candidates:
        if rule.candidates == "all" or item.id in relevant:
            yield item
