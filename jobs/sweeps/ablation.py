"""Job of kind `ablation`: trains with and without parts of the recipe, each with several seeds.

Every pair of variant and seed is one training run, with its scores in its folder. The same command therefore resumes
the job. It works seed by seed, so that all variants of a seed are complete early. A report of the finished seeds is
always there. It says what was registered before the first run.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.evaluation.scores import Scorer, evaluation, model_of
from jobs.evaluation.specs import EvaluateSpec
from jobs.runtime.cluster import ray_cluster
from jobs.runtime.lease import hold_output
from jobs.runtime.progress import duration, say
from jobs.runtime.revision import hardware, revision, versions
from jobs.spec.job import JobConfig
from jobs.spec.load import Document
from jobs.sweeps.finetunes import check_train, stage_document
from jobs.sweeps.page import sweep_page, write_progress
from jobs.sweeps.registration import register
from jobs.sweeps.specs import AblationSpec
from jobs.training.runs import METRICS, PAGE, SPEC, Run, read_rows
from jobs.training.specs import TrainSpec
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.storage.location import open_store

if TYPE_CHECKING:
    from rzen.evaluation.ablation import Contrast, Effect
    from rzen.evaluation.results import Result

CONTRASTS = "contrasts.svg"
_SHOWN = ("dropped_fraction", "effective_fraction", "temperature")
VariantAndSeed = tuple[str, int]


@dataclass(frozen=True)
class Finished:
    """Results of a finished run.

    `worker_s` are the seconds that all its workers spent in steps, without waiting for data. With one thread for each
    worker they are at least the CPU seconds.
    """

    results: list[Result]
    steps: list[dict[str, Any]]
    worker_s: float


def resolve(spec: AblationSpec, document: Document) -> tuple[dict[VariantAndSeed, TrainSpec], EvaluateSpec]:
    """Return the spec of each run, seed by seed, and the evaluation without its models. `document` is that of `spec`.

    Raise `UserError` for two variants that train the same.
    """
    stage = stage_document(spec.stage, spec.set, document)
    runs: dict[VariantAndSeed, TrainSpec] = {}
    for seed in spec.seed_list:
        seen: dict[str, str] = {}
        for variant, changes in spec.variants.items():
            place = document.place_under("variants", variant)
            own = {"name": f"{variant}-s{seed}", "seed": seed}
            train = check_train(stage.overlaid(changes, place).overlaid(own, place))
            content = train.model_dump_json(exclude={"name"})
            if content in seen:
                problem = f"variant {variant!r} trains the same as variant {seen[content]!r}"
                raise UserError(document.place(("variants", variant)), problem, "let it change something, or remove it")
            seen[content] = variant
            runs[variant, seed] = train
    return runs, evaluation(spec.evaluate, document, "evaluate")


def named(spec: AblationSpec, document: Document) -> list[JobConfig]:
    """Return the specs of the runs and of their evaluation."""
    runs, evaluate = resolve(spec, document)
    return [*runs.values(), evaluate]


def run(spec: AblationSpec, document: Document) -> dict[str, Any]:
    """Train and score what is not there yet, and write the report."""
    from jobs.training.launch import launch

    runs, evaluate = resolve(spec, document)
    say(f"  {len(spec.variants)} variants x {len(spec.seed_list)} seeds: {', '.join(spec.variants)}")
    seeds_at_once = max(1, spec.max_parallel // len(spec.variants))  # so that `max_parallel` runs can start
    finished: dict[VariantAndSeed, Finished] = {}
    started_s = time.monotonic()
    out = open_store(spec.out)
    with hold_output(out, "ablation", "compares variants") as lease, ray_cluster():
        registered = register(spec, out, has_begun=any(Run(train).store.exists(SPEC) for train in runs.values()))
        for begin in range(0, len(spec.seed_list), seeds_at_once):
            seeds = spec.seed_list[begin : begin + seeds_at_once]
            group = {key: train for key, train in runs.items() if key[1] in seeds}
            of_group = {train.name: Run(train) for train in group.values()}
            progress = partial(write_progress, out, _title(spec), of_group)
            # A page with scores is worth more than one with the progress of the next seeds.
            launch(list(group.values()), spec.max_parallel, write_overview=None if finished else progress)
            finished |= _scored(group, evaluate)
            lease.check()
            if len(finished) >= 2 * len(spec.variants):
                write_report(spec, finished, facts(evaluate, time.monotonic() - started_s) | {"registered": registered})
                _write_page(spec, {key: runs[key] for key in finished}, evaluate)
            say(f"  {begin + len(seeds)} of {len(spec.seed_list)} seeds, {duration(time.monotonic() - started_s)}")
    say(f"  {spec.out}: ablation.json, ablation.md, ablation.svg, {PAGE}")
    return {"outputs": [f"{spec.out}/ablation.json"]}


def _scored(group: Mapping[VariantAndSeed, TrainSpec], evaluate: EvaluateSpec) -> dict[VariantAndSeed, Finished]:
    folders = {train.name: Run(train) for train in group.values()}
    results = Scorer(evaluate).scores({name: model_of(some) for name, some in folders.items()})
    finished = {}
    for key, train in group.items():
        steps = read_rows(folders[train.name].store, METRICS)
        worker_s = train.cluster.workers * sum(row["step_s"] - row["feed_wait_s"] for row in steps)
        finished[key] = Finished(results[train.name], steps, worker_s)
    return finished


def facts(evaluate: EvaluateSpec, elapsed_s: float) -> dict[str, Any]:
    """Return date, code, hardware and time of the results. Needs a connected Ray."""
    assert evaluate.data is not None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "revision": revision(),
        "versions": versions(),
        "hardware": hardware(),
        "data": Reader(evaluate.data).fingerprint,
        "elapsed_s": round(elapsed_s, 1),
    }


def write_report(spec: AblationSpec, finished: Mapping[VariantAndSeed, Finished], where: dict[str, Any]) -> None:
    """Write scores, tables and plot of all runs that are finished."""
    from rzen.evaluation.ablation import contrasts, effects, plot_contrasts, plot_effects
    from rzen.evaluation.results import write_json

    scores: dict[str, dict[int, dict[str, float]]] = {variant: defaultdict(dict) for variant in spec.variants}
    for (variant, seed), some in finished.items():
        for row in some.results:
            scores[variant][seed].setdefault(row.task, row.value)  # the first metric counts
    found, contrasted = effects(scores, spec.baseline), contrasts(scores, spec.contrasts)
    runs = [
        {
            "variant": variant,
            "seed": seed,
            "training": _training_means(some.steps),
            "rows": [asdict(row) for row in some.results],
        }
        for (variant, seed), some in finished.items()
    ]
    worker_s = sum(some.worker_s for some in finished.values())
    settings = where | {"spec": spec.model_dump(mode="json"), "worker_s": round(worker_s, 1)}
    out = Path(spec.out)
    results = {name: [asdict(some) for some in rows] for name, rows in (("effects", found), ("contrasts", contrasted))}
    write_json(out / "ablation.json", {"settings": settings, **results, "runs": runs})
    (out / "ablation.svg").write_text(plot_effects(found, spec.baseline), encoding="utf-8")
    if contrasted:
        (out / CONTRASTS).write_text(plot_contrasts(contrasted), encoding="utf-8")
    (out / "ablation.md").write_text(_markdown(spec, found, contrasted, runs, settings), encoding="utf-8")


def _title(spec: AblationSpec) -> str:
    return f"Ablation of {len(spec.variants)} variants"


def _write_page(spec: AblationSpec, trained: Mapping[VariantAndSeed, TrainSpec], evaluate: EvaluateSpec) -> None:
    """Write the page of all runs that are finished. Their scores are kept with them."""
    runs = {train.name: Run(train) for train in trained.values()}
    models, scorer = {name: model_of(run) for name, run in runs.items()}, Scorer(evaluate)
    out = open_store(spec.out)
    plots = {f"Differences to {spec.baseline}": out.read("ablation.svg").decode()}
    if spec.contrasts:
        plots["Contrasts"] = out.read(CONTRASTS).decode()
    page = sweep_page(
        title=_title(spec),
        runs=runs,
        rows=[row for rows in scorer.scores(models).values() for row in rows],
        by_query=scorer.by_query(models),
        facts={"code": revision(), **versions()},
        plots=plots,
    )
    out.write(PAGE, page)


def _training_means(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return means over the steps. They show whether a part of the recipe had any effect in training."""
    return {name: statistics.fmean(row[name] for row in steps if not row["skipped"]) for name in _SHOWN}


