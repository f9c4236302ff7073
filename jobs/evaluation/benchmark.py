"""Job of kind `benchmark`: models on public benchmarks and on data sets of your own.

{out}/index.html                                  tables, plots, and what was answered wrongly
      {suite}/models.md                           all models, and what the others have over the first, with intervals
      {suite}/{model}/{dataset}_score.json ...    three files of each dataset, with the names that the benchmark uses
                      leaderboard.json, .md          means, datasets, what is missing, settings
                      diagnostics.json            modality gap, target modality, ties, what instructions change
                      submission.json             for the leaderboard, where the spec says what to write into it
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jobs.embedding.encode import WINDOW_ITEMS, Encoding, encode
from jobs.embedding.vectors import VectorCache
from jobs.evaluation.examples import wrong_answers
from jobs.evaluation.specs import BenchmarkSpec
from jobs.runtime.cluster import Resources, check_size, ray_cluster
from jobs.runtime.models import checkpoint_folder, local_folder
from jobs.runtime.progress import Bars, console, say
from jobs.runtime.revision import revision, versions
from pipelines.benchmarks.catalog import check_datasets, open_dataset
from pipelines.benchmarks.custom import read_custom
from pipelines.benchmarks.types import Dataset, Item, Pool, Row, as_ids, read_pool, without_instructions
from pipelines.errors import UserError
from pipelines.storage.location import open_store, resolve_endpoint
from rzen.evaluation.benchmark import DatasetScores, Vectors, score_dataset
from rzen.evaluation.comparison import (
    compare,
    comparison_table,
    instruction_sensitivity,
    modality_gap,
    target_modality_accuracy,
)
from rzen.evaluation.files import score_of, write_files
from rzen.evaluation.leaderboard import DatasetScore, build_leaderboard, side_by_side, terminal, write_leaderboard
from rzen.evaluation.results import write_json
from rzen.evaluation.submission import make_submission, write_submission
from rzen.model.checkpoints import checkpoint_sha256, file_sha256, read_identity
from rzen.report.benchmark import SuiteReport, write_benchmark_page
from rzen.report.hits import Search

_PREPROCESSING = ("config.json", "preprocessor_config.json", "tokenizer.json")
Entry = tuple[Row, Callable[[], Dataset]]


@dataclass
class _SuiteResults:
    """What is known of one model on one suite, by dataset."""

    scored: dict[str, DatasetScores] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    diagnostics: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: dict[str, list[Search]] = field(default_factory=dict)


def run(spec: BenchmarkSpec) -> dict[str, Any]:
    """Scores every model, writes files, tables and page, and prints the means."""
    entries, rows, missing = _datasets(spec)
    lacking = sum(map(len, missing.values()))
    say(f"  {len(spec.models)} models on {len(entries)} datasets of {len(rows)} suites; {lacking} are missing")
    suites: dict[str, dict[str, list[DatasetScore]]] = {suite: {} for suite in rows}
    known: dict[str, dict[str, _SuiteResults]] = {suite: {} for suite in rows}
    settings: dict[str, Any] = {}
    with ray_cluster():
        if not spec.autoscaling:
            check_size("actors", spec.actors, Resources(spec.cpus_per_actor, spec.gpus_per_actor))
        for model in spec.models:
            how, config = _encoding(spec, model)
            settings = _settings(spec, model, config)
            standings = _score(spec, model, how, config, entries)
            for suite, suite_rows in rows.items():
                standing = standings.get(suite, _SuiteResults())
                lines = _write(spec, suite, model, suite_rows, standing, missing.get(suite, {}), settings)
                suites[suite][model], known[suite][model] = lines, standing
                say(f"\n  {model}, {suite}")
                console.print(terminal(lines))
    reports = [_report(_folder(spec, suite), suite, standings, known[suite]) for suite, standings in suites.items()]
    page = Path(spec.out) / "index.html"
    title = f"{', '.join(spec.models)} on {', '.join(suites)}"
    write_benchmark_page(page, title=title, reports=reports, facts=_facts(settings))
    say(f"  {page}")
    return {"outputs": [spec.out]}


def _datasets(spec: BenchmarkSpec) -> tuple[list[Entry], dict[str, list[Row]], dict[str, dict[str, str]]]:
    """What can be opened; by suite its rows, and what is missing: dataset -> how to get it."""
    entries: list[Entry] = []
    rows: dict[str, list[Row]] = {}
    missing: dict[str, dict[str, str]] = {}
    roots: dict[str, Path] = {suite: Path(root) for suite, root in spec.suites.items()}
    found = check_datasets(roots)
    if unknown := sorted(set(spec.datasets or []) - {one.row.name for one in found}):
        raise UserError("datasets", f"{unknown[0]!r} is in none of the suites", "see `rzen evaluate --list`")
    for one in found:
        rows.setdefault(one.row.suite, []).append(one.row)
        if spec.datasets is not None and one.row.name not in spec.datasets:
            continue
        if one.missing:
            missing.setdefault(one.row.suite, {})[one.row.name] = one.missing
        else:
            entries.append((one.row, partial(open_dataset, one.row, roots[one.row.suite])))
    for name, path in spec.custom.items():
        dataset = read_custom(Path(path), name)
        rows.setdefault(dataset.row.suite, []).append(dataset.row)
        entries.append((dataset.row, lambda dataset=dataset: dataset))  # type: ignore[misc]
    if not entries:
        first = next((why for some in missing.values() for why in some.values()), "none is named")
        raise UserError("suites", f"no dataset is there; the first lacks: {first}", "see `rzen evaluate --list`")
    return entries, rows, missing


def _encoding(spec: BenchmarkSpec, model: str) -> tuple[Encoding, dict[str, Any]]:
    """How a model embeds, and all that decides its vectors."""
    ref, endpoint = spec.models[model], resolve_endpoint(spec.endpoint)
    base = Path(checkpoint_folder(ref.base, endpoint))
    adapter = Path(local_folder(ref.adapter, endpoint)) if ref.adapter else None
    identity = read_identity(adapter or base, spec.identity)
    how = Encoding(
        model=ref,
        identity=identity,
        endpoint=endpoint,
        media=spec.media,
        dtype=spec.dtype,
        chunk_tokens=spec.chunk_tokens,
        actors=spec.actors,
        cpus_per_actor=spec.cpus_per_actor,
        gpus_per_actor=spec.gpus_per_actor,
        cpus_per_task=spec.cpus_per_task,
    )
    config = {
        "weights": checkpoint_sha256(base),
        "adapter": adapter and checkpoint_sha256(adapter),
        "files": {name: file_sha256(base / name) for name in _PREPROCESSING if (base / name).is_file()},
        "identity": identity.model_dump(mode="json"),
        "instructions": ref.instructions,
        "media": spec.media.model_dump(mode="json"),
        "dtype": spec.dtype,
        "versions": versions(),
    }
    return how, config


def _settings(spec: BenchmarkSpec, model: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes the scores repeatable."""
    return {
        "model": {"name": model, **spec.models[model].model_dump(mode="json")},
        **config,
        "suites": spec.suites,
        "custom": spec.custom,
        "chunk_tokens": spec.chunk_tokens,
        "revision": revision(),
    }


