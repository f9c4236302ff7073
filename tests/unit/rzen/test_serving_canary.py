"""Trials of a new model and corpus: which requests they get, when they are trusted, and when they are given up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

import rzen
from pipelines.config import DataConfig
from pipelines.errors import UserError
from rzen.config import ModelIdentity, PromptConfig
from rzen.export.export import ExportOptions, export_model
from rzen.inputs.processor import EncodedBatch
from rzen.serving.canary import CanaryConfig, Trial
from rzen.serving.engine import Engine, EngineSettings
from rzen.serving.follower import Follower, held_out_score, read_held_out
from rzen.serving.served import Place, Served
from rzen.serving.types import EmbedRequest, RequestError, SearchRequest, ServedInput, Vectors
from tests.tiny import TINY, tiny_checkpoint
from tests.vectors import MEDIA, embed_corpus, publish_mixed

QUERIES = [f"caption {number}" for number in range(8)]


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_new_pair_gets_its_share_of_any_requests_in_a_row() -> None:
    trial = Trial(CanaryConfig(fraction=0.3))
    turns = [trial.takes_next() for _ in range(1000)]
    assert {sum(turns[start : start + 10]) for start in range(990)} == {3}
    assert all(Trial(CanaryConfig(fraction=1)).takes_next() for _ in range(3))


@pytest.mark.parametrize(
    ("old", "new", "waited_s", "verdict"),
    [
        ((0, 0), (0, 0), 0, "wait"),
        ((900, 0), (99, 0), 0, "wait"),
        ((900, 0), (100, 0), 0, "adopt"),
        ((900, 0), (0, 0), 60, "adopt"),  # nobody asked
        ((900, 0), (99, 1), 0, "adopt"),  # 1% more is allowed
        ((900, 0), (98, 2), 0, "give up"),
        ((900, 0), (0, 2), 0, "wait"),  # too few to decide at once
        ((900, 0), (0, 3), 0, "give up"),
        ((900, 0), (0, 2), 60, "give up"),
        ((95, 5), (95, 5), 0, "adopt"),  # the old one fails as often
    ],
)
def test_errors_decide_a_trial(old: tuple[int, int], new: tuple[int, int], waited_s: float, verdict: str) -> None:
    clock = Clock()
    trial = Trial(CanaryConfig(requests=100, timeout_s=60), clock)
    trial.old.answered, trial.old.failed = old
    trial.new.answered, trial.new.failed = new
    clock.now_s = waited_s
    assert trial.verdict() == verdict


@dataclass(frozen=True, eq=False)
class Broken(Served):
    """Fails on every input."""

    def embed(self, inputs: Sequence[EncodedBatch]) -> list[Vectors | Exception]:
        return [ArithmeticError("planted") for _ in inputs]


class Breaking(Engine):
    """Loads models that fail on every input."""

    async def prepare(self, place: Place) -> Served:
        served = await super().prepare(place)
        if self._served is None:
            return served
        return Broken(**{one.name: getattr(served, one.name) for one in fields(served)})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models `a` and `b`, and a corpus of each: `vectors-a` and `vectors-b`."""
    root = tmp_path_factory.mktemp("canary")
    publish_mixed(root / "data", 4)
    for seed, name in enumerate("ab"):
        base = tiny_checkpoint(root / f"base-{name}", TINY.model_copy(update={"seed": seed}))
        identity = ModelIdentity(prompt=PromptConfig(max_visual_tokens=16))
        export_model(base, None, root / name, identity, ExportOptions(dtype="float32"))
        model = rzen.load(root / name, media=MEDIA)
        embed_corpus(model, DataConfig(root=str(root / "data"), media=MEDIA), root / f"vectors-{name}")
    return root


def pair(root: Path, name: str) -> Place:
    return Place(str(root / name), corpus=str(root / f"vectors-{name}"))


class Following:
    """An engine that follows a place, which starts at the pair `a`."""

    def __init__(self, root: Path, canary: CanaryConfig | None, kind: type[Engine] = Engine) -> None:
        self.answers: list[tuple[str, bool]] = []
        self.engine = kind(EngineSettings(media=MEDIA), on_answer=lambda *answer: self.answers.append(answer))
        self.place = pair(root, "a")
        self.outcomes: list[str] = []
        self.follower = Follower(self.engine, lambda: self.place, canary, self.outcomes.append)

    async def move(self, place: Place) -> None:
        """Put another pair at the place, and ask until it has been exchanged or given up."""
        self.place = place
        refreshing = asyncio.ensure_future(self.follower.refresh())
        while not refreshing.done():
            with suppress(RequestError):
                await self.engine.embed(EmbedRequest((ServedInput("a red square"),)))
            await asyncio.sleep(0)
        await refreshing

    @property
    def served(self) -> str:
        return Path(self.engine.served.place.model).name


