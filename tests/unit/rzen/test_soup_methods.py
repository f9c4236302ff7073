"""Ranks cut down, SLERP, TIES and DARE of adapters, against PEFT and against what is written out here in fp64."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.errors import UserError
from rzen.config import DareSoup, MeanSoup, SlerpSoup, TiesSoup
from rzen.soup.factors import Factors, concatenate, factorise, inner, truncate
from rzen.soup.make import make_soup
from tests.adapters import SHAPES, Tiny, adapter, dense, error, mean

WEIGHTS = {"a": 1.0, "b": 2.5, "c": 0.5}
SHARES = [0.25, 0.625, 0.125]
THIRD = 1 / 3  # of the entries of each module, a whole number
FULL = 7  # the larger side of the largest module: nothing is cut off


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parents")
    ranks = {"a": (4, 8), "b": (8, 4), "c": (8, 16)}
    return {name: adapter(folder / name, rank, alpha, seed=i) for i, (name, (rank, alpha)) in enumerate(ranks.items())}


def by_peft(paths: dict[str, Path], method: str, weights: Sequence[float], rank: int, **options: Any) -> Any:
    """Deltas of PEFT's own weighted adapter."""
    first, *others = paths
    model = PeftModel.from_pretrained(Tiny(), paths[first], adapter_name=first)
    for name in others:
        model.load_adapter(paths[name], name)
    model.add_weighted_adapter(list(paths), list(weights), "soup", method, svd_rank=rank, **options)
    return {m: model.base_model.model.get_submodule(m).get_delta_weight("soup").double() for m in SHAPES}