def _score(
    spec: BenchmarkSpec, model: str, how: Encoding, config: Mapping[str, Any], entries: Sequence[Entry]
) -> dict[str, _SuiteResults]:
    """By suite. A dataset that cannot be read, embedded or scored has its problem told, and the others go on."""
    cache = VectorCache(open_store(spec.cache, spec.endpoint), config)
    standings: dict[str, _SuiteResults] = {}
    embedded: set[str] = set()
    with Bars() as bars, tempfile.TemporaryDirectory(prefix="rzen-vectors-", dir=spec.scratch) as scratch:
        corpora = _Corpora(cache, Path(scratch))
        on_progress = partial(bars.update, f"{model}: embed", unit="items")
        bad: dict[str, str] = {}
        done = 0
        for group in _groups(entries, standings):
            bad |= encode(_items(spec, group, embedded), cache, how, on_progress)
            for dataset in group:
                suite, name = dataset.row.suite, dataset.row.name
                standing = standings.setdefault(suite, _SuiteResults())
                try:
                    _score_one(spec, dataset, corpora, bad, standing, _folder(spec, suite, model))
                except UserError as error:
                    standing.problems[name] = str(error)
                    say(f"  {model}: {error}", "yellow")
                done += 1
                bars.update(f"{model}: score", done, len(entries), unit="datasets", note=name)
    return standings


def _groups(entries: Iterable[Entry], standings: dict[str, _SuiteResults]) -> Iterator[list[Dataset]]:
    """Datasets that are embedded in one job, opened when their turn comes."""
    group: list[Dataset] = []
    size = 0
    for row, opened in entries:
        try:
            dataset = opened()
        except UserError as error:
            standings.setdefault(row.suite, _SuiteResults()).problems[row.name] = str(error)
            say(f"  {error}", "yellow")
            continue
        group.append(dataset)
        known = isinstance(dataset.candidates, Sequence)
        size += len(dataset.queries) + (len(dataset.candidates) if known else WINDOW_ITEMS)  # type: ignore[arg-type]
        if size >= WINDOW_ITEMS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _items(spec: BenchmarkSpec, group: Sequence[Dataset], embedded: set[str]) -> Iterator[Item]:
    """Everything to embed for a group; a corpus only the first time."""
    for dataset in group:
        for asked in filter(None, (dataset, _plain(spec, dataset))):
            yield from (query.item for query in asked.queries)
        if dataset.corpus not in embedded:
            embedded.add(dataset.corpus)
            yield from dataset.candidates


def _plain(spec: BenchmarkSpec, dataset: Dataset) -> Dataset | None:
    """The dataset without instructions, where it has some and is to be asked without them, too."""
    if spec.instruction_sensitivity and any(query.item.instruction for query in dataset.queries):
        return without_instructions(dataset)
    return None