@pytest.fixture
def follow(root: Path) -> Callable[..., Following]:
    """Run a coroutine of a `Following`, and end its engine."""

    def run(test: Callable[[Following], Coroutine[Any, Any, None]], *settings: Any) -> Following:
        async def whole() -> Following:
            following = Following(root, *settings)
            await following.follower.start()
            await test(following)
            return following

        found = asyncio.run(whole())
        found.engine.close()
        return found

    return run


def test_a_pair_that_answers_its_share_is_adopted(root: Path, follow: Callable[..., Following]) -> None:
    async def test(following: Following) -> None:
        before = following.engine.served.version
        await following.move(pair(root, "b"))
        assert all(ok for _, ok in following.answers)
        asked = [version != before for version, _ in following.answers]
        tried = asked[asked.index(True) :]
        assert sum(tried) >= 10
        assert len(tried) == 2 * sum(tried) - 1 + (not tried[-1])  # every second one, from its first on

    found = follow(test, CanaryConfig(fraction=0.5, requests=10))
    assert (found.served, found.outcomes) == ("b", ["ok"])


def test_a_pair_that_fails_is_given_up_and_not_tried_again(root: Path, follow: Callable[..., Following]) -> None:
    async def test(following: Following) -> None:
        before = following.engine.served.version
        await following.move(pair(root, "b"))
        failed = [version for version, ok in following.answers if not ok]
        assert len(failed) == 3  # then it was given up
        assert before not in failed
        await following.follower.refresh()
        following.place = pair(root, "a")  # rolled back
        await following.follower.refresh()

    found = follow(test, CanaryConfig(fraction=0.5, requests=10), Breaking)
    assert (found.served, found.outcomes) == ("a", ["given_up"])


def held_out(root: Path, name: str, folder: Path) -> str:
    """A file with the targets that a model finds first for each query."""
    model = rzen.load(root / name, media=MEDIA)
    lines = []
    for query in QUERIES:
        (hits,) = model.search(str(root / f"vectors-{name}"), [query], top_k=1)
        lines.append({"query": query, "source": hits[0].source, "index": hits[0].index})
    path = folder / "held_out.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return str(path)


@pytest.mark.parametrize(("best", "served", "outcome"), [("a", "a", "given_up"), ("b", "b", "ok")])
def test_held_out_scores_decide_before_a_request(
    root: Path, follow: Callable[..., Following], tmp_path: Path, best: str, served: str, outcome: str
) -> None:
    async def test(following: Following) -> None:
        queries = read_held_out(following.follower._canary.held_out, None)  # type: ignore[union-attr]
        assert await held_out_score(following.engine, following.engine.served, queries) == 1 or best == "b"
        await following.move(pair(root, "b"))

    found = follow(test, CanaryConfig(fraction=1, requests=1, held_out=held_out(root, best, tmp_path)))
    assert (found.served, found.outcomes) == (served, [outcome])
    if best == "a":
        assert len({version for version, _ in found.answers}) == 1  # the worse one answered nobody


def test_a_trial_ends_when_another_pair_is_promoted(
    root: Path, follow: Callable[..., Following], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rzen.serving.follower._LOOK_S", 0.0)

    async def test(following: Following) -> None:
        following.place = pair(root, "b")
        trying = asyncio.ensure_future(following.follower.refresh())
        while following.engine._tried is None:
            await asyncio.sleep(0.01)
        following.place = pair(root, "a")
        await trying

    found = follow(test, CanaryConfig())
    assert (found.served, found.outcomes) == ("a", ["given_up"])


def test_a_pair_that_does_not_belong_together_is_not_used(root: Path, follow: Callable[..., Following]) -> None:
    async def test(following: Following) -> None:
        await following.move(Place(str(root / "b"), corpus=str(root / "vectors-a")))
        found = await following.engine.search(SearchRequest(ServedInput("caption 1")))
        assert found.version == following.engine.served.version

    found = follow(test, None)
    assert (found.served, found.outcomes) == ("a", ["failed"])


def test_a_pair_that_could_not_be_read_is_tried_again(
    root: Path, follow: Callable[..., Following], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreachable(place: Place) -> Served:
        raise OSError("the store does not answer")

    async def test(following: Following) -> None:
        with monkeypatch.context() as down:
            down.setattr(following.engine, "prepare", unreachable)
            await following.move(pair(root, "b"))
        assert following.served == "a"
        await following.follower.refresh()

    found = follow(test, None)
    assert (found.served, found.outcomes) == ("b", ["failed", "ok"])


def test_mistakes_in_held_out_queries_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"query": "x", "source": "photos", "index": 3}\n{"query": "x", "source": "photos"}\n')
    with pytest.raises(UserError, match=r"q\.jsonl:2: has no index"):
        read_held_out(str(path), None)
    assert read_held_out(None, None) == []
