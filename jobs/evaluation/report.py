"""What an evaluation writes for each suite: files, tables, diagnostics, submission, and the HTML report of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jobs.evaluation.datasets import Bundle
from jobs.evaluation.examples import mixed_answers, wrong_answers
from jobs.evaluation.score import Scored
from jobs.evaluation.specs import EvaluateSpec
from jobs.runtime.progress import console, say
from jobs.runtime.revision import revision, versions
from pipelines.benchmarks.types import Row
from pipelines.items.decode import ItemDecoder
from rzen.evaluation.comparison import (
    compare,
    comparison_table,
    finds_target_modality,
    instruction_sensitivity,
    modality_gap,
)
from rzen.evaluation.dataset_scores import DatasetScores
from rzen.evaluation.files import score_of, write_files
from rzen.evaluation.leaderboard import DatasetScore, build_leaderboard, side_by_side, terminal, write_leaderboard
from rzen.evaluation.mixed_pool import MixedScores, compare_mixed, describe_mixed, mixed_means, mixed_table
from rzen.evaluation.rerank_tables import rerank_lines, rerank_table, reranked_json, terminal_rerank
from rzen.evaluation.reranking import RerankedScores
from rzen.evaluation.results import write_json
from rzen.evaluation.submission import make_submission, write_submission
from rzen.report.evaluation import SuiteReport, write_evaluation_report
from rzen.report.hits import Search

_ANSWERS = 1  # queries of each dataset whose answers in the mixed pool are shown

Suites = dict[str, SuiteReport]


@dataclass
class SuiteResults:
    """What is known of one model on one suite, by dataset."""

    scored: dict[str, DatasetScores] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    diagnostics: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: dict[str, list[Search]] = field(default_factory=dict)
    mixed: dict[str, MixedScores] = field(default_factory=dict)
    reranked: dict[str, RerankedScores] = field(default_factory=dict)

    def add(self, found: Scored) -> None:
        """Keep the scores of a dataset and the diagnostics that need its vectors."""
        scores = found.scores
        facts: dict[str, Any] = {
            "modality_gap": modality_gap(found.queries.rows, found.candidates.rows),
            "target_modality_accuracy": float(finds_target_modality(scores).mean()),
            "remarks": scores.remarks,
        }
        if found.plain is not None:
            gained, changed = instruction_sensitivity(scores, found.plain)
            facts |= {"instruction_gain": asdict(gained), "changed_by_instruction": changed}
        name = scores.dataset.row.name
        self.scored[name], self.diagnostics[name] = scores, facts


def write_suite(
    spec: EvaluateSpec,
    suite: str,
    results: Mapping[str, SuiteResults],
    bundle: Bundle,
    configs: Mapping[str, Mapping[str, Any]],
) -> SuiteReport:
    """Write the files of all models on a suite, print the means of public ones, and return what the report shows.

    Each other model is compared with the baseline, where they have datasets in common.
    """
    decoder = ItemDecoder(bundle.media, bundle.data)
    leaderboards = {}
    for model, some in results.items():
        for name, scored in some.scored.items():
            write_files(scored, _folder(spec, suite, model))
            some.examples[name] = wrong_answers(scored, decoder, spec.num_examples)
        settings = _settings(spec, model, configs[model])
        lines = _write_model(spec, suite, model, bundle.rows[suite], some, bundle.missing.get(suite, {}), settings)
        leaderboards[model] = lines
        if bundle.data is None:
            say(f"\n  {model}, {suite}")
            console.print(terminal(lines))
    baseline = spec.baseline or next(iter(results))
    differences = {
        other: compare(results[baseline].scored, some.scored)
        for other, some in results.items()
        if other != baseline and results[baseline].scored.keys() & some.scored
    }
    mixed = {model: some.mixed for model, some in results.items() if some.mixed}
    mixed_differences = {
        other: compare_mixed(mixed[baseline], some)
        for other, some in mixed.items()
        if other != baseline and baseline in mixed
    }
    reranked = {model: rerank_lines(some.reranked) for model, some in results.items() if some.reranked}
    for model, rerank in reranked.items():
        write_json(_folder(spec, suite, model) / "rerank.json", reranked_json(results[model].reranked))
        say(f"\n  {model}, {suite}, re-ranked")
        console.print(terminal_rerank(rerank))
    tables = [
        side_by_side(leaderboards),
        *(rerank_table(rerank, f"{model}, re-ranked") for model, rerank in reranked.items()),
        *(comparison_table(some, baseline, other) for other, some in differences.items()),
        *([mixed_table(mixed)] if mixed else []),
        *(
            comparison_table(some, baseline, other, f"one pool, {metric}")
            for other, metrics in mixed_differences.items()
            for metric, some in metrics.items()
        ),
    ]
    (_folder(spec, suite) / "models.md").write_text("\n".join(tables), encoding="utf-8")
    if bundle.data is None:
        for model, scores in mixed.items():
            say(f"  {model}, {suite}, one pool of all: {describe_mixed(scores)}")
    return SuiteReport(
        suite,
        baseline,
        leaderboards,
        differences,
        {model: some.diagnostics for model, some in results.items()},
        {model: some.examples for model, some in results.items()},
        {model: mixed_means(some) for model, some in mixed.items()},
        mixed_differences,
        {model: mixed_answers(mixed[model], decoder, _ANSWERS) for model in (*mixed,)[:: max(1, len(mixed) - 1)]},
        reranked,
    )


def write_report(spec: EvaluateSpec, suites: Suites) -> Path:
    """Write the HTML report and return its place."""
    page = Path(spec.out) / "index.html"
    title = f"Evaluation: {', '.join(suites)}"
    write_evaluation_report(page, title=title, reports=list(suites.values()), facts=_facts(spec))
    return page


def _write_model(
    spec: EvaluateSpec,
    suite: str,
    model: str,
    rows: Sequence[Row],
    results: SuiteResults,
    missing: Mapping[str, str],
    settings: Mapping[str, Any],
) -> list[DatasetScore]:
    """Tables, diagnostics and, where asked for, the submission of one model on one suite."""
    scores = {name: score_of(scored) for name, scored in results.scored.items()}
    lines = build_leaderboard(rows, scores, {**missing, **results.problems})
    folder = _folder(spec, suite, model)
    write_leaderboard(folder / "leaderboard.json", lines, settings)
    for name, mixed in results.mixed.items():
        results.diagnostics[name]["mixed_pool"] = {**mixed.means, "num_candidates": mixed.num_candidates}
    write_json(folder / "diagnostics.json", results.diagnostics)
    if suite == "MMEB-V2" and model in spec.submission:
        whole = {line.row.name: scores[line.row.name] for line in lines if not line.problem}
        write_submission(folder / "submission.json", make_submission(spec.submission[model], whole))
        say(f"  {folder / 'submission.json'}: {len(whole)} of {len(lines)} datasets")
    return lines


def _folder(spec: EvaluateSpec, suite: str, model: str = "") -> Path:
    return Path(spec.out) / suite.replace(" ", "-") / model


def _settings(spec: EvaluateSpec, model: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes the scores repeatable."""
    return {
        "model": {"name": model, **spec.models[model].model_dump(mode="json")},
        **config,
        "data": spec.data and spec.data.model_dump(mode="json"),
        "suites": spec.suites,
        "custom": spec.custom,
        "chunk_tokens": spec.chunk_tokens,
        "revision": revision(),
    }


def _facts(spec: EvaluateSpec) -> dict[str, str]:
    """The settings that all models share, for the report."""
    facts: dict[str, str] = {}
    used = {"split": spec.data.media} if spec.data else {}
    if spec.suites or spec.custom:
        used["suites"] = spec.media
    for name, media in used.items():
        of = f" ({name})" if len(used) > 1 else ""
        frames = f"{media.frames}" + (f", at most, at {media.fps:g} per second" if media.fps else "")
        facts[f"frames of a video{of}"] = frames
        facts[f"pixels of an image, of a page{of}"] = f"{media.image_pixels:,}, {media.page_pixels:,}"
    if spec.rerank is not None:
        model = spec.rerank.model
        facts["re-ranker"] = f"{model.adapter or model.base}, first {spec.rerank.top_k} candidates"
    return facts | {
        "precision": spec.dtype,
        "tokens at once": f"{spec.chunk_tokens:,}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "revision": str(revision()),
    }
