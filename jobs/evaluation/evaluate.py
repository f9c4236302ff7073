"""Job of kind `evaluate`: models on a held-out split, on public benchmarks and on custom datasets.

* `{out}/results.json`, `results.md`: scores of the split, a row for each model, task and metric.
* `{out}/index.html`: tables, plots and wrong answers.
* `{out}/{suite}/models.md`: all models, and their differences to the first, with intervals.
* `{out}/{suite}/{model}/{dataset}_score.json` and two more files of each dataset, with the names that benchmarks use.
* `{out}/{suite}/{model}/leaderboard.json`, `.md`: means, datasets, what is missing, settings.
* `{out}/{suite}/{model}/rerank.json`: scores before and after re-ranking, if the spec names a re-ranker.
* `{out}/{suite}/{model}/diagnostics.json`: modality gap, target modality, ties, what instructions change.
* `{out}/{suite}/{model}/submission.json`: for the MMEB-V2 leaderboard, if the spec asks for it.

The suite of a split is its name (`held_out`). That of custom datasets is `custom`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.embedding.engine import Models, check_workers
from jobs.evaluation.datasets import Bundle, files_bundle, split_bundle
from jobs.evaluation.report import SuiteResults, Suites, write_report, write_suite
from jobs.evaluation.rerank import Choices, ShortlistScorer, choose_weights
from jobs.evaluation.score import Problem, Scored, endpoint_of, models_of, score_mixed_pools, score_models
from jobs.evaluation.specs import EvaluateSpec
from jobs.runtime.cluster import ray_cluster
from jobs.runtime.lease import hold_output
from jobs.runtime.progress import console, say
from jobs.runtime.revision import revision, versions
from pipelines.benchmarks.catalog import check_datasets
from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.storage.location import open_store
from pipelines.storage.store import Store
from rzen.evaluation.rerank_tables import reranked_json
from rzen.evaluation.results import Result, markdown_table, terminal_table, write_results
from rzen.evaluation.tasks import chance, score_queries, task_of

LISTINGS, RESULTS = "listings", "results.json"


@dataclass(frozen=True)
class ModelScores:
    """Scores of one model on a split: a row for each task and metric, and by task the first metric of each query, in
    the order of the data. Equal queries are one.
    """

    rows: list[Result]
    by_query: dict[str, list[float]]


def run(spec: EvaluateSpec) -> dict[str, Any]:
    """Score all models, print the tables, and write files, tables and the report.

    Return the places of the outputs, the `rows` of the split, and suite -> model -> dataset -> scores before and after
    re-ranking.
    """
    _check_weights(spec)
    cache = open_store(spec.cache, endpoint_of(spec))
    cache.ensure_bucket()
    suites: Suites = {}
    rows: list[Result] = []
    reranked: dict[str, dict[str, Any]] = {}
    with hold_output(open_store(spec.out), "evaluation", "evaluates") as lease, ray_cluster():
        check_workers(spec)
        choices: Choices | None = None
        for bundle in _bundles(spec, cache):
            models = models_of(spec, bundle, dict.fromkeys(spec.models, cache))
            found = _score_suites(spec, bundle, models)
            reranker = None
            if spec.rerank is not None:
                scorer = ShortlistScorer(spec, bundle, models, cache)
                reranker = [scorer.judge.config["base"], scorer.judge.config["adapter"]]
                if choices is None:  # the first bundle is that of `data`
                    tasks = [row.name for row, _ in bundle.entries] if bundle.data is not None else []
                    choices = choose_weights(spec, tasks, cache, cache.child(LISTINGS))
                reranked |= _rerank(scorer, choices, found)
            lease.check()
            configs = {some.name: some.config for some, _ in models}
            for suite, results in found.items():
                suites[suite] = write_suite(spec, suite, results, bundle, configs)
            if bundle.data is not None:
                (results,) = found.values()
                weights = {name: [config["base"], config["adapter"]] for name, config in configs.items()}
                rows = _write_split(spec, bundle.data, results, weights, reranker)
        lease.check()
        report = write_report(spec, suites)
    say(f"  {report}")
    told = {"rerank": reranked} if spec.rerank is not None else {}
    return {"outputs": [spec.out], "rows": [asdict(row) for row in rows], **told}


def score(spec: EvaluateSpec, reader: Reader, stores: Mapping[str, Store]) -> dict[str, ModelScores]:
    """Return the scores of each model on the split that `reader` reads; suites and custom datasets are left out.

    The vectors of a model are kept in its folder of `stores` until all models are scored, so that a killed job
    resumes. Then they are deleted: a model that is tried once leaves only its scores.
    """
    listings = next(iter(stores.values())).child(LISTINGS)
    with ray_cluster():
        check_workers(spec)
        bundle = split_bundle(spec, reader, listings)
        (results,) = _score_suites(spec, bundle, models_of(spec, bundle, stores)).values()
    for store in (listings, *stores.values()):
        store.delete_tree("")
    assert bundle.data is not None
    return {name: _split_scores(spec, bundle.data, name, some) for name, some in results.items()}


def _bundles(spec: EvaluateSpec, cache: Store) -> Iterator[Bundle]:
    if spec.data is not None:
        yield split_bundle(spec, Reader(spec.data), cache.child(LISTINGS))
    if spec.suites or spec.custom:
        yield files_bundle(spec)


def _score_suites(spec: EvaluateSpec, bundle: Bundle, models: Models) -> dict[str, dict[str, SuiteResults]]:
    """Suite -> model -> what is known of it."""
    suites = {suite: {some.name: SuiteResults() for some, _ in models} for suite in bundle.rows}
    for found in _scored(spec, bundle, models):
        if isinstance(found, Problem):
            suites[found.row.suite][found.model].problems[found.row.name] = found.text
        else:
            suites[found.scores.dataset.row.suite][found.model].add(found)
    for results in suites.values():
        datasets = {name: [scored.dataset for scored in some.scored.values()] for name, some in results.items()}
        for name, mixed in score_mixed_pools(spec, models, datasets).items():
            results[name].mixed = mixed
    return suites


def _rerank(
    scorer: ShortlistScorer, choices: Choices, found: Mapping[str, Mapping[str, SuiteResults]]
) -> dict[str, dict[str, Any]]:
    """Re-rank what was scored, and keep it with the results. Return suite -> model -> dataset -> scores, as JSON."""
    for results in found.values():
        scored = {model: some.scored for model, some in results.items()}
        for model, reranked in scorer.rerank(scored, choices).items():
            results[model].reranked = reranked
    return {
        suite: {model: reranked_json(some.reranked) for model, some in results.items()}
        for suite, results in found.items()
    }


def _check_weights(spec: EvaluateSpec) -> None:
    """Raise `UserError` for a weight of a task or dataset that the spec does not score, given or to be chosen."""
    if spec.rerank is None:
        return
    suites = check_datasets({suite: Path(root) for suite, root in spec.suites.items()})
    known = {*spec.custom, *(one.row.name for one in suites)}
    for name in sorted(set(spec.rerank.tune_tasks) - known):
        fix = f"use one of {', '.join(sorted(known)) or 'those of suites and custom, which are empty'}"
        raise UserError(f"rerank.tune_tasks.{name}", "is no dataset of suites or custom", fix)
    if tune := spec.rerank.tune:
        reader = Reader(tune)
        there = {reader.task_of(source) for source in reader.sizes()}
        for name, task in spec.rerank.tune_tasks.items():
            if task not in there:
                problem = f"is no task of {tune.root} {tune.split}"
                raise UserError(f"rerank.tune_tasks.{name}={task}", problem, f"use one of {', '.join(sorted(there))}")
    if spec.data is not None:
        reader = Reader(spec.data)
        known |= {reader.task_of(source) for source in reader.sizes()}
    if unknown := sorted(set(spec.rerank.weights) - known):
        fix = f"use one of {', '.join(sorted(known))}"
        raise UserError(f"rerank.weights.{unknown[0]}", "is no task or dataset that is scored", fix)


def _scored(spec: EvaluateSpec, bundle: Bundle, models: Models) -> Iterator[Scored | Problem]:
    """Every model on every dataset. What a reader of the log should know of it is printed."""
    described = set[str]()
    for found in score_models(spec, bundle, models):
        if isinstance(found, Problem):
            say(f"  {found.model}: {found.text}", "yellow")
        else:
            name = found.scores.dataset.row.name
            for note in found.scores.dataset.notes if name not in described else ():
                say(f"  {name}: {note}")
            described.add(name)
            for part in found.scores.collapsed:
                say(f"  {found.model}: all {part} of {name} have one vector", "yellow")
        yield found


def _write_split(
    spec: EvaluateSpec,
    data: DataConfig,
    results: Mapping[str, SuiteResults],
    weights: Mapping[str, list[str | None]],
    reranker: list[str | None] | None,
) -> list[Result]:
    """Write the rows of all models as JSON and Markdown, print and return them.

    `weights` are the hashes of base and adapter of each model, by which an export finds its scores. `reranker` are
    those of the re-ranker, if there is one.
    """
    rows = [row for name, some in results.items() for row in _split_scores(spec, data, name, some).rows]
    settings = {
        "data": Reader(data).fingerprint,
        "spec": spec.model_dump(mode="json"),
        "weights": weights,
        **({"reranker": reranker} if reranker else {}),
        "versions": versions(),
        "revision": revision(),
    }
    path = Path(spec.out) / RESULTS
    reranked = {name: reranked_json(some.reranked) for name, some in results.items() if some.reranked}
    write_results(path, rows, settings, reranked)
    path.with_suffix(".md").write_text(markdown_table(rows), encoding="utf-8")
    console.print(terminal_table(rows))
    say(f"  {path}, {path.with_suffix('.md').name}")
    return rows


def _split_scores(spec: EvaluateSpec, data: DataConfig, model: str, results: SuiteResults) -> ModelScores:
    """The rows of one model in the order of the tasks: those of their own pools, then those of the mixed pool."""
    scores = ModelScores([], {})
    for task, scored in results.scored.items():
        queries = scored.dataset.queries
        sizes = Counter((scored.dataset.pool_size(query), len(query.relevance)) for query in queries)
        metrics = spec.metrics or task_of(task).metrics
        for metric in metrics:
            values = score_queries(metric, scored.relevant, scored.ranked.rank)
            row = Result(
                model=model,
                task=task,
                metric=metric,
                value=float(values.mean()),
                num_queries=len(queries),
                num_candidates=max(size for size, _ in sizes),
                chance=sum(count / len(queries) * chance(metric, *size) for size, count in sizes.items()),
                split=data.split,
            )
            scores.rows.append(row)
            if metric == metrics[0]:
                scores.by_query[task] = values.tolist()
    for task, mixed in results.mixed.items():
        num_queries = len(results.scored[task].dataset.queries)
        scores.rows.extend(
            Result(
                model=model,
                task=task,
                metric=metric,
                value=value,
                num_queries=num_queries,
                num_candidates=mixed.candidates_of(metric),
                chance=mixed.chance[metric],
                split=data.split,
                pool="mixed",
            )
            for metric, value in mixed.means.items()
        )
    return scores
