"""Scores of models, each kept in the folder of its run or soup, so that nothing is scored twice in the same way."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict

from jobs.evaluation.specs import EVALUATE, EvaluateSpec
from jobs.runtime.records import as_json
from jobs.spec.job import FileChanges
from jobs.spec.load import Document, check, read_document
from jobs.spec.model import ModelRef
from jobs.training.encoder import backbone_url
from jobs.training.runs import Run
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.storage.store import Store
from pipelines.stored_json import parse_json, stored_file

if TYPE_CHECKING:
    from rzen.evaluation.results import Result

_VERSION = 4
"""What is scored, and how. Since 2, equal queries are one. Since 3, the mixed pool counts, too. Since 4, so do tasks of
any name."""
_UNFINISHED = "scores/unfinished"
"""Folder of a model's vectors while it is scored."""
_NOT_SCIENCE: Any = {
    "suites": True,
    "custom": True,
    "datasets": True,
    "rerank": True,
    "media": True,
    "data": {"trusted"},
}


@dataclass(frozen=True)
class Model:
    """A model, and the folder that its scores are kept in."""

    ref: ModelRef
    store: Store


def model_of(run: Run) -> Model:
    """What a run has made."""
    instructions = run.spec.data.instructions
    if run.spec.model.tune == "lora":
        return Model(ModelRef(base=backbone_url(run), adapter=run.result_url, instructions=instructions), run.store)
    return Model(ModelRef(base=run.result_url, instructions=instructions), run.store)


def evaluation(changes: FileChanges, document: Document, key: str) -> EvaluateSpec:
    """The spec that the entry `key` of `document` names, without models: those are known when they are trained."""
    named = read_document(changes.spec, document.folder_of((key, "spec")))
    ours = {"models": {"run": {"base": "run"}}}
    bare = replace(named, data={name: value for name, value in named.data.items() if name != "models"})
    changed = bare.overlaid(changes.set, document.place_under(key, "set"))
    evaluate = check(changed.overlaid(ours, document.place_under(key)))
    if not isinstance(evaluate, EvaluateSpec):
        problem = f"kind={evaluate.kind!r} does not score"
        raise UserError(document.place((key, "spec")), problem, "use kind: evaluate")
    if evaluate.data is None:
        raise UserError(document.place((key, "spec")), "scores no split", "set data in it")
    return evaluate


@stored_file
class ScoresFile(TypedDict):
    """A file of `scores/`."""

    rows: list[dict[str, Any]]
    by_query: dict[str, list[float]]


_FIX = "delete the file to score again"


class Scorer:
    """One way of scoring on a split: which data, tasks, metrics and precision."""

    def __init__(self, evaluate: EvaluateSpec) -> None:
        assert evaluate.data is not None, "`evaluation` has checked it"
        self._evaluate = evaluate
        self._reader = Reader(evaluate.data)
        spec = EVALUATE.science(evaluate.model_dump(mode="json", exclude=_NOT_SCIENCE))
        self.scoring_config = {"version": _VERSION, "data": self._reader.fingerprint, "spec": spec}
        self._path = (
            f"scores/{hashlib.sha256(json.dumps(self.scoring_config, sort_keys=True).encode()).hexdigest()[:16]}.json"
        )

    def has(self, model: Model) -> bool:
        """Whether the model has been scored in this way."""
        return model.store.exists(self._path)

    def scores(self, models: Mapping[str, Model]) -> dict[str, list[Result]]:
        """The results of each model; those that are not kept yet are made side by side, and kept."""
        from rzen.evaluation.results import Result

        kept = self._kept(models)
        # What was scored under another name bears that of its row.
        return {name: [Result(**{**row, "model": name}) for row in some["rows"]] for name, some in kept.items()}

    def by_query(self, models: Mapping[str, Model]) -> dict[str, dict[str, NDArray[np.float64]]]:
        """Model -> task -> the first metric of each query [Q], in the same order for all models."""
        kept = self._kept(models)
        return {
            name: {task: np.array(values) for task, values in some["by_query"].items()} for name, some in kept.items()
        }

    def _kept(self, models: Mapping[str, Model]) -> dict[str, dict[str, Any]]:
        missing = {name: model.ref for name, model in models.items() if not self.has(model)}
        if missing:
            from jobs.evaluation.evaluate import score

            stores = {name: models[name].store.child(_UNFINISHED) for name in missing}
            evaluate = self._evaluate.model_copy(update={"models": missing})
            for name, scores in score(evaluate, self._reader, stores).items():
                content = {"scoring_config": self.scoring_config, **asdict(scores)}
                models[name].store.write(self._path, as_json(content))
        return {
            name: {**parse_json(model.store.read(self._path), f"{model.store.url}/{self._path}", ScoresFile, _FIX)}
            for name, model in models.items()
        }


def mean_score(rows: Sequence[Result]) -> float:
    """Mean over the tasks; of several metrics of a task the first one counts."""
    first: dict[str, float] = {}
    for row in rows:
        first.setdefault(row.task, row.value)
    return statistics.fmean(first.values())
