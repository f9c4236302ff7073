"""The mean of adapters, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from pipelines.errors import UserError
from rzen.config import GreedySoup, MeanSoup, SearchedSoup, SlerpSoup, TiesSoup
from rzen.soup.make import make_soup, total_weight
from rzen.soup.select import Selection
from tests.adapters import IDENTITY, SHAPES, Tiny, adapter, dense, error, mean

WEIGHTS = {"a": 1.0, "b": 2.5, "c": 0.5}
MEAN = MeanSoup(weights=WEIGHTS)


@pytest.fixture
def three(tmp_path: Path) -> dict[str, Path]:
    return {
        "a": adapter(tmp_path / "a", 4, 8, seed=1),
        "b": adapter(tmp_path / "b", 8, 4, seed=2),
        "c": adapter(tmp_path / "c", 8, 16, seed=3, use_rslora=True),
    }


def test_soup_is_the_exact_mean_of_products(tmp_path: Path, three: dict[str, Path]) -> None:
    make_soup(three, tmp_path / "soup", MEAN)
    assert error(dense(tmp_path / "soup"), mean(three, WEIGHTS)) < 1e-6


def test_averaging_factors_is_something_else(tmp_path: Path) -> None:
    parents = {str(seed): adapter(tmp_path / str(seed), 4, 4, seed=seed) for seed in (1, 2, 3)}
    files = [load_file(path / "adapter_model.safetensors") for path in parents.values()]
    averaged = {
        module: torch.stack([f[f"base_model.model.{module}.lora_B.weight"] for f in files]).mean(0).double()
        @ torch.stack([f[f"base_model.model.{module}.lora_A.weight"] for f in files]).mean(0).double()
        for module in SHAPES
    }
    expected = mean(parents, dict.fromkeys(parents, 1.0))
    assert error(averaged, expected) > 0.3
    make_soup(parents, tmp_path / "soup", MeanSoup())
    assert error(dense(tmp_path / "soup"), expected) < 1e-6


def test_neither_order_nor_size_of_weights_matters(tmp_path: Path, three: dict[str, Path]) -> None:
    make_soup(three, tmp_path / "soup", MEAN)
    tenfold = MeanSoup(weights={name: 10 * WEIGHTS[name] for name in reversed(WEIGHTS)})
    make_soup(dict(reversed(three.items())), tmp_path / "reversed", tenfold)
    assert error(dense(tmp_path / "reversed"), dense(tmp_path / "soup")) < 1e-6


def test_parents_without_a_weight_are_left_out(tmp_path: Path, three: dict[str, Path]) -> None:
    lineage = make_soup(three, tmp_path / "soup", MeanSoup(weights={"a": 1.0, "c": 3.0}))
    assert error(dense(tmp_path / "soup"), mean(three, {"a": 1.0, "c": 3.0})) < 1e-6
    assert lineage["rank"] == 12
    with pytest.raises(UserError, match="'d' is none of a, b, c"):
        make_soup(three, tmp_path / "other", MeanSoup(weights={"a": 1.0, "d": 1.0}))


@pytest.mark.parametrize("config", [MeanSoup(weights={"b": 0.3}), SlerpSoup(weights={"b": 2.0}), GreedySoup()])
def test_soup_of_one_is_the_adapter(tmp_path: Path, three: dict[str, Path], config: Any) -> None:
    selection = Selection({"b": 1.0}, 0.5, []) if config.method == "greedy" else None
    make_soup(three, tmp_path / "soup", config, selection=selection)
    assert error(dense(tmp_path / "soup"), dense(three["b"])) < 1e-6


def test_a_soup_takes_in_one_more_and_is_the_mean_over_all(tmp_path: Path, three: dict[str, Path]) -> None:
    """Twice, so that the weight of a soup of a soup counts too."""
    make_soup({"a": three["a"]}, tmp_path / "one", MeanSoup(weights={"a": WEIGHTS["a"]}))
    for name, old, new in (("b", "one", "two"), ("c", "two", "all")):
        weights = {"soup": total_weight(tmp_path / old), name: WEIGHTS[name]}
        lineage = make_soup({"soup": tmp_path / old, name: three[name]}, tmp_path / new, MeanSoup(weights=weights))
    assert total_weight(tmp_path / "all") == 4.0
    assert error(dense(tmp_path / "all"), mean(three, WEIGHTS)) < 1e-6
    assert lineage["parents"][1]["soup"]["parents"][0]["name"] == "b"  # descent is kept to the end


def test_a_selected_soup_weighs_as_many_as_it_kept(tmp_path: Path, three: dict[str, Path]) -> None:
    kept = {"a": 0.25, "b": 0.75}
    chosen = Selection(kept, 0.7, [{"weights": kept, "score": 0.7}])
    lineage = make_soup(three, tmp_path / "soup", SearchedSoup(), selection=chosen, scores={"a": 0.6, "c": 0.1})
    assert error(dense(tmp_path / "soup"), mean(three, kept)) < 1e-6
    assert total_weight(tmp_path / "soup") == 2.0
    assert (lineage["score"], lineage["trace"], lineage["scores"]) == (0.7, chosen.trace, {"a": 0.6, "c": 0.1})
    with pytest.raises(UserError, match="method searched: has no scores to choose by"):
        make_soup(three, tmp_path / "other", SearchedSoup())


def test_only_means_have_a_weight(tmp_path: Path, three: dict[str, Path]) -> None:
    make_soup(three, tmp_path / "soup", TiesSoup())
    for folder in (three["a"], tmp_path / "soup"):
        with pytest.raises(UserError, match="is no soup that says what it weighs"):
            total_weight(folder)


def test_peft_loads_and_merges_the_soup(tmp_path: Path, three: dict[str, Path]) -> None:
    make_soup(three, tmp_path / "soup", MEAN)
    base = {module: Tiny().get_submodule(module).weight.double() for module in SHAPES}
    expected = {module: base[module].detach() + delta for module, delta in mean(three, WEIGHTS).items()}
    loaded = PeftModel.from_pretrained(Tiny(), tmp_path / "soup")
    x = torch.randn(4, 5)
    before = loaded(x)
    merged = loaded.merge_and_unload()
    assert error({module: merged.get_submodule(module).weight.detach().double() for module in SHAPES}, expected) < 1e-6
    torch.testing.assert_close(merged(x), before)


def test_lineage_and_identity_are_written(tmp_path: Path, three: dict[str, Path]) -> None:
    lineage = make_soup(three, tmp_path / "soup", MEAN)
    assert json.loads((tmp_path / "soup/soup.json").read_text()) == lineage
    assert lineage["settings"] == {"method": "mean", "weights": WEIGHTS, "rank": None}
    assert (lineage["rank"], lineage["total_weight"]) == (20, 4.0)
    assert [(p["name"], p["place"], p["weight"], p["coefficient"], p["rank"]) for p in lineage["parents"]] == [
        ("a", str(tmp_path / "a"), 1.0, 0.25, 4),
        ("b", str(tmp_path / "b"), 2.5, 0.625, 8),
        ("c", str(tmp_path / "c"), 0.5, 0.125, 8),
    ]
    assert len({parent["sha256"] for parent in lineage["parents"]}) == 3
    assert json.loads((tmp_path / "soup/rzen.json").read_text()) == IDENTITY  # `step` differs, so it does not survive
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "soup"]


def test_bf16_parents_are_mixed_in_fp32(tmp_path: Path, three: dict[str, Path]) -> None:
    for path in three.values():
        file = path / "adapter_model.safetensors"
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    make_soup(three, tmp_path / "soup", MEAN)
    tensors = load_file(tmp_path / "soup/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert error(dense(tmp_path / "soup"), mean(three, WEIGHTS)) < 1e-6


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "base bytes": ({"identity": {**IDENTITY, "base_sha256": "cd34"}}, "base_sha256: 'ab12' and 'cd34'"),
    "unknown base bytes": ({"identity": None}, "base_sha256: 'ab12' and None"),
    "readout": ({"identity": {**IDENTITY, "readout": {"pooling": "mean"}}}, "readout: .*last_token.* and .*mean"),
    "prompt": ({"identity": {**IDENTITY, "prompt": {"template": "plain"}}}, "prompt: .*rzen_paper.* and .*plain"),
    "modules": ({"targets": ("tower.0", "head")}, "different modules: only one has .*tower.2.lora_A.weight"),
}


@pytest.mark.parametrize(("options", "problem"), OTHERS.values(), ids=OTHERS)
def test_adapters_that_do_not_belong_together_are_refused(
    tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    parents = {"a": adapter(tmp_path / "a", 4, 8, seed=1), "b": adapter(tmp_path / "b", 4, 8, seed=2, **options)}
    with pytest.raises(UserError, match=rf"{tmp_path}/a and {tmp_path}/b: .*{problem}"):
        make_soup(parents, tmp_path / "soup", MeanSoup())
    assert not (tmp_path / "soup").exists()


def test_a_base_is_told_by_its_bytes_and_else_by_its_name(tmp_path: Path) -> None:
    for identity, known in ((IDENTITY, True), (None, False)):
        options = {"seed": 1, "identity": identity}
        parents = {base: adapter(tmp_path / f"{known}" / base, 4, 8, base=base, **options) for base in ("one", "two")}
        if known:
            make_soup(parents, tmp_path / "soup", MeanSoup())
            continue
        with pytest.raises(UserError, match="base model: 'one' and 'two'"):
            make_soup(parents, tmp_path / "other", MeanSoup())


ALONE: dict[str, tuple[dict[str, Any], str]] = {
    "rank pattern": ({"rank_pattern": {"head": 2}}, "rank_pattern.*use one rank"),
    "dora": ({"use_dora": True}, "cannot mix.*lora_magnitude_vector"),
    "bias": ({"bias": "lora_only"}, "cannot mix.*bias"),
    "pissa": ({"init_lora_weights": "pissa"}, "changes the base"),
}


@pytest.mark.parametrize(("options", "problem"), ALONE.values(), ids=ALONE)
def test_adapters_that_are_not_plain_are_refused(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        make_soup({"a": adapter(tmp_path / "a", 4, 8, seed=1, **options)}, tmp_path / "soup", MeanSoup())


def test_shapes_of_another_base_are_refused(tmp_path: Path, three: dict[str, Path]) -> None:
    file = three["b"] / "adapter_model.safetensors"
    name = "base_model.model.head.lora_B.weight"
    save_file({**load_file(file), name: torch.zeros(4, 8)}, file)
    with pytest.raises(UserError, match=rf"differ in the size of {name}"):
        make_soup(three, tmp_path / "soup", MeanSoup())


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("config", [MeanSoup(), MeanSoup(rank=4), SlerpSoup(), TiesSoup()], ids=lambda c: c.method)
def test_numbers_that_are_not_finite_are_refused(
    tmp_path: Path, three: dict[str, Path], config: Any, bad: float
) -> None:
    file = three["c"] / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.tower.2.lora_A.weight"][3, 2] = bad
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"c/adapter_model.safetensors .*tower.2.lora_A.weight: holds NaN or infinity"):
        make_soup(three, tmp_path / "soup", config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]  # nothing half done is left


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, three: dict[str, Path]) -> None:
    file = three["b"] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        make_soup(three, tmp_path / "soup", MeanSoup())


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_must_be_positive_and_finite(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weights\.b"):
        MeanSoup(weights={"a": 1.0, "b": weight})


def test_missing_inputs_and_existing_output_are_refused(tmp_path: Path, three: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="has no parents"):
        make_soup({}, tmp_path / "soup", MeanSoup())
    with pytest.raises(UserError, match="is neither an adapter nor a checkpoint"):
        make_soup({"a": tmp_path}, tmp_path / "soup", MeanSoup())
    with pytest.raises(UserError, match="a is an adapter and d is not"):
        make_soup({**three, "d": tmp_path}, tmp_path / "soup", MeanSoup())
    with pytest.raises(UserError, match="adapters need none"):
        make_soup(three, tmp_path / "soup", TiesSoup(), base=tmp_path)
    with pytest.raises(UserError, match="exists already"):
        make_soup(three, three["a"], MeanSoup())
