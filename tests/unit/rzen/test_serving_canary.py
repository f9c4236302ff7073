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
from rzen.serving.canary import CanaryConfig, Counts, Outcomes, Ruling, Trial, TrialCoordinator, Verdict
from rzen.serving.engine import Engine, EngineSettings
from rzen.serving.follower import Follower, held_out_score, read_held_out
from rzen.serving.place import Place, TaggedPlace
from rzen.serving.served import Served
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
    trials, clock = coordinator()
    begin(trials, "b")
    clock.now_s = waited_s
    assert report(trials, "b", "one", old, new) == verdict


A = TaggedPlace(Place("model"), "a")
"""A pair that is trusted."""


def coordinator() -> tuple[TrialCoordinator, Clock]:
    clock = Clock()
    trials = TrialCoordinator(CanaryConfig(requests=100, timeout_s=60), clock)
    assert asyncio.run(trials.start(A)) == A
    return trials, clock


def at(tag: str) -> TaggedPlace:
    return TaggedPlace(Place("model"), tag)


def see(trials: TrialCoordinator, tag: str, known: Verdict = "wait", used: TaggedPlace = A) -> Verdict:
    return asyncio.run(trials.see(at(tag), used, known))


def begin(trials: TrialCoordinator, tag: str) -> None:
    assert see(trials, tag) == "wait"
    assert report(trials, tag, "one", (0, 0), (0, 0)) == "wait"


def report(trials: TrialCoordinator, tag: str, replica: str, old: tuple[int, int], new: tuple[int, int]) -> str:
    return ruling(trials, tag, replica, old, new).verdict


def ruling(trials: TrialCoordinator, tag: str, replica: str, old: tuple[int, int], new: tuple[int, int]) -> Ruling:
    return asyncio.run(trials.report(at(tag), replica, Counts(Outcomes(*old), Outcomes(*new))))


def test_the_answers_of_all_replicas_decide_together() -> None:
    trials, _ = coordinator()
    begin(trials, "b")
    assert report(trials, "b", "one", (500, 0), (60, 0)) == "wait"
    heard = ruling(trials, "b", "two", (90, 0), (38, 1))
    assert heard == Ruling("wait", Counts(Outcomes(500, 0), Outcomes(60, 0)))
    assert report(trials, "b", "two", (90, 0), (39, 1)) == "adopt"  # 1 of 100
    assert report(trials, "b", "one", (500, 0), (60, 9)) == "adopt"  # a decision stays
    assert asyncio.run(trials.start(at("b"))).tag == "b"

    trials, _ = coordinator()
    begin(trials, "b")
    assert report(trials, "b", "one", (500, 0), (60, 0)) == "wait"
    assert report(trials, "b", "two", (90, 0), (0, 3)) == "give up"  # only one replica has seen errors
    assert report(trials, "b", "one", (500, 0), (97, 0)) == "give up"
    assert see(trials, "b") == "give up"  # of a replica that comes later
    assert asyncio.run(trials.start(at("b"))) == A


def test_a_pair_has_a_new_trial_when_it_comes_back() -> None:
    trials, _ = coordinator()
    begin(trials, "b")
    asyncio.run(trials.give_up(at("b")))
    assert see(trials, "b", known="give up") == "give up"
    assert see(trials, "a") == "adopt"  # rolled back
    assert report(trials, "b", "one", (9, 0), (9, 0)) == "moved"
    assert see(trials, "b", known="give up") == "wait"
    assert report(trials, "b", "one", (9, 0), (100, 0)) == "adopt"


def test_replicas_tell_a_coordinator_that_starts_again_what_was_decided() -> None:
    config = CanaryConfig(requests=100)
    trials = TrialCoordinator(config)
    assert see(trials, "b", known="give up") == "give up"
    assert asyncio.run(trials.start(at("b"))) == A
    trials = TrialCoordinator(config)
    assert see(trials, "b", used=at("b")) == "adopt"
    trials = TrialCoordinator(config)
    assert report(trials, "b", "one", (9, 0), (60, 0)) == "wait"  # counts are those of the whole trial
    assert report(trials, "b", "two", (9, 0), (40, 0)) == "adopt"


def test_a_replica_pauses_the_new_pair_while_all_answers_are_too_bad() -> None:
    trial = Trial(CanaryConfig(fraction=1))
    trial.counts.new.failed = 2
    assert trial.takes_next()
    trial.others = Counts(new=Outcomes(0, 1))
    assert not trial.takes_next()
    trial.others = Counts(new=Outcomes(300, 1))
    assert trial.takes_next()


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

    def __init__(
        self,
        root: Path,
        canary: CanaryConfig | None,
        kind: type[Engine] = Engine,
        trials: TrialCoordinator | None = None,
    ) -> None:
        self.answers: list[tuple[str, bool]] = []
        self.engine = kind(EngineSettings(media=MEDIA), on_answer=lambda *answer: self.answers.append(answer))
        self.place = pair(root, "a")
        self.outcomes: list[str] = []
        self.follower = Follower(self.engine, lambda: self.place, canary, self.outcomes.append, trials)

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


