"""Fine-tunes on disk, adapters or full checkpoints, and what they must have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipelines.errors import UserError
from pipelines.stored_json import read_json
from rzen.config import ReadoutConfig
from rzen.model.checkpoints import (
    MODEL_CONFIG,
    WRITERS_NOTES,
    AdapterFile,
    checkpoint_sha256,
    read_identity_file,
    weight_files,
)
from rzen.model.lora import CONFIG, WEIGHTS
from rzen.soup.factors import Factors
from rzen.soup.tensors import Tensors

FACTORS = (".lora_A.weight", ".lora_B.weight")
LINEAGE = "soup.json"


@dataclass(frozen=True)
class Parent:
    """A fine-tune under the name that the job gives it."""

    name: str
    path: Path
    config: dict[str, Any]
    identity: dict[str, Any]
    tensors: Tensors

    @property
    def base_sha256(self) -> str | None:
        """Return the hash of the weights that it was fine-tuned from, where it says."""
        lineage: dict[str, Any] = self.identity.get("lineage", {})
        return self.identity.get("base_sha256") or lineage.get("base_sha256")

    @property
    def sha256(self) -> str:
        """Return the `checkpoint_sha256`. Reads the weights."""
        return checkpoint_sha256(self.path)


@dataclass(frozen=True)
class Adapter(Parent):
    """A PEFT directory. Its `rzen.json`, where present, names the base and identity of its training."""

    @property
    def rank(self) -> int:
        """Return the rank, which is one for all modules."""
        return int(self.config["r"])

    @property
    def scale(self) -> float:
        """Return the factor that PEFT multiplies B.A with."""
        divisor = math.sqrt(self.rank) if self.config.get("use_rslora") else self.rank
        return float(self.config["lora_alpha"] / divisor)

    def factors(self, module: str) -> Factors:
        """Return the factors of one module, fp32, scale in B. Raises `UserError` for numbers that are not finite."""
        a_RI, b_OR = (self.tensors.read(module + factor).to(torch.float32) for factor in FACTORS)
        return Factors(a_RI, self.scale * b_OR)


@dataclass(frozen=True)
class Checkpoint(Parent):
    """A directory that AutoModel loads, in one file or in shards."""


def open_parents(paths: Mapping[str, Path]) -> Sequence[Parent]:
    """Open all parents, in the order of `paths`, without reading weights.

    Raises `UserError` for what is neither adapter nor checkpoint, and for a mix of both. Raises it for parents that do
    not belong together: they differ in base, modules, shapes, prompt or readout, or are not plain adapters.
    """
    adapters = [name for name, path in paths.items() if (path / CONFIG).is_file()]
    if adapters and len(adapters) < len(paths):
        other = next(name for name in paths if name not in adapters)
        problem = f"{adapters[0]} is an adapter and {other} is not"
        raise UserError(" and ".join((adapters[0], other)), problem, "export all fine-tunes first, or none")
    if adapters:
        found = [_open_adapter(name, path) for name, path in paths.items()]
        _check_alike(found)
        _check_adapters(found)
        return found
    checkpoints = [open_checkpoint(name, path) for name, path in paths.items()]
    _check_alike(checkpoints)
    for key in sorted(set().union(*map(_architecture, checkpoints))):
        _check_same(checkpoints, f"{MODEL_CONFIG} {key}", partial(_setting, key))
    for checkpoint in checkpoints[1:]:
        _check_layout(checkpoints[0], checkpoint)
    return checkpoints


def open_checkpoint(name: str, path: Path) -> Checkpoint:
    """Open a checkpoint. Raises `UserError` where `path` holds none, or one that is not in safetensors files."""
    if not (path / MODEL_CONFIG).is_file():
        expected = f"a directory with {CONFIG} and {WEIGHTS}, or with {MODEL_CONFIG} and *.safetensors, is expected"
        raise UserError(str(path), "is neither an adapter nor a checkpoint", expected)
    files = weight_files(path)
    if files[0].suffix != ".safetensors":
        raise UserError(str(files[0]), "is not a safetensors file", "export the model, and soup the export")
    return Checkpoint(name, path, _read_json(path / MODEL_CONFIG), {**read_identity_file(path)}, Tensors(files))


def _open_adapter(name: str, path: Path) -> Adapter:
    if not (path / WEIGHTS).is_file():
        raise UserError(str(path), f"has no {WEIGHTS}", f"a directory with {CONFIG} and {WEIGHTS} is expected")
    config = {**read_json(path / CONFIG, AdapterFile)}
    _check_plain(path, config)
    return Adapter(name, path, config, {**read_identity_file(path)}, Tensors([path / WEIGHTS]))


def _check_plain(path: Path, config: dict[str, Any]) -> None:
    """Refuse what is no product B.A: other methods, ranks per module, initializations that also change the base."""
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise UserError(f"{path / CONFIG} peft_type", f"{kind} is not supported", "use LoRA")
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise UserError(f"{path / CONFIG} {key}", f"{config[key]} is not supported", "use one rank for all modules")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        value = config["init_lora_weights"]
        raise UserError(f"{path / CONFIG} init_lora_weights", f"{value!r} changes the base", "train with true")


def _check_alike(parents: Sequence[Parent]) -> None:
    """Refuse parents of different bases (by hash, or by name where none has a hash), prompts or readouts."""
    _check_bases(parents)
    if all(parent.base_sha256 is None for parent in parents):
        _check_same(parents, "base model", lambda parent: parent.config.get("base_model_name_or_path"))
    _check_same(parents, "prompt", lambda parent: parent.identity.get("prompt"))
    _check_same(parents, "pair_prompt", lambda parent: parent.identity.get("pair_prompt"))
    _check_same(parents, "readout", lambda parent: parent.identity.get("readout", ReadoutConfig().model_dump()))


def _check_bases(parents: Sequence[Parent]) -> None:
    """Refuse parents of different bases. A full checkpoint may also be the base of another parent: of the retrained."""
    bases = {parent.base_sha256 for parent in parents}
    if len(bases) > 1 and all(isinstance(parent, Checkpoint) for parent in parents):
        bases -= {parent.sha256 for parent in parents}
    if len(bases) > 1:
        _check_same(parents, "base_sha256", lambda parent: parent.base_sha256)


def _check_same(parents: Sequence[Parent], what: str, value_of: Callable[[Any], Any]) -> None:
    first = parents[0]
    for other in parents[1:]:
        if value_of(first) != value_of(other):
            raise UserError(
                f"{first.path} and {other.path}",
                f"differ in {what}: {value_of(first)!r} and {value_of(other)!r}",
                "soup only fine-tunes of one base, with the same prompt and readout",
            )


def _setting(key: str, checkpoint: Checkpoint) -> Any:
    return _architecture(checkpoint).get(key)


def _architecture(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the settings in `config.json`. Those of its parts (`text_config`) have a dot in the name."""
    entries = [("", checkpoint.config)]
    found: dict[str, Any] = {}
    for prefix, part in entries:
        for key, value in part.items():
            if isinstance(value, dict):
                entries.append((f"{prefix}{key}.", value))
            elif key not in WRITERS_NOTES:
                found[prefix + key] = value
    return found


