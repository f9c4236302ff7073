"""Job of kind `curate`: applies rules to a split, and writes which samples training leaves out.

* `{out}/candidates.json`, `{out}/plan/`: the table of drops, which training reads.
* `{out}/drops/{source}-{digest}.parquet`: sample, key, reason, what it resembles, and how much.
* `{out}/report.json`, `{out}/report.html`: counts by reason and source, settings, examples with pictures.
* `{cache}/`: what was computed of each shard, kept by its content.

Nothing is done if the output is there, of the same samples, rules, evaluation sets and model.
Tasks of Ray compute the features of shards, each once. The rules run in the job's own process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jobs.curation.evaluation_sets import EvaluationSet, find_evaluation_sets
from jobs.curation.output import finished_report, publish_drops, result_of
from jobs.curation.specs import CurateSpec
from jobs.curation.vectors import SampleVectors, model_settings
from jobs.embedding.engine import check_workers
from jobs.embedding.settings import EmbedderSettings
from jobs.embedding.vectors import config_digest
from jobs.runtime.cluster import ray_cluster
from jobs.runtime.lease import Lease, hold_output
from jobs.runtime.progress import Bars, say
from pipelines.candidates.types import KIND
from pipelines.config import DataConfig
from pipelines.curate.exact import find_exact
from pipelines.curate.features import (
    FAMILIES,
    Family,
    FeatureSettings,
    Inputs,
    ShardInputs,
    missing_features,
    shard_inputs,
    write_features,
)
from pipelines.curate.filters import find_filtered
from pipelines.curate.leakage import find_leaks
from pipelines.curate.load import load_evaluation, load_samples
from pipelines.curate.near import find_near
from pipelines.curate.samples import Samples, Verdicts
from pipelines.curate.semantic import find_misaligned, find_semantic
from pipelines.curate.settings import CurationRules, LeakageRule
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.ingest.tasks import run_tasks
from pipelines.items.types import content_id
from pipelines.storage.location import open_store, resolve_endpoint
from pipelines.storage.store import Store

_VERSION = 1  # of what a job writes for equal samples, rules and evaluation sets


def run(spec: CurateSpec) -> dict[str, Any]:
    """Apply the rules, publish the table of drops, and report what they left out."""
    store = open_store(spec.out, spec.endpoint)
    with hold_output(store, KIND, "curates") as lease:
        return _run(spec, store, lease)


def _run(spec: CurateSpec, store: Store, lease: Lease) -> dict[str, Any]:
    # Tasks may lack the variable of the endpoint.
    data = spec.data.model_copy(update={"endpoint": resolve_endpoint(spec.data.endpoint)})
    cache = open_store(spec.cache, resolve_endpoint(spec.endpoint))
    cache.ensure_bucket()
    inputs = shard_inputs(data)
    if not inputs:
        raise UserError(f"{data.root} {data.split}", "has no sample", "ingest or index pairs")
    rules = spec.rules
    sets = find_evaluation_sets(rules.leakage, data) if rules.leakage else []
    settings = _feature_settings(rules, data)
    embedder = model_settings(spec) if rules.needs_model else None
    job = _job_id(spec, inputs, sets, settings, embedder)
    if (report := finished_report(store, job)) is not None:
        say(f"  {store.url} is up to date: nothing to curate")
        return result_of(spec, report, store)
    say(f"  {sum(map(len, inputs)) // 2:,} samples of {data.root} {data.split} -> {store.url}")
    for some in sets:
        say(f"  compared with {some.name}: {some.num_inputs:,} inputs")
    with ray_cluster(), Bars() as bars, tempfile.TemporaryDirectory(prefix="rzen-curate-") as scratch:
        families: tuple[Family, ...] = FAMILIES if rules.needs_media else ("texts",)
        compute = partial(_compute, settings=settings, cache=cache, cpus_per_task=spec.cpus_per_task, bars=bars)
        compute("features", inputs, families)
        compute("evaluation sets", [some for one in sets for some in one.inputs], FAMILIES)
        samples = load_samples(inputs, families, settings, cache)
        verdicts = _Judge(spec, samples, settings, embedder, cache, Path(scratch), bars).verdicts(sets)
    made_from = {"model": config_digest(embedder.config)} if embedder else {}
    return publish_drops(spec, samples, verdicts, sets, settings, store, job, made_from, lease.check)


def _job_id(
    spec: CurateSpec,
    inputs: Sequence[ShardInputs],
    sets: Sequence[EvaluationSet],
    settings: FeatureSettings,
    embedder: EmbedderSettings | None,
) -> str:
    """Return what identifies all that decides the output of a job."""
    reader = Reader(spec.data)
    sources = dict.fromkeys(some.shard.source for some in inputs)
    return content_id(
        {
            "version": _VERSION,
            "root": spec.data.root,
            "split": spec.data.split,
            "sources": [[name, reader.source(name).fingerprint] for name in sources],
            "features": [settings.path(family, "") for family in FAMILIES],
            "sets": [[one.name, [some.digest for some in one.inputs]] for one in sets],
            "model": embedder.config if embedder else None,
            "rules": spec.rules.model_dump(mode="json"),
            "num_examples": spec.num_examples,
        }
    )


def _feature_settings(rules: CurationRules, data: DataConfig) -> FeatureSettings:
    leakage = rules.leakage or LeakageRule()
    languages = rules.filters is not None and rules.filters.languages is not None
    return FeatureSettings.of(data.media, leakage.ngram_words, leakage.min_words, languages)


def _compute(
    name: str,
    inputs: Sequence[Inputs],
    families: Sequence[Family],
    *,
    settings: FeatureSettings,
    cache: Store,
    cpus_per_task: float,
    bars: Bars,
) -> None:
    """Make the features that the cache lacks, a Ray task for each shard."""
    works = missing_features(inputs, families, settings, cache)
    done = total = sum(map(len, inputs))
    done -= sum(len(work.inputs) for work in works)
    if total:
        bars.update(name, done, total, unit="inputs")
    for _, count in run_tasks(partial(write_features, settings=settings, cache=cache), works, cpus_per_task):
        done += count
        bars.update(name, done, total, unit="inputs")


class _Judge:
    """Applies the rules of a job in their order."""

    def __init__(
        self,
        spec: CurateSpec,
        samples: Samples,
        settings: FeatureSettings,
        embedder: EmbedderSettings | None,
        cache: Store,
        scratch: Path,
        bars: Bars,
    ) -> None:
        self._spec, self._samples, self._settings, self._embedder = spec, samples, settings, embedder
        self._cache, self._scratch, self._bars = cache, scratch, bars
        self._verdicts = Verdicts.of(len(samples))

    def verdicts(self, sets: Sequence[EvaluationSet]) -> Verdicts:
        """Return what becomes of each sample."""
        rules, samples, within = self._spec.rules, self._samples, self._spec.rules.within
        verdicts = self._verdicts
        if rules.exact:
            verdicts.add(find_exact(samples, verdicts.keep, rules.exact, within))
        if rules.filters:
            verdicts.add(find_filtered(samples, verdicts.keep, rules.filters))
        if rules.near:
            verdicts.add(find_near(samples, verdicts.keep, rules.near, within))
        if rules.leakage and sets:
            datasets = [(one.name, one.inputs) for one in sets]
            evaluation = partial(load_evaluation, datasets, self._settings, self._cache)
            verdicts.add(find_leaks(samples, verdicts.keep, evaluation, rules.leakage))
        if self._embedder:
            self._by_vectors(self._embedder)
        return verdicts

    def _by_vectors(self, embedder: EmbedderSettings) -> None:
        rules, samples, verdicts = self._spec.rules, self._samples, self._verdicts
        check_workers(self._spec)
        vectors = SampleVectors(self._spec, embedder, self._cache, self._scratch, self._bars)
        if rules.alignment:
            # A low grade says that the pair does not fit: that is what the model should learn.
            graded = samples.texts.graded.reshape(-1, 2)[:, 0]
            cosines = vectors.cosines(verdicts.keep & ~graded)
            verdicts.add(find_misaligned(samples, verdicts.keep, cosines, rules.alignment))
        if rules.semantic:
            targets = vectors.targets(verdicts.keep)
            drops, verdicts.weight, verdicts.full_clusters = find_semantic(
                samples, verdicts.keep, targets, rules.semantic, rules.within, rules.seed
            )
            verdicts.add(drops)