def _markdown(
    spec: AblationSpec,
    found: Sequence[Effect],
    contrasted: Sequence[Contrast],
    runs: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> str:
    from rzen.evaluation.ablation import contrast_table, difference_table, score_table

    num_seeds = found[0].num_seeds
    metrics: dict[str, str] = {}
    for row in runs[0]["rows"]:
        metrics.setdefault(row["task"], row["metric"])
    differences = [effect for effect in found if effect.variant != spec.baseline]
    num_intervals = len(differences) + len(contrasted)
    question = f"**Question.** {spec.question}\n\n" if spec.question else ""
    notes = "".join(f"* {note}\n" for note in spec.notes)
    compared = ", ".join(f"{task} {metric}" for task, metric in metrics.items())
    seeds = f"{len(spec.variants)} variants x {num_seeds} seeds (of {len(spec.seed_list)} requested)"
    mean = " Look\nat the mean of the tasks first." if len(metrics) > 1 else ""
    contrast_part = (
        f"""## Contrasts, points

{_weights(spec)}
{contrast_table(contrasted)}
![contrasts]({CONTRASTS})

"""
        if contrasted
        else ""
    )
    limits = "## What is not shown\n\n" + "".join(f"* {limit}\n" for limit in spec.limits) if spec.limits else ""
    return f"""# What the parts change

{question}* {seeds}, {settings["date"]}, revision {settings["revision"]}
* {settings["hardware"]}; workers computed {settings["worker_s"]:,.0f} s in training steps only
* {compared}
* {_registered(spec, settings["registered"])}
* {_power([*contrasted] or differences, num_seeds)}
{notes}
{contrast_part}## Difference to {spec.baseline}, points

Mean over the seeds with its 95% interval (Student's t, paired by seed), bold where the interval excludes 0. The
interval covers what the seed changes in a run. It does not cover the choice of the held-out samples or of the model
that all runs start from. There are {num_intervals} intervals, and one in twenty misses the true value by chance.{mean}
A difference that is not bold is not shown to be real.

{difference_table(found, spec.baseline)}
![differences](ablation.svg)

## Mean scores, %

{score_table(found)}
## Effects in training

Means over steps and seeds: negatives dropped as duplicates or false negatives, effective share of the kept negatives,
and the temperature.

{_training_table(runs)}
{limits}"""


def _registered(spec: AblationSpec, registered: str) -> str:
    seeds = ", ".join(map(str, spec.seed_list))
    return f"{registered}: variants {', '.join(spec.variants)}; {len(spec.contrasts)} contrasts; seeds {seeds}"


def _power(found: Sequence[Effect | Contrast], num_seeds: int) -> str:
    halves = [100 * (some.high - some.low) / 2 for some in found]
    what = f"with {num_seeds} seeds, the intervals reach {min(halves):.1f} to {max(halves):.1f} points to each side"
    return f"power: {what}; smaller effects are not seen"


def _weights(spec: AblationSpec) -> str:
    """Return what each contrast is, as a list."""
    lines = []
    for name, weights in spec.contrasts.items():
        parts = [
            f"{'-' if weight < 0 else '+'} {'' if abs(weight) == 1 else f'{abs(weight):g} '}{variant}"
            for variant, weight in weights.items()
            if weight
        ]
        lines.append(f"* {name}: {' '.join(parts).removeprefix('+ ')}\n")
    return "".join(lines)


def _training_table(runs: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| variant | dropped, % | effective, % | temperature |", "| --- | ---: | ---: | ---: |"]
    for variant in dict.fromkeys(run["variant"] for run in runs):
        dropped, effective, temperature = (
            statistics.fmean(run["training"][name] for run in runs if run["variant"] == variant) for name in _SHOWN
        )
        lines.append(f"| {variant} | {100 * dropped:.2f} | {100 * effective:.1f} | {temperature:.4f} |")
    return "\n".join(lines) + "\n"