def _check_layout(first: Checkpoint, other: Checkpoint) -> None:
    """Refuse checkpoints whose tensors differ in names, shapes or dtypes."""
    one, two = first.tensors.layout, other.tensors.layout
    place = f"{first.path} and {other.path}"
    if different := sorted(one.keys() ^ two.keys()):
        raise UserError(place, f"are not one model: only one has {different[0]}", "soup fine-tunes of one base")
    for name, (shape, dtype) in one.items():
        if (shape, dtype) != two[name]:
            problem = f"differ in {name}: {shape} {dtype} and {two[name][0]} {two[name][1]}"
            raise UserError(place, problem, "soup fine-tunes of one base, exported in one dtype")


def _check_adapters(adapters: Sequence[Adapter]) -> None:
    first = adapters[0]
    for other in adapters:
        if strange := sorted(name for name in other.tensors.layout if not name.endswith(FACTORS)):
            problem = f"has tensors that a soup cannot mix: {strange[0]}"
            raise UserError(str(other.path), problem, "use plain LoRA adapters")
        if different := sorted(first.tensors.layout.keys() ^ other.tensors.layout.keys()):
            raise UserError(
                f"{first.path} and {other.path}",
                f"adapt different modules: only one has {different[0]}",
                "soup only adapters with the same target modules",
            )
        for name, (shape, _) in sorted(other.tensors.layout.items()):
            _check_shape(first, other, name, shape)


def _check_shape(first: Adapter, other: Adapter, name: str, shape: list[int]) -> None:
    rank_axis = FACTORS.index(name[-len(FACTORS[0]) :])
    if shape[rank_axis] != other.rank:
        raise UserError(f"{other.path} {name}", f"has rank {shape[rank_axis]}", f"{CONFIG} says r={other.rank}")
    if shape[1 - rank_axis] != first.tensors.layout[name][0][1 - rank_axis]:
        raise UserError(f"{first.path} and {other.path}", f"differ in the size of {name}", "their bases differ")


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, dict[str, Any], "copy the model again") if path.is_file() else {}
