"""Job of kind `finetunes`: trains fine-tunes in parallel, then makes their soups."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from jobs.evaluation.scores import model_of
from jobs.runtime.lease import Lease
from jobs.runtime.progress import say
from jobs.runtime.records import differences
from jobs.spec.job import JobConfig
from jobs.spec.load import Document, check, nested, read_document
from jobs.spec.yaml_text import Key
from jobs.sweeps import soup
from jobs.sweeps.page import write_progress
from jobs.sweeps.specs import FinetunesSpec
from jobs.training.runs import DONE, Run
from jobs.training.specs import TrainSpec
from pipelines.errors import UserError
from pipelines.storage.location import open_store
from rzen.config import ObjectiveConfig


def resolve(spec: FinetunesSpec, document: Document) -> dict[str, TrainSpec]:
    """Return the spec of each fine-tune. `document` is that of `spec`."""
    stage = stage_document(spec.stage, spec.set, document)
    specs: dict[str, TrainSpec] = {}
    for name, (run, values) in spec.changes().items():
        of_run = document.place_under("runs", run) if run else document.place
        train = stage.overlaid({"name": name}, of_run).overlaid(spec.runs[run] if run else {}, of_run)
        for setting, value in values.items():
            train = train.overlaid(nested(setting, value), partial(_place, document.place(("grid", setting))))
        specs[name] = check_train(train)
    if len(kinds := {train.model.tune for train in specs.values()}) > 1:
        raise UserError(document.place(("runs",)), f"train {' and '.join(sorted(kinds))}", "give all one model.tune")
    for name, config in spec.soups.items():
        parents = [specs[some] for some in getattr(config, "weights", None) or specs]
        for parent in parents[1:]:
            before, after = (_read_as(some) for some in (parents[0], parent))
            if changes := differences(before, after):
                problem = f"{parents[0].name} and {parent.name} cannot be one model: {'; '.join(changes)}"
                raise UserError(document.place(("soups", name)), problem, "give all parents of a soup one setting")
    if found := spec.impossible(adapters=kinds == {"lora"}):  # otherwise that comes out when all have been trained
        raise UserError(document.place(found[0]), found[1], "change the soups, or model.tune")
    return specs


def _read_as(train: TrainSpec) -> dict[str, Any]:
    """Return what the parents of a soup must have in common, as the settings of the run."""
    identity = train.model.identity.model_dump(mode="json")
    return {"model": {"backbone": train.model.model_dump(mode="json")["backbone"], **identity}}


def _place(where: str, key: Key) -> str:
    return where


def stage_document(stage: str, changes: Mapping[str, Any], document: Document) -> Document:
    """Return what all runs start from: the stage with the changes that all of them share."""
    return read_document(stage, document.folder_of(("stage",))).overlaid(changes, document.place_under("set"))


def check_train(document: Document) -> TrainSpec:
    """Return the spec of one run. Raise `UserError` if it is of another kind, or if it trains a re-ranker."""
    train = check(document)
    if not isinstance(train, TrainSpec):
        raise UserError(document.place(("kind",)), f"kind={train.kind!r} does not train", "use kind: train")
    if not isinstance(train.objective, ObjectiveConfig):
        problem = f"objective.kind={train.objective.kind} trains no embedder, and this job compares embedders"
        raise UserError(document.place(("objective",)), problem, "run the spec itself, with kind: train")
    return train


def named(spec: FinetunesSpec, document: Document) -> list[JobConfig]:
    """Return the specs of the runs and evaluations."""
    return [*resolve(spec, document).values(), *soup.named(spec, document)]


def run(spec: FinetunesSpec, document: Document) -> dict[str, Any]:
    """Train all, then make the soups of those that succeeded. A finished job only reports."""
    with soup.hold_soups(spec) as lease:
        return _run(spec, document, lease)


def _run(spec: FinetunesSpec, document: Document, lease: Lease) -> dict[str, Any]:
    from jobs.training.launch import launch

    specs = resolve(spec, document)
    runs = {name: Run(train) for name, train in specs.items()}
    before = soup.stored_runs(spec)
    failed_before = {name: some["id"] for name, some in before.items() if some["state"] == "failed"}
    retried = {} if spec.retry_failed else failed_before
    out = open_store(spec.out, spec.endpoint)
    failures = launch(
        [*specs.values()],
        spec.max_parallel,
        spec.min_survivors,
        retried,
        write_overview=partial(write_progress, out, f"{len(runs)} fine-tunes", runs),
    )
    states = {name: _state(some, failures.get(name), before.get(name, {})) for name, some in runs.items()}
    survivors = {name: model_of(some) for name, some in runs.items() if states[name]["state"] == "finished"}
    builder = soup.SoupBuilder(spec, document, survivors, lease, runs)
    builder.report(builder.summary({"runs": states}))
    for name in states.keys() - survivors.keys():
        say(f"  {name} failed permanently and is not in the soups: {states[name]['reason']}", "red")
    return {"outputs": [*builder.outputs(), *(runs[name].result_url for name in survivors)]}


def _state(some: Run, failure: UserError | None, before: Mapping[str, Any]) -> dict[str, Any]:
    if some.store.exists(DONE):
        return {"id": some.id, "state": "finished"}
    return {"id": some.id, "state": "failed", "reason": str(failure) if failure else before["reason"]}