def cut(delta: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank."""
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_a_lower_rank_is_the_best_there_is_and_tells_its_residual(
    tmp_path: Path, three: dict[str, Path], rank: int
) -> None:
    lineage = make_soup(three, tmp_path / "soup", MeanSoup(weights=WEIGHTS, rank=rank))
    exact, found = mean(three, WEIGHTS), dense(tmp_path / "soup")
    assert error(found, {module: cut(delta, rank) for module, delta in exact.items()}) < 1e-5
    if rank <= 3:  # PEFT fails where a module has fewer inputs or outputs
        assert error(found, by_peft(three, "svd", SHARES, rank)) < 1e-5
    of_module = {module: float((found[module] - exact[module]).norm() / exact[module].norm()) for module in SHAPES}
    worst = max(of_module, key=lambda module: of_module[module])
    assert lineage["largest_residual"]["module"] == f"base_model.model.{worst}"
    assert lineage["largest_residual"]["residual"] == pytest.approx(of_module[worst], rel=1e-4)
    lost = sum(float((found[module] - exact[module]).square().sum()) for module in SHAPES)
    whole = sum(float(delta.square().sum()) for delta in exact.values())
    assert lineage["residual"] == pytest.approx(math.sqrt(lost / whole), rel=1e-4)
    assert lineage["rank"] == json.loads((tmp_path / "soup/adapter_config.json").read_text())["r"] == rank
    shapes = {tuple(tensor.shape) for tensor in load_file(tmp_path / "soup/adapter_model.safetensors").values()}
    assert shapes == {size for out, into in SHAPES.values() for size in ((rank, into), (out, rank))}
    PeftModel.from_pretrained(Tiny(), tmp_path / "soup")


def test_a_rank_above_the_sum_of_ranks_loses_nothing(tmp_path: Path, three: dict[str, Path]) -> None:
    lineage = make_soup(three, tmp_path / "soup", MeanSoup(weights=WEIGHTS, rank=64))
    assert (lineage["rank"], "residual" in lineage) == (20, False)
    assert error(dense(tmp_path / "soup"), mean(three, WEIGHTS)) < 1e-6


def test_what_parents_share_costs_no_rank(tmp_path: Path, three: dict[str, Path]) -> None:
    lineage = make_soup({"a": three["a"], "again": three["a"]}, tmp_path / "soup", MeanSoup(rank=4))
    assert error(dense(tmp_path / "soup"), dense(three["a"])) < 1e-6
    assert lineage["residual"] < 1e-6


def random_factors(out: int, into: int) -> list[Factors]:
    generator = torch.Generator().manual_seed(3)
    return [
        Factors(torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator))
        for rank in (4, 8, 8)
    ]


def written_out(factors: Factors) -> Tensor:
    return factors.b.double() @ factors.a.double()


@pytest.mark.parametrize(("out", "into"), [(40, 30), (30, 40), (9, 40), (40, 9)])
def test_factors_stand_for_the_dense_delta(out: int, into: int) -> None:
    parts = random_factors(out, into)
    exact = sum(share * written_out(part) for share, part in zip(SHARES, parts, strict=True))
    whole = concatenate(parts, SHARES)
    torch.testing.assert_close(written_out(whole), exact, rtol=0, atol=1e-5)
    for one, other in itertools.combinations_with_replacement(parts, 2):
        assert inner(one, other) == pytest.approx(float((written_out(one) * written_out(other)).sum()), rel=1e-4)
    for found in (truncate(whole, 6), factorise(exact.float(), 6)):
        torch.testing.assert_close(written_out(found.factors), cut(exact, 6), rtol=0, atol=1e-4)
        assert found.whole == pytest.approx(float(exact.square().sum()), rel=1e-5)
        assert found.dropped == pytest.approx(float((exact - cut(exact, 6)).square().sum()), rel=1e-4)


def slerp(one: Tensor, other: Tensor, t: float) -> Tensor:
    angle = torch.acos(one @ other / one.norm() / other.norm())
    return (torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * other) / torch.sin(angle)


def flat(deltas: dict[str, Tensor]) -> Tensor:
    return torch.cat([deltas[module].flatten() for module in SHAPES])


def test_slerp_is_that_of_whole_models_one_after_another(tmp_path: Path, three: dict[str, Path]) -> None:
    lineage = make_soup(dict(reversed(three.items())), tmp_path / "soup", SlerpSoup(weights=WEIGHTS))
    a, b, c = (flat(dense(three[name])) for name in "abc")
    expected = slerp(slerp(a, b, 2.5 / 3.5), c, 0.5 / 4)
    found = flat(dense(tmp_path / "soup"))
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    coefficients = [parent["coefficient"] for parent in lineage["parents"]]
    summed = sum(c * delta for c, delta in zip(coefficients, (a, b, c), strict=True))
    assert float((summed - expected).norm() / expected.norm()) < 1e-6
    assert sum(coefficients) > 1.05  # the mean of deltas that point elsewhere is shorter


def test_slerp_keeps_the_length_and_halves_the_angle(tmp_path: Path, three: dict[str, Path]) -> None:
    file = tmp_path / "longer/adapter_model.safetensors"
    (tmp_path / "longer").mkdir()
    for path in three["b"].iterdir():
        (tmp_path / "longer" / path.name).write_bytes(path.read_bytes())
    ratio = float(flat(dense(three["a"])).norm() / flat(dense(three["b"])).norm())
    save_file({n: ratio * t if "lora_B" in n else t for n, t in load_file(file).items()}, file)
    make_soup({"a": three["a"], "b": tmp_path / "longer"}, tmp_path / "soup", SlerpSoup())
    a, b, found = (flat(dense(path)) for path in (three["a"], tmp_path / "longer", tmp_path / "soup"))
    assert float(found.norm()) == pytest.approx(float(a.norm()), rel=1e-5)
    assert float(found @ a) == pytest.approx(float(found @ b), rel=1e-4)


def test_slerp_of_like_deltas_is_their_mean_and_of_opposite_ones_refused(
    tmp_path: Path, three: dict[str, Path]
) -> None:
    make_soup({"a": three["a"], "again": three["a"]}, tmp_path / "soup", SlerpSoup())
    assert error(dense(tmp_path / "soup"), dense(three["a"])) < 1e-6
    config = json.loads((three["a"] / "adapter_config.json").read_text())
    (tmp_path / "opposite").mkdir()
    for name in ("adapter_model.safetensors", "rzen.json"):
        (tmp_path / "opposite" / name).write_bytes((three["a"] / name).read_bytes())
    (tmp_path / "opposite/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": -8}))
    with pytest.raises(UserError, match="opposite things"):
        make_soup({"a": three["a"], "z": tmp_path / "opposite"}, tmp_path / "other", SlerpSoup())


def elected(deltas_POI: Any, weights: Sequence[float], *, by_number: bool = False) -> Any:
    """The end of TIES: a sign for each entry, then the weighted mean of those that have it."""
    sums = np.sign(deltas_POI).sum(0) if by_number else np.einsum("p,poi->oi", weights, deltas_POI)
    agree_POI = np.sign(deltas_POI) == np.where(sums >= 0, 1, -1)
    weight_OI = np.einsum("p,poi->oi", weights, agree_POI)
    return np.einsum("p,poi,poi->oi", weights, deltas_POI, agree_POI) / np.where(weight_OI > 0, weight_OI, 1)


@pytest.mark.parametrize("weights", [WEIGHTS, dict.fromkeys("abc", 1.0)], ids=["unequal", "equal"])
@pytest.mark.parametrize("signs", ["total", "frequency"])
@pytest.mark.parametrize("rank", [3, FULL])
def test_ties_is_ties(tmp_path: Path, three: dict[str, Path], signs: Any, rank: int, weights: dict[str, float]) -> None:
    make_soup(three, tmp_path / "soup", TiesSoup(weights=weights, density=THIRD, signs=signs, rank=rank))
    found, expected = dense(tmp_path / "soup"), {}
    averaging_one = [3 * weights[name] / sum(weights.values()) for name in "abc"]
    for module in SHAPES:
        deltas = [dense(three[name])[module].numpy() for name in "abc"]
        least = [np.sort(np.abs(delta), axis=None)[-round(THIRD * delta.size)] for delta in deltas]
        trimmed = np.stack([np.where(np.abs(d) >= low, d, 0) for d, low in zip(deltas, least, strict=True)])
        merged = elected(trimmed, averaging_one, by_number=signs == "frequency")
        expected[module] = cut(torch.tensor(merged), rank)
    assert error(found, expected) < 1e-5
    if rank < FULL and weights is not WEIGHTS:  # PEFT fails where a module has fewer inputs or outputs
        theirs = by_peft(three, "ties_svd", averaging_one, rank, density=THIRD, majority_sign_method=signs)
        assert error(found, theirs) < 1e-5


def test_ties_of_equal_weights_is_no_smaller_than_what_it_merges(tmp_path: Path, three: dict[str, Path]) -> None:
    """The mean is over the parents that have the sign, not over all of them."""
    lineage = make_soup(dict.fromkeys("xyz", three["a"]), tmp_path / "soup", TiesSoup(density=0.9, rank=FULL))
    kept = float(flat(dense(tmp_path / "soup")).norm() / flat(dense(three["a"])).norm())
    assert 0.99 < kept < 1
    assert lineage["residual"] < 1e-6


@pytest.mark.parametrize("merge", ["linear", "ties"])
def test_dare_drops_by_chance_and_enlarges_the_rest(tmp_path: Path, three: dict[str, Path], merge: Any) -> None:
    """Every entry is that of one of the ways in which the entries of three parents can be dropped."""
    density, config = 0.75, DareSoup(weights=WEIGHTS, density=0.75, merge=merge, rank=FULL)
    make_soup(three, tmp_path / "soup", config)
    kept, entries = 0.0, 0
    for module, found in dense(tmp_path / "soup").items():
        deltas = np.stack([dense(three[name])[module].numpy() for name in "abc"]) / density
        ways = list(itertools.product((0, 1), repeat=3))
        values = []
        for way in ways:
            masked = deltas * np.array(way)[:, None, None]
            linear = np.einsum("p,poi->oi", SHARES, masked)
            values.append(linear if merge == "linear" else elected(masked, SHARES))
        distances = np.abs(np.stack(values) - found.numpy())
        assert distances.min(0).max() < 1e-5
        kept += np.array([sum(way) / 3 for way in ways])[distances.argmin(0)].sum()
        entries += found.numel()
    if merge == "linear":  # of which every way shows
        assert kept / entries == pytest.approx(density, abs=0.1)


def test_dare_is_decided_by_its_seed_alone(tmp_path: Path, three: dict[str, Path]) -> None:
    state = torch.random.get_rng_state()
    files = {}
    for name, seed, parents in (("one", 1, three), ("two", 1, dict(reversed(three.items()))), ("other", 2, three)):
        make_soup(parents, tmp_path / name, DareSoup(seed=seed, rank=FULL))
        files[name] = (tmp_path / name / "adapter_model.safetensors").read_bytes()
    assert files["one"] == files["two"] != files["other"]
    assert torch.equal(torch.random.get_rng_state(), state)
