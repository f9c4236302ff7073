"""Souping: the weighted mean of fine-tuned LoRA adapters as one adapter (RzenEmbed, arXiv 2510.27350v1, section 4).

The mean is taken of what adapters do to the model, the products scale * B.A, and is exact. Averaging A and B separately
is something else. Ranks are concatenated, with each weight and scale folded into B:

    [w1 c1 B1 | w2 c2 B2] . [A1 ; A2]  =  w1 c1 B1.A1 + w2 c2 B2.A2

An adapter is a PEFT directory; `rzen.json` beside it, where present, names the base and identity of its training.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipelines.errors import UserError
from rzen.config import ReadoutConfig

WEIGHTS, CONFIG, IDENTITY, LINEAGE = "adapter_model.safetensors", "adapter_config.json", "rzen.json", "soup.json"
FACTORS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class _Adapter:
    path: Path
    weight: float
    config: dict[str, Any]
    identity: dict[str, Any]

    @property
    def rank(self) -> int:
        return int(self.config["r"])

    @property
    def scale(self) -> float:
        """What PEFT multiplies B.A with."""
        divisor = math.sqrt(self.rank) if self.config.get("use_rslora") else self.rank
        return float(self.config["lora_alpha"] / divisor)


def soup_adapters(inputs: Sequence[tuple[Path, float]], out: Path) -> dict[str, Any]:
    """Write the weighted mean of the adapters to the new directory `out`, in fp32; returns its lineage (`soup.json`).

    Weights are positive and are normalised to sum 1. The rank of the soup is the sum of its parents' ranks, its scale
    is 1. Holds the output and one tensor of each parent in memory. Raises `UserError` where the adapters do not belong
    together: another base, other modules or shapes, another prompt, or tensors other than A and B.
    """
    adapters = _read(inputs)
    if out.exists():
        raise UserError(str(out), "exists already", "name a new directory for the soup")
    _check_same(adapters, "base model", lambda a: a.config.get("base_model_name_or_path"))
    _check_same(adapters, "base_sha256", lambda a: a.identity.get("base_sha256"))
    _check_same(adapters, "prompt", lambda a: a.identity.get("prompt"))
    _check_same(adapters, "readout", lambda a: a.identity.get("readout", ReadoutConfig().model_dump()))
    tensors = _concatenate(adapters)
    rank = sum(adapter.rank for adapter in adapters)
    lineage = {
        "method": "exact weighted mean of B.A by concatenation of ranks",
        "rank": rank,
        "parents": [
            {"adapter": str(a.path), "sha256": _sha256(a.path / WEIGHTS), "weight": a.weight, "rank": a.rank}
            for a in adapters
        ],
    }
    plain = {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "use_rslora": False, "inference_mode": True}
    first, *others = (adapter.identity for adapter in adapters)
    identity = {key: value for key, value in first.items() if all(key in o and o[key] == value for o in others)}

    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
    _write_json(partial / CONFIG, {**adapters[0].config, **plain})
    if identity:
        _write_json(partial / IDENTITY, identity)
    _write_json(partial / LINEAGE, lineage)
    partial.rename(out)
    return lineage


def _read(inputs: Sequence[tuple[Path, float]]) -> list[_Adapter]:
    if not inputs:
        raise UserError("soup", "no adapters given", "name at least one adapter and its weight")
    for path, weight in inputs:
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(str(path), f"weight={weight} must be positive and finite", "leave the adapter out instead")
    total = sum(weight for _, weight in inputs)
    adapters = []
    for path, weight in inputs:
        if not (path / WEIGHTS).is_file() or not (path / CONFIG).is_file():
            raise UserError(str(path), "is not an adapter", f"a directory with {CONFIG} and {WEIGHTS} is expected")
        config = json.loads((path / CONFIG).read_text())
        _check_plain(path, config)
        identity = json.loads((path / IDENTITY).read_text()) if (path / IDENTITY).is_file() else {}
        adapters.append(_Adapter(path, weight / total, config, identity))
    return adapters


def _check_plain(path: Path, config: dict[str, Any]) -> None:
    """Refuse what changes the meaning of B.A: ranks per module, and initialisations that also change the base."""
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise UserError(f"{path / CONFIG} {key}", f"{config[key]} is not supported", "use one rank for all modules")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        value = config["init_lora_weights"]
        raise UserError(f"{path / CONFIG} init_lora_weights", f"{value!r} changes the base", "train with true")


def _check_same(adapters: list[_Adapter], what: str, value_of: Any) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        if value_of(first) != value_of(other):
            raise UserError(
                f"{first.path} and {other.path}",
                f"differ in {what}: {value_of(first)!r} and {value_of(other)!r}",
                "soup only adapters of one base, trained and used alike",
            )


def _concatenate(adapters: list[_Adapter]) -> dict[str, Tensor]:
    """The tensors of the soup by name, fp32: A stacked along its rows, weight * scale * B along its columns."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(a.path / WEIGHTS, framework="pt")) for a in adapters]
        names = [set(file.keys()) for file in files]
        for adapter, own_names in zip(adapters, names, strict=True):
            _check_names(adapters[0], names[0], adapter, own_names)
        shapes = [{name: file.get_slice(name).get_shape() for name in names[0]} for file in files]
        for adapter, own_shapes in zip(adapters, shapes, strict=True):
            _check_shapes(adapters[0], shapes[0], adapter, own_shapes)
        return {name: _concatenate_one(adapters, files, name) for name in sorted(names[0])}


def _concatenate_one(adapters: list[_Adapter], files: list[Any], name: str) -> Tensor:
    parts = [file.get_tensor(name).to(torch.float32) for file in files]
    if name.endswith(FACTORS[0]):
        return torch.cat(parts, dim=0).contiguous()
    scaled = [part * (a.weight * a.scale) for a, part in zip(adapters, parts, strict=True)]
    return torch.cat(scaled, dim=1).contiguous()


def _check_names(first: _Adapter, first_names: set[str], other: _Adapter, other_names: set[str]) -> None:
    strange = sorted(name for name in other_names if not name.endswith(FACTORS))
    if strange:
        raise UserError(str(other.path), f"has tensors that a soup cannot mix: {strange[0]}", "use plain LoRA adapters")
    different = sorted(first_names ^ other_names)
    if different:
        raise UserError(
            f"{first.path} and {other.path}",
            f"adapt different modules: only one has {different[0]}",
            "soup only adapters with the same target modules",
        )


def _check_shapes(
    first: _Adapter, first_shapes: dict[str, list[int]], other: _Adapter, other_shapes: dict[str, list[int]]
) -> None:
    for name, shape in sorted(other_shapes.items()):
        rank_axis = FACTORS.index(name[-len(FACTORS[0]) :])
        if shape[rank_axis] != other.rank:
            raise UserError(f"{other.path} {name}", f"has rank {shape[rank_axis]}", f"{CONFIG} says r={other.rank}")
        sizes, first_sizes = list(shape), list(first_shapes[name])
        del sizes[rank_axis], first_sizes[rank_axis]
        if sizes != first_sizes:
            raise UserError(f"{first.path} and {other.path}", f"differ in the size of {name}", "their bases differ")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