def test_replicas_give_a_pair_up_together_and_later_ones_start_without_it(
    root: Path, follow: Callable[..., Following]
) -> None:
    canary = CanaryConfig(fraction=0.5, requests=10_000)
    trials = TrialCoordinator(canary)

    async def test(healthy: Following) -> None:
        broken, late = (Following(root, canary, kind, trials) for kind in (Breaking, Engine))
        await broken.follower.start()
        await asyncio.gather(healthy.move(pair(root, "b")), broken.move(pair(root, "b")))
        assert all(ok for _, ok in healthy.answers)
        assert len({version for version, _ in healthy.answers}) == 2  # it has tried the pair
        assert (broken.served, broken.outcomes) == ("a", ["given_up"])
        late.place = pair(root, "b")
        await late.follower.start()
        assert late.served == "a"
        await late.follower.refresh()
        assert (late.served, late.outcomes) == ("a", ["given_up"])
        for one in (broken, late):
            one.engine.close()

    found = follow(test, canary, Engine, trials)
    assert (found.served, found.outcomes) == ("a", ["given_up"])


def test_a_replica_that_looks_later_takes_over_what_was_decided(root: Path, follow: Callable[..., Following]) -> None:
    canary = CanaryConfig(fraction=0.5, requests=10)
    trials = TrialCoordinator(canary)

    async def test(first: Following) -> None:
        late, failing = (Following(root, canary, Engine, trials) for _ in range(2))
        await late.follower.start()
        await failing.follower.start()
        failing.place = Place(str(root / "b"), corpus=str(root / "vectors-a"))  # of another tag, and it does not fit
        await failing.follower.refresh()
        await first.move(pair(root, "b"))
        await late.move(pair(root, "b"))
        assert (late.served, late.outcomes) == ("b", ["ok"])
        asked = [version == late.engine.served.version for version, _ in late.answers]
        assert asked == sorted(asked), "it took the pair over without a trial"
        failing.place = pair(root, "b")
        await failing.follower.refresh()
        assert (failing.served, failing.outcomes) == ("b", ["failed", "ok"])
        for one in (late, failing):
            one.engine.close()

    found = follow(test, canary, Engine, trials)
    assert (found.served, found.outcomes) == ("b", ["ok"])


def test_a_pair_that_one_replica_could_not_load_is_loaded_once_others_adopt_it(
    root: Path, follow: Callable[..., Following], monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = CanaryConfig(fraction=0.5, requests=10)
    trials = TrialCoordinator(canary)

    async def no_memory(place: Place) -> Served:
        raise MemoryError("no memory for both")

    async def test(one: Following) -> None:
        other = Following(root, canary, Engine, trials)
        await other.follower.start()
        with monkeypatch.context() as full:
            full.setattr(one.engine, "prepare", no_memory)
            await one.move(pair(root, "b"))
        await one.follower.refresh()  # not tried again before it is adopted
        assert (one.served, one.outcomes) == ("a", ["failed"])
        await other.move(pair(root, "b"))
        await one.follower.refresh()
        other.engine.close()

    found = follow(test, canary, Engine, trials)
    assert (found.served, found.outcomes) == ("b", ["failed", "ok"])


class Unreachable(TrialCoordinator):
    """Does not answer the first times that it is asked."""

    asked = 0

    def _fail(self) -> None:
        self.asked += 1
        if self.asked <= 3:
            raise ConnectionError("planted")

    async def start(self, found: TaggedPlace) -> TaggedPlace:
        self._fail()
        return await super().start(found)

    async def see(self, found: TaggedPlace, used: TaggedPlace, known: Verdict) -> Verdict:
        self._fail()
        return await super().see(found, used, known)

    async def report(self, found: TaggedPlace, replica: str, counts: Counts) -> Ruling:
        assert self.asked >= 3, "nothing was adopted before"
        self._fail()
        return await super().report(found, replica, counts)


def test_a_coordinator_that_does_not_answer_delays_a_decision(root: Path, follow: Callable[..., Following]) -> None:
    canary = CanaryConfig(fraction=0.5, requests=10)
    trials = Unreachable(canary)

    async def test(following: Following) -> None:
        await following.move(pair(root, "b"))

    found = follow(test, canary, Engine, trials)
    assert (found.served, found.outcomes) == ("b", ["ok"])
    assert len({version for version, _ in found.answers}) == 2, "it had its trial"


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
