"""Small adapters of PEFT's own, and what they do, read with nothing of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

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
    """scale * B.A of every module, fp64."""
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


def mean(paths: Mapping[str, Path], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The sum of products with their shares, fp64."""
    total = sum(weights.values())
    return {
        module: sum(weight / total * dense(paths[name])[module] for name, weight in weights.items())
        for module in SHAPES
    }


def error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest of any module, relative to its norm."""
    return max(float((found[m] - expected[m]).norm() / expected[m].norm()) for m in SHAPES)
