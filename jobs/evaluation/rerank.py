"""The first candidates of each query scored by a re-ranker: pairs of all models and datasets, each scored once.

Scores are kept in the cache of the evaluation, by the contents of the pair and the identity of the re-ranker. So a job
that was killed resumes, and two embedders that find the same candidate share its score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from jobs.embedding.engine import Models
from jobs.embedding.vectors import VectorCache
from jobs.evaluation.datasets import DAMAGED, Bundle, split_bundle
from jobs.evaluation.item_pairs import ItemPlaces, asked_item, pair_key, units_of
from jobs.evaluation.score import Problem, models_of, score_models
from jobs.evaluation.specs import EvaluateSpec
from jobs.judging.local import LocalJudge
from jobs.judging.pairs import PAIRS_AT_ONCE, Keys, missing_of, windows
from jobs.judging.scores import Scores, scores_of
from jobs.runtime.progress import Bars, say
from pipelines.benchmarks.types import Dataset
from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.items.types import Item
from pipelines.storage.store import Store
from rzen.evaluation.dataset_scores import DatasetScores
from rzen.evaluation.reranking import RerankedScores, Shortlist, WeightChoice, choose_weight, score_reranked
from rzen.evaluation.vectors import NONE

ByModel = Mapping[str, Mapping[str, DatasetScores]]
"""Model -> dataset -> its scores."""
Choices = dict[str, dict[str, WeightChoice]]
"""Model -> dataset -> w."""


class ShortlistScorer:
    """The re-ranker of an evaluation, on the datasets of one bundle. Reads all of its weights, to identify them."""

    def __init__(self, spec: EvaluateSpec, bundle: Bundle, models: Models, cache: Store) -> None:
        assert spec.rerank is not None
        self._spec, self._settings, self._bundle = spec, spec.rerank, bundle
        one = models[0][0]  # where the data are is the same for all
        places = ItemPlaces(bundle.media, one.data, one.fingerprints, spec.rerank.instructions)
        self.judge = LocalJudge.of(spec.rerank.model, places, one.endpoint, spec.chunk_tokens, answer="log_odds")
        self._cache = VectorCache(cache, self.judge.config)

    def rerank(self, scored: ByModel, choices: Choices) -> dict[str, dict[str, RerankedScores]]:
        """Return model -> dataset -> scores before and after re-ranking. Needs Ray.

        `choices` are the weights that were chosen by task. A dataset of files has that of its task in `tune_tasks`.
        Weights that the spec gives come first. A dataset of files with a pair that cannot be scored is reported and
        left out. For a split it is a `UserError`.
        """
        is_split = self._bundle.data is not None
        given = {name: WeightChoice(weight, "given") for name, weight in self._settings.weights.items()}
        found: dict[str, dict[str, RerankedScores]] = {model: {} for model in scored}
        for model, shortlist in self.shortlists(scored):
            name = shortlist.scores.dataset.row.name
            task = name if is_split else self._settings.tune_tasks.get(name, "")
            found[model][name] = score_reranked(shortlist, given.get(name) or choices.get(model, {}).get(task))
        return found

    def shortlists(self, scored: ByModel) -> Iterator[tuple[str, Shortlist]]:
        """Yield model and shortlist of each scored dataset, dataset by dataset. Errors are those of `rerank`."""
        parts: dict[tuple[str, str], list[Scores]] = {}
        with Bars() as bars:
            total = sum(_num_pairs(one, self._settings.top_k) for some in scored.values() for one in some.values())
            show = _Progress(bars, total, self.judge.name)
            for window in windows(_pieces(scored, self._settings.top_k), lambda piece: piece.num_pairs, PAIRS_AT_ONCE):
                for piece, keys_QK in zip(window, self._score(window, show), strict=True):
                    found = parts.setdefault((piece.model, piece.name), [])
                    found.append(scores_of(self._cache, keys_QK, self._spec.scratch))
                    if sum(map(len, found)) == len(piece.scores.dataset.queries):
                        log_odds = np.concatenate(parts.pop((piece.model, piece.name)))
                        if self._is_whole(piece, log_odds):
                            yield piece.model, Shortlist(piece.scores, log_odds)

    def _score(self, window: Sequence[_Piece], show: _Progress) -> list[Keys]:
        """Score the pairs of a window that have no score yet. Return the keys of each piece."""
        named: dict[str, tuple[Item, Item]] = {}
        by_piece = [piece.keys(self._settings.instructions, named) for piece in window]
        keys = np.array(sorted(named), dtype="S32")
        missing = keys[self._cache.missing(keys)]
        if len(missing):
            whole = units_of((key, *pair) for key, pair in named.items())  # what is missing does not decide the units
            work = [(self._cache, unit) for unit in missing_of(whole, missing)]
            reasons = self.judge.score(work, self._spec, show)
            self._cache.refresh()
            for reason, count in sorted(reasons.items()):
                say(f"  without a score: {reason} {count:,}", "yellow")
        show.finish(sum(piece.num_pairs for piece in window))
        return by_piece

    def _is_whole(self, piece: _Piece, log_odds: Scores) -> bool:
        """Return whether each pair of a dataset has a finite score. Without it the order is another."""
        num_pairs = _num_pairs(piece.scores, piece.top_k)
        lacking = num_pairs - int(np.isfinite(log_odds).sum())
        if lacking:
            ours = self._bundle.data is not None
            problem = f"{lacking} of {num_pairs} pairs have no finite score of {self.judge.name}"
            error = UserError(piece.name, problem, DAMAGED if ours else "fetch its files again, or check the model")
            if ours:
                raise error
            say(f"  {piece.model}: not re-ranked: {error}", "yellow")
        return not lacking


class _Progress:
    """Counts pairs: those that are scored as they come, all others of a window when it is done."""

    def __init__(self, bars: Bars, total: int, name: str) -> None:
        self._bars, self._total, self._name = bars, total, name
        self._done = self._ahead = 0

    def __call__(self, num_pairs: int) -> None:
        self._ahead += num_pairs
        self._show(self._done + self._ahead)

    def finish(self, num_pairs: int) -> None:
        self._done, self._ahead = self._done + num_pairs, 0
        self._show(self._done)

    def _show(self, done: int) -> None:
        self._bars.update("rerank", min(done, self._total), self._total, unit="pairs", note=self._name)


@dataclass(frozen=True, slots=True)
class _Piece:
    """The shortlists of some queries of a dataset: those from `first` to `last`, without the last.

    The rows of `scores` must be those of the dataset's candidates in their order.
    """

    model: str
    name: str
    scores: DatasetScores
    first: int
    last: int
    top_k: int

    @property
    def num_pairs(self) -> int:
        """Return how many candidates there are."""
        return int((self._rows != NONE).sum())

    @property
    def _rows(self) -> npt.NDArray[np.int64]:
        return self.scores.ranked.rows[self.first : self.last, : self.top_k]

    def keys(self, instructions: bool, named: dict[str, tuple[Item, Item]]) -> Keys:
        """Return the key of each pair, `[q, K]`, empty where there is no candidate. `named` gets their items."""
        rows_QK = self._rows
        items = self.scores.dataset.pick(row for row in np.unique(rows_QK).tolist() if row != NONE)
        keys_QK = np.zeros(rows_QK.shape, "S32")
        for query, row in zip(*(some.tolist() for some in np.nonzero(rows_QK != NONE)), strict=True):
            asked = asked_item(self.scores.dataset.queries[self.first + query].item, instructions=instructions)
            document = items[int(rows_QK[query, row])]
            key = pair_key(asked, document)
            keys_QK[query, row] = key
            named.setdefault(key, (asked, document))
        return keys_QK


def _pieces(scored: ByModel, top_k: int) -> Iterator[_Piece]:
    """Yield the pieces of a dataset of all models next to each other: they share pairs."""
    names = dict.fromkeys(name for some in scored.values() for name in some)
    step = max(1, PAIRS_AT_ONCE // top_k)
    for name in names:
        mine = {model: some[name] for model, some in scored.items() if name in some}
        num_queries = max(len(one.dataset.queries) for one in mine.values())
        for first in range(0, num_queries, step):
            for model, one in mine.items():
                yield _Piece(model, name, one, first, min(first + step, len(one.dataset.queries)), top_k)


def _num_pairs(scores: DatasetScores, top_k: int) -> int:
    return int((scores.ranked.rows[:, :top_k] != NONE).sum())


def choose_weights(spec: EvaluateSpec, tasks: Sequence[str], cache: Store, listings: Store) -> Choices:
    """Return w of each model and task, chosen on the split `rerank.tune`. Needs Ray.

    `tasks` are those of `data`. Those of `tune_tasks` are added. Tasks that the split has no samples of, or that only
    tasks and datasets with a given weight need, are left out.
    """
    settings = spec.rerank
    assert settings is not None
    if settings.tune is None:
        return {}
    data = settings.tune.model_copy(update={"media": spec.data.media if spec.data else spec.media})
    needed = {**{task: task for task in tasks}, **settings.tune_tasks}
    wanted = [*dict.fromkeys(task for name, task in needed.items() if name not in settings.weights)]
    if not wanted:
        return {}
    tune = spec.model_copy(update={"tasks": None, "data": data, "instruction_sensitivity": False})
    bundle = _few_queries(_of_tasks(tune, data, wanted, listings), settings.tune_queries)
    models = models_of(tune, bundle, dict.fromkeys(spec.models, cache))
    scored: dict[str, dict[str, DatasetScores]] = {some.name: {} for some, _ in models}
    for one in score_models(tune, bundle, models):
        assert not isinstance(one, Problem), "those of a split are errors"
        scored[one.model][one.scores.dataset.row.name] = one.scores
    choices: Choices = {}
    for model, shortlist in ShortlistScorer(tune, bundle, models, cache).shortlists(scored):
        name = shortlist.scores.dataset.row.name
        choice = choices.setdefault(model, {})[name] = choose_weight(shortlist)
        place = f"{data.root} {data.split}"
        say(f"  {model}, {name}: w = {choice.weight:g}, chosen on {choice.num_queries:,} queries of {place}")
    return choices


def _of_tasks(spec: EvaluateSpec, data: DataConfig, tasks: Sequence[str], listings: Store) -> Bundle:
    """Return the tasks of the split that weights are chosen on. Raises `UserError` if it has none of them."""
    reader = Reader(data)
    there = {reader.task_of(source) for source in reader.sizes()}
    if not (both := [task for task in tasks if task in there]):
        problem = f"has no samples of {', '.join(tasks)}"
        raise UserError(f"rerank.tune {data.root} {data.split}", problem, "name another split, or set rerank.weights")
    for task in tasks:
        if task not in there:
            say(f"  {task}: no fused scores, because {data.root} {data.split} has no samples of it", "yellow")
    return split_bundle(spec.model_copy(update={"tasks": both}), reader, listings)


def _few_queries(bundle: Bundle, most: int) -> Bundle:
    """Return the datasets with at most so many queries: those with the first ids, which are digests."""

    def few(opened: Callable[[], Dataset]) -> Dataset:
        dataset = opened()
        chosen = sorted(range(len(dataset.queries)), key=lambda place: dataset.queries[place].item.id)[:most]
        return replace(dataset, queries=[dataset.queries[place] for place in sorted(chosen)])

    return replace(bundle, entries=[(row, partial(few, opened)) for row, opened in bundle.entries])
