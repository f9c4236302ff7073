"""Job of kind `soup`: makes soups of several models and compares their scores. Fine-tunes end with the same."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

from typing_extensions import TypedDict

from jobs.evaluation.scores import Model, Scorer, evaluation, mean_score
from jobs.runtime.cluster import ray_cluster
from jobs.runtime.lease import Lease, hold_output
from jobs.runtime.progress import console, say
from jobs.runtime.records import as_json
from jobs.runtime.revision import revision, versions
from jobs.spec.job import JobConfig
from jobs.spec.load import Document
from jobs.spec.model import ModelRef
from jobs.sweeps.page import ByQuery, sweep_page
from jobs.sweeps.specs import SoupsConfig, SoupSpec
from jobs.training.runs import PAGE, Run
from pipelines.storage.location import open_store, resolve_endpoint
from pipelines.storage.publish import is_published, publish_folder
from pipelines.storage.store import Store, disk_errors
from pipelines.stored_json import parse_json, stored_file
from rzen.config import GreedySoup, MeanSoup, SearchedSoup, SoupConfig
from rzen.model.locate import checkpoint_folder, local_folder

if TYPE_CHECKING:
    from rzen.evaluation.results import Result
    from rzen.soup.select import Selection

SUMMARY = "summary"
CANDIDATES, MODELS = "candidates", "models"
SELECTION_BIAS_NOTE = (
    "These scores also chose the greedy and searched soups, so they are biased upwards. `probe` chooses on other data."
)


def named(spec: SoupsConfig, document: Document) -> list[JobConfig]:
    """Return the specs of the evaluations."""
    entries = {"evaluate": spec.evaluate, "probe": spec.probe}
    return [evaluation(changes, document, key) for key, changes in entries.items() if changes]


def stored_runs(spec: SoupsConfig) -> dict[str, Any]:
    """Return what an earlier summary of the same job says about its runs, if there is one."""
    runs: dict[str, Any] = _stored(open_store(spec.out, spec.endpoint)).get("runs", {})
    return runs


@stored_file
class SummaryFile(TypedDict):
    """`summary.json` of a job that makes soups."""

    key: str
    soups: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]
    runs: NotRequired[dict[str, Any]]


def _stored(out: Store) -> dict[str, Any]:
    path = f"{SUMMARY}.json"
    if not out.exists(path):
        return {}
    return {**parse_json(out.read(path), f"{out.url}/{path}", SummaryFile, "delete the file to make it again")}


def run(spec: SoupSpec, document: Document) -> dict[str, Any]:
    """Make the soups of the models that the spec names."""
    with hold_soups(spec) as lease:
        scored = open_store(spec.out, spec.endpoint).child(MODELS)
        is_scored = spec.evaluate or spec.probe  # otherwise the base may be anywhere
        folders = {name: _identity(ref, spec.endpoint) if is_scored else name for name, ref in spec.models.items()}
        models = {name: Model(ref, scored.child(folders[name])) for name, ref in spec.models.items()}
        builder = SoupBuilder(spec, document, models, lease)
        builder.report(builder.summary({}))
    return {"outputs": builder.outputs()}


def hold_soups(spec: SoupsConfig) -> AbstractContextManager[Lease]:
    """Hold the folder of the soups while a block runs. Raise `UserError` if it is that of others."""
    return hold_output(open_store(spec.out, spec.endpoint), "soups", "makes soups")


def _identity(ref: ModelRef, endpoint: str | None) -> str:
    from rzen.model.checkpoints import checkpoint_sha256

    folders = [checkpoint_folder(ref.base, endpoint), *([local_folder(ref.adapter, endpoint)] if ref.adapter else [])]
    content = [checkpoint_sha256(Path(folder)) for folder in folders]
    return hashlib.sha256(json.dumps([content, ref.instructions]).encode()).hexdigest()[:16]


class SoupBuilder:
    """Makes the soups of a spec out of `models`, which are adapters of one base or full models.

    It writes these files:

        {out}/{soup}/adapter/ or model/   the soup, with its lineage in soup.json
                     scores/              scores of the soup, one file for each scoring configuration
              models/{hash}/scores/       scores of the models of a job of kind `soup`
              candidates/{hash}/scores/   scores of the candidates of greedy and searched soups
              summary.json, .md, .svg     all scores and weights
              index.html                  the same for people, with the runs that made the models
    """

    def __init__(
        self,
        spec: SoupsConfig,
        document: Document,
        models: Mapping[str, Model],
        lease: Lease,
        runs: Mapping[str, Run] | None = None,
    ) -> None:
        self._spec = spec
        self._models = models
        self._lease = lease
        self._runs = runs or {}
        self._endpoint = resolve_endpoint(spec.endpoint)
        self._out = open_store(spec.out, spec.endpoint)
        first = next(iter(models.values())).ref
        self._base, self._instructions = first.base, first.instructions
        self._folder = "adapter" if first.adapter else "model"
        self._scorer = Scorer(evaluation(spec.evaluate, document, "evaluate")) if spec.evaluate else None
        self._probe = Scorer(evaluation(spec.probe, document, "probe")) if spec.probe else self._scorer

    def outputs(self) -> list[str]:
        """Return the places of the soups, in the order of the spec."""
        return [self._out.child(name).child(self._folder).url for name in self._spec.soups]

    def summary(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Make and score what is not there yet. Return the summary as JSON. `facts` are further entries of it."""
        key = self._key(facts)
        before = _stored(self._out)
        if before.get("key") == key and all(is_published(open_store(url, self._endpoint)) for url in self.outputs()):
            return before
        with ray_cluster() if self._probe else nullcontext():
            soups = {name: self._make(name, soup) for name, soup in self._spec.soups.items()}
            scored = {**self._models} | {name: self._model(self._out.child(name)) for name in soups}
            rows = self._scores(scored)
        found = {
            "key": key,
            **facts,
            "soups": soups,
            "rows": [asdict(row) for row in rows],
            "versions": versions(),
            "revision": revision(),
        }
        self._lease.check()
        self._out.write(f"{SUMMARY}.json", as_json(found))
        self._write_report(found, rows)
        self._write_page(found, rows, self._scorer.by_query(scored) if self._scorer else {})
        self._out.delete_tree(CANDIDATES)
        return found

    def report(self, summary: Mapping[str, Any]) -> None:
        """Print the scores and the places of the results."""
        from rzen.evaluation.results import Result, terminal_table

        for name in self._spec.soups:
            lineage = summary["soups"][name]
            say(f"  {self._out.child(name).child(self._folder).url}: {_line(lineage)}")
        if rows := [Result(**row) for row in summary["rows"]]:
            console.print(terminal_table(rows))
        say(f"  {self._out.url}: {SUMMARY}.json, {SUMMARY}.md, {PAGE}{f', {SUMMARY}.svg' if rows else ''}")

    def _key(self, facts: Mapping[str, Any]) -> str:
        content = {
            "facts": facts,
            "models": self._sha256,
            "soups": {name: soup.model_dump(mode="json") for name, soup in self._spec.soups.items()},
            "scores": [scorer and scorer.scoring_config for scorer in (self._scorer, self._probe)],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _folders(self) -> dict[str, Path]:
        """Local copies of the models."""
        return {name: Path(local_folder(url, self._endpoint)) for name, url in self._places.items()}

    @property
    def _places(self) -> dict[str, str]:
        return {name: model.ref.adapter or model.ref.base for name, model in self._models.items()}

    @cached_property
    def _sha256(self) -> dict[str, str]:
        from rzen.model.checkpoints import checkpoint_sha256

        return {name: checkpoint_sha256(folder) for name, folder in self._folders.items()}

    def _make(self, name: str, soup: SoupConfig) -> dict[str, Any]:
        """Publish one soup. Return its lineage."""
        say(f"  soup {name}: {soup.method} of {', '.join(self._models)}", "dim")
        chosen = self._choose(soup) if isinstance(soup, GreedySoup | SearchedSoup) else None
        place = self._out.child(name)
        place.delete_tree("scores")  # of an earlier soup of this name
        lineage = self._merge_and_publish(soup, place, chosen)
        place.delete_tree("model" if self._folder == "adapter" else "adapter")  # of an earlier soup, too
        return lineage

    def _choose(self, soup: GreedySoup | SearchedSoup) -> Selection:
        """Choose weights by scores."""
        from rzen.soup.select import greedy_weights, searched_weights

        scores = dict(zip(self._models, self._score_candidates([{name: 1.0} for name in self._models]), strict=True))
        if soup.method == "greedy":
            return greedy_weights(scores, lambda weights: self._score_candidates([weights])[0])
        how = {"evaluations": soup.evaluations, "at_once": soup.at_once, "seed": soup.seed}
        return searched_weights(list(self._models), self._score_candidates, scores=scores, **how)

    def _score_candidates(self, mixes: Sequence[Mapping[str, float]]) -> list[float]:
        """Return the mean probe score of each weighted mean of the models."""
        assert self._probe is not None  # the spec is checked for it
        candidates: dict[str, Model] = {}
        for weights in mixes:
            if len(weights) == 1:
                (name,) = weights
                candidates[name] = self._models[name]
                continue
            content = json.dumps([[self._sha256[name], weight] for name, weight in sorted(weights.items())])
            candidate = self._model(
                self._out.child(CANDIDATES).child(hashlib.sha256(content.encode()).hexdigest()[:16])
            )
            candidates[", ".join(f"{weight:.3g} {name}" for name, weight in weights.items())] = candidate
            if not self._probe.has(candidate):
                self._merge_and_publish(MeanSoup(weights=dict(weights)), candidate.store)
        scores = [mean_score(rows) for rows in self._probe.scores(candidates).values()]
        for candidate in candidates.values():
            if candidate not in self._models.values():
                candidate.store.delete_tree(self._folder)  # only its scores are needed
        return scores

    def _merge_and_publish(self, soup: SoupConfig, store: Store, chosen: Selection | None = None) -> dict[str, Any]:
        from rzen.soup.make import make_soup

        if soup.method == "mean" and soup.weights is None:
            soup = soup.model_copy(update={"weights": self._equal_weights})
        base = Path(checkpoint_folder(self._spec.base, self._endpoint)) if self._spec.base else None
        with disk_errors(tempfile.gettempdir()), tempfile.TemporaryDirectory(prefix="rzen-soup-") as scratch:
            made = Path(scratch, "soup")
            lineage = make_soup(self._folders, made, soup, base=base, selection=chosen, places=self._places)
            self._lease.check()
            publish_folder(made, store.child(self._folder))
        return lineage

    @cached_property
    def _equal_weights(self) -> dict[str, float]:
        """Weight 1 for each model. A soup counts with the number of models that it was made of."""
        from rzen.soup.make import total_weight
        from rzen.soup.parents import LINEAGE

        folders = self._folders.items()
        return {name: total_weight(folder) if (folder / LINEAGE).is_file() else 1.0 for name, folder in folders}

    def _model(self, store: Store) -> Model:
        url = store.child(self._folder).url
        if self._folder == "adapter":
            return Model(ModelRef(base=self._base, adapter=url, instructions=self._instructions), store)
        return Model(ModelRef(base=url, instructions=self._instructions), store)

    def _scores(self, models: Mapping[str, Model]) -> list[Result]:
        if self._scorer is None:
            return []
        return [row for rows in self._scorer.scores(models).values() for row in rows]

    def _write_report(self, found: Mapping[str, Any], rows: Sequence[Result]) -> None:
        from rzen.evaluation.results import markdown_table, plot_scores

        lines = ["# Soups", "", f"Revision {found['revision']}.", ""]
        if states := found.get("runs"):
            lines += ["| run | state | |", "| --- | --- | --- |"]
            lines += [f"| {name} | {some['state']} | {some.get('reason', '')} |" for name, some in states.items()]
            lines.append("")
        lines += [f"* {name}: {_line(lineage)}" for name, lineage in found["soups"].items()]
        if rows:
            lines += ["", markdown_table(rows)]
            if self._chose_by_these_scores:
                lines += [SELECTION_BIAS_NOTE, ""]
            lines.append(f"![scores]({SUMMARY}.svg)")
            self._out.write(f"{SUMMARY}.svg", plot_scores(rows).encode())
        self._out.write(f"{SUMMARY}.md", ("\n".join(lines) + "\n").encode())

    @property
    def _chose_by_these_scores(self) -> bool:
        chosen = any(isinstance(some, GreedySoup | SearchedSoup) for some in self._spec.soups.values())
        return chosen and self._scorer is not None and self._probe is self._scorer

    def _write_page(self, found: Mapping[str, Any], rows: Sequence[Result], by_query: Mapping[str, ByQuery]) -> None:
        lines = {name: _line(lineage) for name, lineage in found["soups"].items()}
        others = {name: "" for name in self._models if name not in self._runs}
        parents = {name: [parent["name"] for parent in lineage["parents"]] for name, lineage in found["soups"].items()}
        page = sweep_page(
            title=f"Soups of {len(self._models)} models",
            runs=self._runs,
            others=others | lines,
            parents=parents,
            rows=rows,
            by_query=by_query,
            notes=[SELECTION_BIAS_NOTE.replace("`", "")] if self._chose_by_these_scores else [],
            facts={"code": found["revision"], **found["versions"]},
        )
        self._out.write(PAGE, page)


def _line(lineage: Mapping[str, Any]) -> str:
    shares = ", ".join(f"{parent['coefficient']:.3f} {parent['name']}" for parent in lineage["parents"])
    rank = f", rank {lineage['rank']}" if "rank" in lineage else ""
    residual = f", residual {lineage['residual']:.3g}" if lineage.get("residual") else ""
    return f"{lineage['settings']['method']} of {shares}{rank}{residual}"
