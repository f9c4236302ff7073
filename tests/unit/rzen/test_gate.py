from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rzen.evaluation.gate import Verdict, judge

RNG = np.random.default_rng(0)
CHAMPION = {"image": (RNG.random(400) < 0.5).astype(float), "page": (RNG.random(200) < 0.3).astype(float)}


def improved(task: str, by: int, **scores: Any) -> dict[str, Any]:
    """The champion's scores with `by` more queries of a task right, or fewer."""
    changed = {name: values.copy() for name, values in (CHAMPION | scores).items()}
    where = np.flatnonzero(changed[task] == (by < 0))[: abs(by)]
    changed[task][where] = float(by > 0)
    return changed


def verdict(candidate: Any, champion: Any = CHAMPION, **gate: Any) -> Verdict:
    rules = {"min_gain": 0.0, "max_drop": 0.02, "minimum": {}, "draws": 2000} | gate
    return judge(champion, candidate, **rules)


def test_a_clear_gain_is_promoted_and_the_same_model_is_not() -> None:
    good = verdict(improved("image", 40))
    assert good.promote
    assert good.scores["image"]["difference"]["mean"] == pytest.approx(0.1)
    assert good.scores["mean"]["difference"]["mean"] == pytest.approx(0.05)
    same = verdict(CHAMPION)
    assert not same.promote
    assert same.reasons == ["mean gain +0.0000, 95% interval +0.0000 to +0.0000, not all above 0.0"]


def test_a_gain_that_chance_may_have_made_is_refused() -> None:
    few = verdict(improved("image", 2))
    assert not few.promote
    assert few.scores["mean"]["difference"]["low"] <= 0 < few.scores["mean"]["difference"]["mean"]


def test_no_modality_pays_for_another() -> None:
    mixed = improved("page", -10, image=improved("image", 120)["image"])
    refused = verdict(mixed)
    assert (refused.promote, refused.reasons) == (False, ["page loses 0.050, more than 0.02"])
    assert verdict(mixed, max_drop=0.06).promote


def test_the_first_model_needs_no_champion_but_the_minimum() -> None:
    assert verdict(CHAMPION, champion=None).promote
    weak = verdict(CHAMPION, champion=None, minimum={"page": 0.9, "sound": 0.1})
    assert not weak.promote
    assert weak.reasons == [f"page scores {CHAMPION['page'].mean():.3f}, less than 0.9", "sound has no score"]


@pytest.mark.parametrize("champion", [None, {"image": np.zeros(3), "page": np.zeros(100)}])
def test_three_queries_decide_nothing(champion: Any) -> None:
    """Right against wrong for all three would otherwise be a gain with an interval of no width."""
    found = verdict({"image": np.ones(3), "page": np.ones(100)}, champion=champion)
    assert not found.promote
    assert found.reasons == ["image has 3 queries, fewer than 100: too few to decide"]
    assert verdict({"image": np.ones(3), "page": np.ones(100)}, champion=champion, min_queries=3).promote


def test_better_means_better_by_more_than_asked() -> None:
    assert not verdict(improved("image", 40), min_gain=0.05).promote
