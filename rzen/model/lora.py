"""Low-rank adapters on the linear layers of the vision tower, the merger and the language model (PEFT)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from pipelines.errors import UserError
from pipelines.stored_json import read_json
from rzen.config import LoraConfig, LoraScope, ModelIdentity, RerankerIdentity
from rzen.model.checkpoints import ADAPTER_CONFIG, IDENTITY, TEMPERATURES, write_json
from rzen.model.loading import LOADING

_VISUAL = r"(.*\.)?visual\..*"
"""Names of modules of the vision tower, which has the merger in it, in all families."""
WEIGHTS, CONFIG = "adapter_model.safetensors", ADAPTER_CONFIG


def add_lora(backbone: PreTrainedModel, config: LoraConfig, seed: int) -> peft.PeftModel:
    """Freeze the backbone, in place, and put a new adapter on it. Equal seeds give equal adapters. B starts at zero.

    `all-linear` covers the vision tower, which the usual list of projection names misses. It leaves out the patch
    embedding, which is a convolution. The scope `language_model` leaves out all of the vision tower and the merger.
    """
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or 2 * config.rank,
        lora_dropout=config.dropout,
        target_modules="all-linear",
        exclude_modules=_VISUAL if config.scope == "language_model" else None,
    )
    with torch.random.fork_rng(devices=[]), LOADING:
        torch.manual_seed(seed)
        return peft.get_peft_model(backbone, settings)


def save_adapter(
    model: peft.PeftModel,
    folder: Path,
    *,
    identity: ModelIdentity | RerankerIdentity,
    base: str,
    base_sha256: str,
    temperatures: Mapping[str, float] | None = None,
) -> None:
    """Write the adapter as a PEFT directory, with its identity in `rzen.json`. Equal adapters give equal bytes.

    `base` is the backbone as the job names it, `base_sha256` its `checkpoint_sha256`. `temperatures` are those of its
    tasks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous().cpu() for name, value in _adapter_state(model).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(str(folder))
    config = read_json(folder / CONFIG, dict[str, Any])
    config["target_modules"] = sorted(config["target_modules"])  # PEFT writes a set, in any order
    write_json(folder / CONFIG, config | {"base_model_name_or_path": base, "inference_mode": True})
    trained = {"base_sha256": base_sha256} | ({TEMPERATURES: dict(temperatures)} if temperatures else {})
    write_json(folder / IDENTITY, identity.model_dump() | trained)


def load_adapter(
    backbone: PreTrainedModel | peft.PeftModel, folder: Path, *, trainable: bool = False, name: str = "default"
) -> peft.PeftModel:
    """Put a saved adapter (of `save_adapter`, PEFT or a soup) on the backbone, in place.

    A backbone that has adapters already gets one more, under another `name`. Raises `UserError` where the directory
    holds no adapter or one of another backbone. PEFT would only warn.
    """
    for file_name in (CONFIG, WEIGHTS):
        if not (folder / file_name).is_file():
            raise UserError(str(folder), f"has no {file_name}", "name the directory of a PEFT adapter")
    try:
        with LOADING:
            if isinstance(backbone, peft.PeftModel):
                model = backbone
                model.load_adapter(str(folder), name, is_trainable=trainable)
            else:
                model = peft.PeftModel.from_pretrained(backbone, str(folder), name, is_trainable=trainable)
    except (ValueError, RuntimeError) as error:
        first = " ".join(str(error).splitlines()[:2])  # torch lists every tensor
        raise UserError(str(folder), f"does not fit the backbone ({first})", "name the base of its training") from error
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        unmatched = set(file.keys()) ^ set(_adapter_state(model, name))
    if unmatched:
        problem = f"does not fit the backbone: {len(unmatched)} tensors without a partner, such as {min(unmatched)}"
        raise UserError(str(folder), problem, "name the base of its training")
    return model


class AdapterBank:
    """Adapters on one backbone, whose weights are there once. One of them is active at a time, or none."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        self._backbone = backbone
        self._model: peft.PeftModel | None = None

    def add(self, name: str, folder: Path) -> None:
        """Put a saved adapter on the backbone, in place. Raises the errors of `load_adapter`."""
        if self._model is None:
            self._model = load_adapter(self._backbone, folder, name=name)
        else:
            load_adapter(self._model, folder, name=name)

    @contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Compute with an adapter while the block runs, or with the backbone alone. Not for several threads at once."""
        if self._model is None:
            yield
        elif name is None:
            with self._model.disable_adapter():
                yield
        else:
            self._model.set_adapter(name, inference_mode=True)
            yield


def scope_of(modules: Iterable[str]) -> LoraScope:
    """Return the scope of an adapter with these modules."""
    return "all" if any(re.fullmatch(_VISUAL, module) for module in modules) else "language_model"


def _adapter_state(model: peft.PeftModel, name: str = "default") -> dict[str, Tensor]:
    """Tensors by their names in a file. Left to itself, PEFT asks the hub whether the vocabulary has changed."""
    state: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return state
