"""Job of kind `retrain`: one run of scheduled retraining. The same command resumes it, or does nothing.

lease -> new data? -> train from the champion -> soup with it -> score both -> publish -> gate -> refuse, or
export -> embed the corpus -> promote the two as a pair
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jobs.embedding.specs import EmbedSpec
from jobs.evaluation.scores import Model, Scorer, evaluation
from jobs.runtime.lease import Lease
from jobs.runtime.progress import say
from jobs.runtime.records import differences
from jobs.runtime.revision import revision, versions
from jobs.serving.pairs import PairFile
from jobs.serving.specs import ExportSpec
from jobs.spec.job import FileChanges, JobConfig
from jobs.spec.load import Document, check, read_document
from jobs.spec.model import ModelRef
from jobs.sweeps.finetunes import check_train, stage_document
from jobs.training.encoder import backbone_url
from jobs.training.runs import Run, read_spec
from jobs.training.specs import TrainSpec
from jobs.workflows.registry import Champion, Registry
from jobs.workflows.specs import RetrainSpec
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.storage.location import open_store, resolve_endpoint
from pipelines.storage.publish import is_published, publish_folder
from rzen.config import ObjectiveConfig
from rzen.model.locate import local_folder

WORK, SCORES = "work", "scores"


def named(spec: RetrainSpec, document: Document) -> list[JobConfig]:
    """Return the specs of the first training, of the evaluation and of the corpus."""
    embed = [] if spec.corpus is None else [_embed_spec(spec.corpus, document, {"model": "model", "out": "vectors"})]
    return [_train_spec(spec, document, "first", None), evaluation(spec.evaluate, document, "evaluate"), *embed]


def run(spec: RetrainSpec, document: Document) -> dict[str, Any]:
    """Do what is due, and record it. Raise `UserError` while another process retrains."""
    registry = Registry(open_store(spec.registry, spec.endpoint))
    with registry.lease(spec.lease_s) as lease:
        retraining = _RetrainRun(spec, document, registry, registry.champion())
        outcome = retraining.nothing_to_do()
        if outcome is None:
            retraining.check_queries()
            retraining.check_soup()
            outcome = retraining.work(lease)
        say(f"  {outcome}")
    champion = registry.champion()
    say(f"  champion: {champion.model if champion else 'none'}")
    return {"outputs": [registry.url(champion.model)] if champion else []}


class _RetrainRun:
    """One candidate against one champion.

    The names of its run and model follow from the champion, the data and the settings. The next run therefore finds an
    interrupted one.
    """

    def __init__(self, spec: RetrainSpec, document: Document, registry: Registry, champion: Champion | None) -> None:
        self._spec, self._document, self._registry, self._champion = spec, document, registry, champion
        self._endpoint = resolve_endpoint(spec.endpoint)
        before = registry.lineage(champion.model) if champion else {}
        self._data_before: dict[str, Any] = before.get("data", {})
        self._parent = _ref(before, registry.url(champion.model)) if champion else None
        self._evaluate = evaluation(spec.evaluate, document, "evaluate")
        train = _train_spec(spec, document, "first", None)
        reader = Reader(train.data)
        self._data: dict[str, Any] = {"fingerprint": reader.fingerprint, "samples": reader.sizes()}
        number = champion.generation if champion else 0
        model = champion.model if champion else None
        trained = [train.model_dump(mode="json"), spec.start, self._data, model]
        self._run_name = f"retrain-{number}-{_hash(trained)}"  # another gate or soup does not train again
        decided = [spec.model_dump(mode="json", include={"soup", "gate"}), self._evaluate.model_dump(mode="json")]
        self.id = f"after-{number}-{_hash([trained, decided])}"

    def nothing_to_do(self) -> str | None:
        """Return why there is nothing to do. None if there is."""
        before: Mapping[str, int] = self._data_before.get("samples", {})
        new = sum(max(0, size - before.get(source, 0)) for source, size in self._data["samples"].items())
        if self._champion and self._data_before.get("fingerprint") == self._data["fingerprint"]:
            return f"nothing new: the data are those of the champion, {self._champion.model}"
        if self._champion and new < self._spec.min_new_samples:
            return f"nothing to do yet: {new:,} new samples, fewer than {self._spec.min_new_samples:,}"
        if any(promotion["model"] == self.id for promotion in self._registry.promotions()):
            return f"nothing new: {self.id} was made of these data, promoted, and replaced since"
        if self._registry.has(self.id) and not self._registry.lineage(self.id)["verdict"]["promote"]:
            return f"nothing new: {self.id} was made of these data and refused"
        say(f"  {self.id}: {new:,} new samples, champion {self._champion.model if self._champion else 'none'}")
        return None

    def check_queries(self) -> None:
        """Raise `UserError` if the frozen set is too small to decide anything, before a model is trained for it."""
        from rzen.evaluation.gate import too_few_queries

        assert self._evaluate.data is not None, "`evaluation` has checked it"
        reader = Reader(self._evaluate.data)
        counts: Counter[str] = Counter()
        for source, size in reader.sizes().items():
            counts[reader.task_of(source)] += size
        asked = self._evaluate.tasks or list(counts)
        if few := too_few_queries({task: counts[task] for task in asked if counts[task]}, self._spec.gate.min_queries):
            place = f"{self._evaluate.data.root}/{self._evaluate.data.split}"
            raise UserError(place, "; ".join(few), "add samples to the frozen set, or lower gate.min_queries")

    def check_soup(self) -> None:
        """Raise `UserError` if candidate and champion could not become one model, before the candidate is trained."""
        if self._parent is None or self._spec.soup is None:
            return
        from rzen.model.checkpoints import check_base, read_identity

        train = _train_spec(self._spec, self._document, self._run_name, self._parent)
        fix = "restore it, set soup: null, or begin a new registry"
        champion = Path(local_folder(self._parent.adapter or self._parent.base, self._endpoint))
        if (train.model.tune == "lora") != (self._parent.adapter is not None):
            raise UserError(f"model.tune={train.model.tune}", "the champion was trained with the other one", fix)
        ours = train.model.identity.model_dump(mode="json")
        if changes := differences(read_identity(champion, train.model.identity).model_dump(mode="json"), ours):
            problem = f"the champion has another setting, and no soup with it: {'; '.join(changes)}"
            raise UserError("model", problem, fix)
        backbone = train.model.backbone
        if self._parent.adapter and isinstance(backbone, str) and Path(backbone).is_dir():
            check_base(champion, Path(backbone))

    def work(self, lease: Lease) -> str:
        """Train, publish and decide. Return the outcome.

        Raise `UserError` as soon as the lease was lost: nothing is written from then on.
        """
        lease.check()
        self._registry.record(self.id, {"outcome": "training", "data": self._data})
        if not self._registry.has(self.id):
            self._publish(lease)
        verdict = self._registry.lineage(self.id)["verdict"]
        lease.check()
        reason = "; ".join(verdict["reasons"])
        if verdict["promote"]:
            pair = self._make_pair(lease)
            self._registry.promote(self.id, reason=reason, instead_of=self._champion, report=verdict, pair=pair)
        lease.check()
        outcome = f"{'promoted' if verdict['promote'] else 'refused'} {self.id}: {reason}"
        self._registry.record(self.id, {"outcome": outcome, "data": self._data})
        return outcome

    def _publish(self, lease: Lease) -> None:
        from jobs.training.launch import launch

        train = _train_spec(self._spec, self._document, self._run_name, self._parent)
        launch([train], max_parallel=1)
        run = Run(train)
        trained = Path(local_folder(run.result_url, self._endpoint))
        base = self._base(run)
        with tempfile.TemporaryDirectory(prefix="rzen-retrain-") as scratch:
            folder, soup = trained, None
            if self._parent and self._spec.soup:
                folder, soup = self._soup_with_champion(trained, run.result_url, Path(scratch, "soup"))
            lease.check()
            work = self._registry.store.child(WORK).child(self.id)
            publish_folder(folder, work)
            scores = self._scores(_ref({"base": base, "tune": train.model.tune} | _facts(train), work.url))
            lease.check()
            self._registry.publish(self.id, folder, self._lineage(run, base, soup) | scores)
            work.delete_tree("")

    def _make_pair(self, lease: Lease) -> PairFile | None:
        """Export the model and embed the corpus with it, or what is missing of both. Return what servers load."""
        from jobs.embedding.embed import run as embed
        from jobs.serving.export import run as export

        if self._spec.corpus is None:
            return None
        model, corpus = self._registry.exports(self.id), self._registry.corpora(self.id)
        if not is_published(model):
            lineage = self._registry.lineage(self.id)
            trained = lineage["spec"]
            spec = {
                "kind": "export",
                "model": _ref(lineage, self._registry.url(self.id)).model_dump(),
                "dimensions": trained["objective"]["matryoshka"],
                "frames": (trained["data"]["media"]["frames"] + 1) // 2 * 2,
                "out": model.url,
                "endpoint": self._endpoint,
            }
            export(ExportSpec.model_validate(spec))
        places = {"model": model.url, "out": corpus.url, "endpoint": self._endpoint}
        embed(_embed_spec(self._spec.corpus, self._document, places))
        lease.check()
        return self._registry.pair(self.id)

    def _soup_with_champion(self, trained: Path, place: str, out: Path) -> tuple[Path, dict[str, Any]]:
        from rzen.soup.make import make_soup

        assert self._parent is not None
        assert self._spec.soup is not None
        url = self._parent.adapter or self._parent.base
        parents = {"champion": Path(local_folder(url, self._endpoint)), "candidate": trained}
        return out, make_soup(parents, out, self._spec.soup, places={"champion": url, "candidate": place})

    def _scores(self, candidate: ModelRef) -> dict[str, Any]:
        """Return verdict and scores for the lineage."""
        from rzen.evaluation.gate import judge

        kept = self._registry.store.child(SCORES)
        models = {self.id: Model(candidate, kept.child(self.id))}
        if self._champion and self._parent:
            models[self._champion.model] = Model(self._parent, kept.child(self._champion.model))
        scorer = Scorer(self._evaluate)
        by_query = scorer.by_query(models)
        champion = by_query[self._champion.model] if self._champion else None
        gate = self._spec.gate.model_dump()
        return {
            "verdict": asdict(judge(champion, by_query[self.id], **gate)),
            "frozen_set": scorer.scoring_config["data"],
        }

    def _base(self, run: Run) -> str | None:
        """Return the base of an adapter. It must outlive the folder of the run, which may be deleted."""
        if run.spec.model.tune == "full":
            return None
        if self._parent:
            return self._parent.base
        url = backbone_url(run)
        if url == run.spec.model.backbone:
            return url
        base = self._registry.store.child("bases").child(self.id)
        if not is_published(base):
            publish_folder(Path(local_folder(url, self._endpoint)), base)
        return base.url

    def _lineage(self, run: Run, base: str | None, soup: Mapping[str, Any] | None) -> dict[str, Any]:
        spec = read_spec(run.store)
        return {
            "base": base,
            "tune": run.spec.model.tune,
            "data": self._data,
            "parent": self._champion.model if self._champion else None,
            "run": run.store.url,
            "spec": spec["spec"],
            "soup": soup,
            "versions": versions(),
            "revision": revision(),
        } | _facts(run.spec)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def _facts(train: TrainSpec) -> dict[str, Any]:
    return {"instructions": train.data.instructions}


def _ref(lineage: Mapping[str, Any], url: str) -> ModelRef:
    """Return how to load a model of the registry."""
    if lineage["tune"] == "lora":
        return ModelRef(base=lineage["base"], adapter=url, instructions=lineage["instructions"])
    return ModelRef(base=url, instructions=lineage["instructions"])


def _embed_spec(changes: FileChanges, document: Document, places: Mapping[str, str | None]) -> EmbedSpec:
    """Return the checked spec of the corpus, with model and output of the job."""
    named = read_document(changes.spec, document.folder_of(("corpus", "spec")))
    changed = named.overlaid(changes.set, document.place_under("corpus", "set"))
    embed = check(changed.overlaid(dict(places), document.place_under("corpus")))
    if not isinstance(embed, EmbedSpec):
        problem = f"kind={embed.kind!r} embeds no corpus"
        raise UserError(document.place(("corpus", "spec")), problem, "use kind: embed")
    return embed


def _train_spec(spec: RetrainSpec, document: Document, name: str, parent: ModelRef | None) -> TrainSpec:
    place = document.place_under("set")
    stage = stage_document(spec.stage, spec.set, document).overlaid({"name": name}, place)
    if parent and spec.start == "champion":
        # The champion's adapter decides its rank. A soup may have given it another than the stage gives a new one.
        model = {key: value for key, value in stage.data.get("model", {}).items() if key != "lora"}
        stage = replace(stage, data=stage.data | {"model": model})
        stage = stage.overlaid({"model": {"backbone": parent.base}, "init_adapter": parent.adapter}, place)
    train = check_train(stage)
    is_first = spec.start == "champion" and parent is None
    if is_first and isinstance(train.objective, ObjectiveConfig) and train.objective.temperature.carried:
        # The first model has no champion to take temperatures from.
        first = stage.overlaid({"objective": {"temperature": {"carried": False}}}, place)
        train = check_train(first)
    return train
