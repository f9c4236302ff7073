"""Equal contents from stored files to the loss: queries, targets and mined negatives, with values by hand in fp64.

The temperature is kept in fp32, which moves these losses by 1e-4.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipelines.config import DataConfig, MixtureConfig
from pipelines.feed.reader import Reader
from pipelines.plan.build import build_plan
from pipelines.samples import Input, Sample
from pipelines.shards.duplicates import with_duplicates
from pipelines.shards.manifest import Manifest, SourceInfo, publish_manifest
from pipelines.shards.write import write_shard
from pipelines.storage.store import LocalStore
from rzen.config import MinedConfig, ObjectiveConfig, TemperatureConfig
from rzen.inputs.pairs import PairEncoder
from rzen.inputs.processor import Processor
from rzen.objective.loss import Objective
from rzen.training.contrasted import OwnVectors, contrasted_batches
from tests.tiny import PROMPT, tiny_checkpoint

TAU = 0.05
# Query, target and mined negative of each pair. Pairs 0 and 1 ask the same. Pair 4 asks what target 3 is. The mined
# negative of pair 2 is target 0, a right answer of pair 1 too, that of pair 5 the query of pair 4.
TEXTS = [
    ("a dog", "dog one", "a cat"),
    ("a dog", "dog two", "a bird"),
    ("a house", "house", "dog one"),
    ("what is red", "red", "blue"),
    ("red", "scarlet", "green"),
    ("a tree", "tree", "red"),
]
RIGHT = {
    # row: what it is contrasted with, besides its positive
    0: {"house", "red", "scarlet", "tree", "a cat", "a bird", "blue", "green"},
    1: {"house", "red", "scarlet", "tree", "a cat", "a bird", "blue", "green"},
    2: {"dog one", "dog two", "red", "scarlet", "tree", "a cat", "a bird", "blue", "green"},
    3: {"dog one", "dog two", "house", "scarlet", "tree", "a cat", "a bird", "blue", "green"},
    4: {"dog one", "dog two", "house", "tree", "a cat", "a bird", "blue", "green"},
    5: {"dog one", "dog two", "house", "red", "scarlet", "a cat", "a bird", "blue", "green"},
}
TWICE = {2: ["dog one"], 3: ["dog one"], 4: ["dog one"], 5: ["dog one", "red"]}  # as a target and as a mined negative


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def publish(root: Path, instructions: dict[int, str] | None = None) -> None:
    store = LocalStore(root)
    (root / "train/texts").mkdir(parents=True)
    samples = []
    for number, (query, target, negative) in enumerate(TEXTS):
        sample = Sample(f"{number:08d}", "texts", "t", Input(query), Input(target), (Input(negative),))
        samples.append((replace(sample, instruction=(instructions or {}).get(number, "")), {}))
    shard = write_shard(root / "train/texts/texts-000000.tar", samples)
    source = SourceInfo("t", len(samples), (replace(shard, path=f"train/texts/{shard.path}"),))
    publish_manifest(store, with_duplicates(store, Manifest("train", {"texts": source})))


def vector(text: str) -> Tensor:
    """A vector of its own for each text. A query is half way to its answers, as a perfect model has it."""
    answers = [target for query, target, _ in TEXTS if query == text]
    generator = torch.Generator().manual_seed(int.from_bytes(text.encode(), "big") % 2**31)
    own = normalize(torch.randn(64, generator=generator, dtype=torch.float64), dim=0)
    return normalize(torch.stack([own, *map(vector, answers)]).sum(dim=0), dim=0)


def loss_of(root: Path, backbone: str, *, instructions: bool = False) -> float:
    """The loss of one batch of all pairs, read, encoded and collated as in training."""
    data = DataConfig(root=str(root), negatives_per_sample=1, instructions=instructions)
    reader = Reader(data, PairEncoder(Processor(backbone, PROMPT)))
    plan = build_plan(reader.tables(), MixtureConfig(), global_batch=len(TEXTS))
    pairs = reader.batch(plan, 0, 0, 1).batch
    order = [int(key.rpartition("/")[2]) for key in pairs.keys]
    queries, targets, mined = (torch.stack([vector(TEXTS[number][part]) for number in order]) for part in range(3))
    temperature = TemperatureConfig(initial=TAU)
    config = ObjectiveConfig(
        hardness=None, false_negatives=None, mined=MinedConfig(hardness=None), temperature=temperature
    )
    objective = Objective(config, ["t"]).double()
    blocks, vectors = [("t", len(order))], OwnVectors(queries, targets, mined)
    (batch,) = contrasted_batches(vectors, pairs, blocks, needs_queries=False, shares_mined=objective.shares_mined)
    return float(objective(batch, step=0)[0].detach())


def by_hand(right: dict[int, set[str]]) -> float:
    total = 0.0
    for row, others in right.items():
        query, target, _ = TEXTS[row]
        met = [target, *others, *TWICE.get(row, [])]
        scores = torch.stack([vector(query) @ vector(text) for text in met]) / TAU
        total += float(scores.logsumexp(0) - scores[0])
    return total / len(right)


def test_no_right_answer_is_a_negative_from_shards_to_the_loss(tmp_path: Path, backbone: str) -> None:
    publish(tmp_path)
    assert loss_of(tmp_path, backbone) == pytest.approx(by_hand(RIGHT), rel=1e-3)


def test_the_loss_without_ids_would_be_another(tmp_path: Path, backbone: str) -> None:
    """What is masked matters: with every column, the perfect vectors have a loss twice as high."""
    publish(tmp_path)
    everything = {target for _, target, _ in TEXTS} | {negative for *_, negative in TEXTS}
    blind = by_hand({row: everything - {TEXTS[row][1]} for row in range(len(TEXTS))})
    assert blind > 2 * loss_of(tmp_path, backbone)


def test_other_instructions_make_other_queries(tmp_path: Path, backbone: str) -> None:
    """Where instructions are shown, pair 1 asks something else than pair 0, and their targets are negatives again."""
    publish(tmp_path, {1: "Find another one."})
    apart = RIGHT | {0: RIGHT[0] | {"dog two"}, 1: RIGHT[1] | {"dog one"}}
    assert loss_of(tmp_path, backbone) == pytest.approx(by_hand(RIGHT), rel=1e-3)
    shown = loss_of(tmp_path, backbone, instructions=True)
    assert shown > loss_of(tmp_path, backbone) + 0.1
    twice = by_hand(apart)
    # Row 1 meets "dog one" twice: as target 0 and as the mined negative of pair 2.
    row = torch.stack([vector("a dog") @ vector(text) for text in ("dog two", *apart[1], "dog one")]) / TAU
    once = torch.stack([vector("a dog") @ vector(text) for text in ("dog two", *apart[1])]) / TAU
    twice += float(row.logsumexp(0) - once.logsumexp(0)) / len(TEXTS)
    assert shown == pytest.approx(twice, rel=1e-3)
