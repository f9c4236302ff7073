"""The toy of the chain: every model is trained once, and what must be the same is."""

from __future__ import annotations

import pytest

from pipelines.synthetic.scenes import neighbors
from tests.benchmarks import chain
from tests.benchmarks.chain_bed import Shape, draw_scenes
from tests.benchmarks.chain_cells import TRAINED, Setting, cell_of

TINY = Setting(
    shape=Shape(train_groups=12, test_groups=5, hidden=16, layers=1),
    batch=8,
    large_steps=4,
    small_steps=2,
    stage_steps=2,
    small=8,
    depth=6,
    long_steps=3,
    shortlist=4,
    rerank_steps=2,
    rerank_batch=4,
    rerank_negatives=2,
    lists=8,
    list_length=3,
    list_batch=4,
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> chain.Results:
    """Two seeds, in three commands, of which one was killed while it wrote."""
    folder = tmp_path_factory.mktemp("chain")
    path = folder / "runs.jsonl"
    assert len(chain.do(folder, TINY, range(2), most=3).runs) == 3
    first = path.read_text()
    path.write_text(first + first[:40])
    found = chain.do(folder, TINY, range(2))
    assert path.read_text().startswith(first)
    return found


def test_every_model_is_trained_once_and_in_the_report(results: chain.Results) -> None:
    assert sorted(name for part in chain.PARTS for name in part) == sorted(TRAINED)
    assert len(results.runs) == 2 * len(TRAINED)
    found = chain.report(results)
    for name in (set(TRAINED) | set(chain.ORDERS)) - {"reranker"}:
        assert f"\n| {name} |" in found
    for contrast in chain.CONTRASTS:
        assert f"\n| {contrast.title} | {contrast.first} - {contrast.second} | 2 |" in found


def test_a_re_ranker_orders_the_candidates_of_the_model_that_mined_them(results: chain.Results) -> None:
    assert results.values("reranker", "before") == results.hits("hard")
    assert results.hits("ceiling") == results.values("hard", "found")


def test_the_share_of_a_lead_needs_a_lead() -> None:
    runs = {}
    for seed in range(3):
        for name, hit in (("small", 0.2), ("vectors", 0.3 + 0.01 * seed), ("large", 0.6 + 0.03 * seed)):
            runs[cell_of(TINY, name), seed] = {"hit": hit}
    found = chain.Results(runs, TINY)
    assert found.share("vectors", "small", "large") == "25.6"  # 11 of 43 points
    assert found.share("vectors", "large", "small") == "no lead is shown"


def test_scenes_of_a_seed_all_differ_and_a_group_differs_in_one_attribute() -> None:
    scenes = draw_scenes(3, 40, 4)
    assert len(set(scenes)) == 160
    for number, scene in enumerate(scenes):
        assert number % 4 == 0 or scene in neighbors(scenes[number - number % 4])
