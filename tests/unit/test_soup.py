from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.errors import UserError
from rzen.soup import soup_adapters

SHAPES = {"tower.0": (6, 5), "tower.2": (7, 6), "head": (3, 7)}
IDENTITY = {"base_sha256": "ab12", "prompt": {"template": "rzen_paper", "max_text_tokens": 2000}}


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 7))
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tower(x))


def adapter(
    path: Path,
    rank: int,
    alpha: int,
    *,
    seed: int,
    targets: tuple[str, ...] = tuple(SHAPES),
    identity: dict[str, Any] | None = IDENTITY,
    base: str | None = None,
    **options: Any,
) -> Path:
    """A real PEFT adapter with random A and B."""
    model = get_peft_model(Tiny(), LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), **options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    if identity is not None:
        (path / "rzen.json").write_text(json.dumps({**identity, "step": seed}))
    return path


def dense(path: Path) -> dict[str, Tensor]:
    """scale * B.A of every module, fp64, read with nothing of ours."""
    config = json.loads((path / "adapter_config.json").read_text())
    divisor = config["r"] ** 0.5 if config["use_rslora"] else config["r"]
    tensors = load_file(path / "adapter_model.safetensors")
    return {
        module: config["lora_alpha"]
        / divisor
        * tensors[f"base_model.model.{module}.lora_B.weight"].double()
        @ tensors[f"base_model.model.{module}.lora_A.weight"].double()
        for module in SHAPES
    }


def mean(*weighted: tuple[Path, float]) -> dict[str, Tensor]:
    total = sum(weight for _, weight in weighted)
    return {module: sum(weight / total * dense(path)[module] for path, weight in weighted) for module in SHAPES}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[m] - expected[m]).norm() / expected[m].norm()) for m in SHAPES)


@pytest.fixture
def three(tmp_path: Path) -> list[tuple[Path, float]]:
    return [
        (adapter(tmp_path / "a", 4, 8, seed=1), 1.0),
        (adapter(tmp_path / "b", 8, 4, seed=2), 2.5),
        (adapter(tmp_path / "c", 8, 16, seed=3, use_rslora=True), 0.5),
    ]


def test_soup_is_the_exact_mean_of_products(tmp_path: Path, three: list[tuple[Path, float]]) -> None:
    soup_adapters(three, tmp_path / "soup")
    assert error(dense(tmp_path / "soup"), mean(*three)) < 1e-6


def test_averaging_factors_is_something_else(tmp_path: Path) -> None:
    parents = [(adapter(tmp_path / str(seed), 4, 4, seed=seed), 1.0) for seed in (1, 2, 3)]
    files = [load_file(path / "adapter_model.safetensors") for path, _ in parents]
    averaged = {
        module: torch.stack([f[f"base_model.model.{module}.lora_B.weight"] for f in files]).mean(0).double()
        @ torch.stack([f[f"base_model.model.{module}.lora_A.weight"] for f in files]).mean(0).double()
        for module in SHAPES
    }
    assert error(averaged, mean(*parents)) > 0.3
    soup_adapters(parents, tmp_path / "soup")
    assert error(dense(tmp_path / "soup"), mean(*parents)) < 1e-6


def test_order_and_size_of_weights_do_not_matter(tmp_path: Path, three: list[tuple[Path, float]]) -> None:
    soup_adapters(three, tmp_path / "soup")
    soup_adapters([(path, 10 * weight) for path, weight in reversed(three)], tmp_path / "reversed")
    assert error(dense(tmp_path / "reversed"), dense(tmp_path / "soup")) < 1e-6


def test_soup_of_one_is_the_adapter(tmp_path: Path, three: list[tuple[Path, float]]) -> None:
    path, _ = three[0]
    soup_adapters([(path, 0.3)], tmp_path / "soup")
    assert error(dense(tmp_path / "soup"), dense(path)) < 1e-6


def test_soup_of_a_soup(tmp_path: Path, three: list[tuple[Path, float]]) -> None:
    soup_adapters(three[:2], tmp_path / "ab")
    soup_adapters([(tmp_path / "ab", 3.5), three[2]], tmp_path / "abc")
    assert error(dense(tmp_path / "abc"), mean(*three)) < 1e-6


