"""Job of kind `evaluate`: one Ray task per model, rows of results.json from each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray

from jobs.evaluation.specs import EvaluateSpec
from jobs.runtime.cluster import Resources, check_size, ray_cluster, watch
from jobs.runtime.models import load_model
from jobs.runtime.progress import Progress, ProgressTracker, console, say
from jobs.runtime.revision import revision, versions
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.samples import DecodedSample, Rejected
from pipelines.storage.location import resolve_endpoint
from rzen.evaluation.encode import embed_inputs
from rzen.evaluation.ranking import is_collapsed, rank_of_gold
from rzen.evaluation.results import Result, markdown_table, terminal_table, write_results
from rzen.evaluation.tasks import METRICS, TASKS, chance


def run(spec: EvaluateSpec) -> dict[str, Any]:
    """Evaluates all models, prints the table and writes the JSON."""
    reader = Reader(spec.data)
    rows = [row for scores in score(spec, reader).values() for row in scores.rows]
    settings = {
        "data": reader.fingerprint,
        "spec": spec.model_dump(mode="json"),
        "versions": versions(),
        "revision": revision(),
    }
    write_results(Path(spec.out), rows, settings)
    table = Path(spec.out).with_suffix(".md")
    table.write_text(markdown_table(rows), encoding="utf-8")
    console.print(terminal_table(rows))
    say(f"  {spec.out}, {table.name}")
    return {"outputs": [spec.out]}


@dataclass(frozen=True)
class ModelScores:
    """Of one model: a row for each task and metric, and by task the first metric of each query, in the order of the
    data.
    """

    rows: list[Result]
    by_query: dict[str, list[float]]


def score(spec: EvaluateSpec, reader: Reader) -> dict[str, ModelScores]:
    """The results of each model on the data that `reader` was made for."""
    sources = _sources(spec, reader)
    counts = ", ".join(f"{task} {sum(reader.sizes()[s] for s in names):,}" for task, names in sources.items())
    say(f"  {len(spec.models)} models on {spec.data.root} {spec.data.split}: {counts}")
    with ray_cluster():
        if not spec.autoscaling:
            check_size("model", 1, Resources(spec.cpus_per_model, spec.gpus_per_model))
        board = ray.remote(num_cpus=0)(ProgressTracker).remote()
        task = ray.remote(num_cpus=spec.cpus_per_model, num_gpus=spec.gpus_per_model, max_retries=2)(_evaluate)
        endpoint = resolve_endpoint(spec.data.endpoint)
        scores = {name: task.remote(spec, name, reader, endpoint, sources, board).future() for name in spec.models}
        return watch(scores, board)


def _sources(spec: EvaluateSpec, reader: Reader) -> dict[str, list[str]]:
    """Task -> its sources in the data, in the order of the tasks."""
    sources: dict[str, list[str]] = {}
    for task in spec.tasks or TASKS:
        if found := [source for source in reader.sizes() if reader.task_of(source) == task]:
            sources[task] = found
        elif spec.tasks:
            raise UserError(f"{spec.data.root} {spec.data.split}", f"has no samples of task {task!r}", "leave it out")
    if not sources:
        problem = f"has no samples of {', '.join(TASKS)}"
        raise UserError(
            f"{spec.data.root} {spec.data.split}", problem, "hold some out when ingesting, or evaluate train"
        )
    return sources


def _evaluate(
    spec: EvaluateSpec, name: str, reader: Reader, endpoint: str | None, sources: dict[str, list[str]], board: Any
) -> ModelScores:
    ref = spec.models[name]
    processor, embedder = load_model(ref, endpoint, spec.identity, spec.dtype)
    reader.data = reader.data.model_copy(update={"instructions": ref.instructions})
    total = sum(reader.sizes()[source] for names in sources.values() for source in names)
    scores = ModelScores([], {})
    done = 0
    for task, names in sources.items():
        queries, targets, ids, pools = [], [], [], []
        samples = (sample for source in names for sample in _good(reader, source))
        while batch := list(islice(samples, spec.batch_size)):
            queries.append(embed_inputs(processor, embedder, [sample.query for sample in batch], spec.batch_size))
            targets.append(embed_inputs(processor, embedder, [sample.positive for sample in batch], spec.batch_size))
            ids += [sample.sample.target_sha256 for sample in batch]
            pools += [sample.sample.source if TASKS[task].pool == "source" else task for sample in batch]
            done += len(batch)
            board.post.remote(name, Progress(done, total, task))
        rows, by_query = _score(spec, name, task, np.concatenate(queries), np.concatenate(targets), ids, pools)
        scores.rows.extend(rows)
        scores.by_query[task] = by_query
    board.post.remote(name, Progress(total, total))
    return scores


def _good(reader: Reader, source: str) -> Iterator[DecodedSample]:
    """Samples that can be decoded. Ingest decoded all of them once, so that one that cannot be is a damaged store."""
    for item in reader.samples(source, range(reader.sizes()[source])):
        if isinstance(item, Rejected):
            raise UserError(
                item.origin, f"{item.reason}: {item.detail}", "the shard was damaged after ingest: repeat it"
            )
        yield item


def _score(
    spec: EvaluateSpec,
    model: str,
    task: str,
    queries_QD: Any,
    targets_QD: Any,
    target_ids: list[str],
    pools: list[str],
) -> tuple[list[Result], list[float]]:
    """Every distinct target of a query's pool is one candidate; samples with equal targets share it."""
    ranks = np.empty(len(target_ids), dtype=np.int64)
    shares, sizes = [], []
    for pool in dict.fromkeys(pools):
        mine = np.flatnonzero(np.array(pools) == pool)
        ids, first, gold = np.unique([target_ids[i] for i in mine], return_index=True, return_inverse=True)
        candidates_ND = targets_QD[mine[first]]
        if is_collapsed(candidates_ND):
            say(f"  {model}: all {len(ids)} candidates of {pool} have one vector", "yellow")
        ranks[mine] = rank_of_gold(queries_QD[mine], candidates_ND, gold)
        sizes.append(len(ids))
        shares.append(len(mine) / len(ranks))
    metrics = spec.metrics or TASKS[task].metrics
    rows = [
        Result(
            model=model,
            task=task,
            metric=metric,
            value=METRICS[metric](ranks),
            num_queries=len(ranks),
            num_candidates=max(sizes),
            chance=sum(share * chance(metric, size) for share, size in zip(shares, sizes, strict=True)),
            split=spec.data.split,
        )
        for metric in metrics
    ]
    return rows, [METRICS[metrics[0]](ranks[query : query + 1]) for query in range(len(ranks))]