class _Corpora:
    """Pool and vectors of one corpus at a time: datasets that share it follow each other."""

    def __init__(self, cache: VectorCache, scratch: Path) -> None:
        self._cache, self._scratch = cache, scratch
        self._name: str | None = None

    def candidates(self, dataset: Dataset) -> tuple[Pool, Vectors]:
        """The vectors in the order of the pool, those that there are."""
        if self._name != dataset.corpus:
            self._name = None
            self._pool = read_pool(dataset)
            self._vectors = self._cache.load(self._pool.ids, self._scratch / "candidates.npy")
            self._name = dataset.corpus
        return self._pool, self._vectors

    def queries(self, dataset: Dataset) -> Vectors:
        """In their order."""
        return self._cache.load(as_ids(query.item.id for query in dataset.queries), self._scratch / "queries.npy")


def _score_one(
    spec: BenchmarkSpec,
    dataset: Dataset,
    corpora: _Corpora,
    bad: Mapping[str, str],
    standing: _SuiteResults,
    folder: Path,
) -> None:
    """Scores, files, diagnostics and examples of one dataset. Raises `UserError`."""
    name = dataset.row.name
    pool, candidates = corpora.candidates(dataset)
    _refuse(dataset, pool, bad)
    queries = corpora.queries(dataset)
    scored = score_dataset(dataset, queries, candidates, pool=pool)
    write_files(scored, folder)
    facts: dict[str, Any] = {
        "modality_gap": modality_gap(queries.rows, candidates.rows),
        "target_modality_accuracy": target_modality_accuracy(scored),
        "remarks": scored.remarks,
    }
    if plain := _plain(spec, dataset):
        gained, changed = instruction_sensitivity(
            scored, score_dataset(plain, corpora.queries(plain), candidates, pool=pool)
        )
        facts |= {"instruction_gain": asdict(gained), "changed_by_instruction": changed}
    standing.scored[name], standing.diagnostics[name] = scored, facts
    standing.examples[name] = wrong_answers(scored, spec.media, spec.num_examples)


def _refuse(dataset: Dataset, pool: Pool, bad: Mapping[str, str]) -> None:
    """Raises `UserError` for a dataset with an item that could not be embedded: without it the task is another."""
    wanted = np.concatenate([pool.ids, as_ids(query.item.id for query in dataset.queries)])
    mine = [id for id, there in zip(bad, np.isin(as_ids(bad), wanted), strict=True) if there]
    if mine:
        problem = f"{len(mine)} of {len(wanted)} items cannot be embedded, the first: {bad[mine[0]]}"
        raise UserError(dataset.row.name, problem, "fetch its files again")


def _folder(spec: BenchmarkSpec, suite: str, model: str = "") -> Path:
    return Path(spec.out) / suite.replace(" ", "-") / model


def _write(
    spec: BenchmarkSpec,
    suite: str,
    model: str,
    rows: Sequence[Row],
    standing: _SuiteResults,
    missing: Mapping[str, str],
    settings: Mapping[str, Any],
) -> list[DatasetScore]:
    """Tables, diagnostics and, where asked for, the submission of one model on one suite."""
    scores = {name: score_of(scored) for name, scored in standing.scored.items()}
    lines = build_leaderboard(rows, scores, {**missing, **standing.problems})
    folder = _folder(spec, suite, model)
    write_leaderboard(folder / "leaderboard.json", lines, settings)
    write_json(folder / "diagnostics.json", standing.diagnostics)
    if suite == "MMEB-V2" and model in spec.submission:
        whole = {line.row.name: scores[line.row.name] for line in lines if not line.problem}
        write_submission(folder / "submission.json", make_submission(spec.submission[model], whole))
        say(f"  {folder / 'submission.json'}: {len(whole)} of {len(lines)} datasets")
    return lines


def _report(
    folder: Path, suite: str, standings: Mapping[str, Sequence[DatasetScore]], known: Mapping[str, _SuiteResults]
) -> SuiteReport:
    """All models on a suite, for the page; also as Markdown. Each other model is compared with the first, where they
    have datasets in common.
    """
    scored = {model: standing.scored for model, standing in known.items()}
    first, *others = scored
    differences = {
        other: compare(scored[first], scored[other]) for other in others if scored[first].keys() & scored[other]
    }
    tables = [side_by_side(standings), *(comparison_table(some, first, other) for other, some in differences.items())]
    (folder / "models.md").write_text("\n".join(tables), encoding="utf-8")
    return SuiteReport(
        suite,
        standings,
        differences,
        {model: standing.diagnostics for model, standing in known.items()},
        {model: standing.examples for model, standing in known.items()},
    )


def _facts(settings: Mapping[str, Any]) -> dict[str, str]:
    """Of all models alike, for the page."""
    media = settings["media"]
    frames = f"{media['frames']}" + (f", at most, at {media['fps']:g} per second" if media["fps"] else "")
    return {
        "frames of a video": frames,
        "pixels of an image, of a page": f"{media['image_pixels']:,}, {media['page_pixels']:,}",
        "precision": settings["dtype"],
        "tokens at once": f"{settings['chunk_tokens']:,}",
        "versions": ", ".join(f"{name} {version}" for name, version in settings["versions"].items()),
        "revision": str(settings["revision"]),
    }