def test_peft_loads_and_merges_the_soup(tmp_path: Path, three: list[tuple[Path, float]]) -> None:
    soup_adapters(three, tmp_path / "soup")
    base = {module: Tiny().get_submodule(module).weight.double() for module in SHAPES}
    expected = {module: base[module].detach() + delta for module, delta in mean(*three).items()}
    loaded = PeftModel.from_pretrained(Tiny(), tmp_path / "soup")
    x = torch.randn(4, 5)
    before = loaded(x)
    merged = loaded.merge_and_unload()
    assert error({module: merged.get_submodule(module).weight.detach().double() for module in SHAPES}, expected) < 1e-6
    torch.testing.assert_close(merged(x), before)


def test_lineage_and_identity_are_written(tmp_path: Path, three: list[tuple[Path, float]]) -> None:
    lineage = soup_adapters(three, tmp_path / "soup")
    assert json.loads((tmp_path / "soup/soup.json").read_text()) == lineage
    assert lineage["rank"] == 20
    assert [(p["adapter"], p["weight"], p["rank"]) for p in lineage["parents"]] == [
        (str(tmp_path / "a"), 0.25, 4),
        (str(tmp_path / "b"), 0.625, 8),
        (str(tmp_path / "c"), 0.125, 8),
    ]
    assert json.loads((tmp_path / "soup/rzen.json").read_text()) == IDENTITY  # `step` differs, so it does not survive
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "soup"]


def test_bf16_parents_are_mixed_in_fp32(tmp_path: Path, three: list[tuple[Path, float]]) -> None:
    for path, _ in three:
        file = path / "adapter_model.safetensors"
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    soup_adapters(three, tmp_path / "soup")
    tensors = load_file(tmp_path / "soup/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert error(dense(tmp_path / "soup"), mean(*three)) < 1e-6


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "base": ({"base": "other/base"}, "base model: None and 'other/base'"),
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
    parents = [(adapter(tmp_path / "a", 4, 8, seed=1), 1.0), (adapter(tmp_path / "b", 4, 8, seed=2, **options), 1.0)]
    with pytest.raises(UserError, match=rf"{tmp_path}/a and {tmp_path}/b: .*{problem}"):
        soup_adapters(parents, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


ALONE: dict[str, tuple[dict[str, Any], str]] = {
    "rank pattern": ({"rank_pattern": {"head": 2}}, "rank_pattern.*use one rank"),
    "dora": ({"use_dora": True}, "cannot mix.*lora_magnitude_vector"),
    "bias": ({"bias": "lora_only"}, "cannot mix.*bias"),
    "pissa": ({"init_lora_weights": "pissa"}, "changes the base"),
}


@pytest.mark.parametrize(("options", "problem"), ALONE.values(), ids=ALONE)
def test_adapters_that_are_not_plain_are_refused(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        soup_adapters([(adapter(tmp_path / "a", 4, 8, seed=1, **options), 1.0)], tmp_path / "soup")


def test_shapes_of_another_base_are_refused(tmp_path: Path, three: list[tuple[Path, float]]) -> None:
    file = three[1][0] / "adapter_model.safetensors"
    name = "base_model.model.head.lora_B.weight"
    save_file({**load_file(file), name: torch.zeros(4, 8)}, file)
    with pytest.raises(UserError, match=rf"differ in the size of {name}"):
        soup_adapters(three, tmp_path / "soup")


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_must_be_positive(tmp_path: Path, three: list[tuple[Path, float]], weight: float) -> None:
    with pytest.raises(UserError, match="must be positive and finite"):
        soup_adapters([three[0], (three[1][0], weight)], tmp_path / "soup")


def test_missing_inputs_and_existing_output_are_refused(tmp_path: Path, three: list[tuple[Path, float]]) -> None:
    with pytest.raises(UserError, match="no adapters given"):
        soup_adapters([], tmp_path / "soup")
    with pytest.raises(UserError, match="is not an adapter"):
        soup_adapters([(tmp_path, 1.0)], tmp_path / "soup")
    with pytest.raises(UserError, match="exists already"):
        soup_adapters(three, three[0][0])
