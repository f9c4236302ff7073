"""The adapter that training continues from. It decides rank, alpha, dropout and modules, and names its base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import UserError
from rzen.config import LoraConfig
from rzen.model.lora import scope_of
from rzen.soup.adapters import modules_of
from rzen.soup.parents import Adapter, open_parents

_SETTING = "init_adapter"


@dataclass(frozen=True)
class InitAdapter:
    """What an adapter says of itself."""

    lora: LoraConfig
    """Its rank, alpha and dropout."""
    modules: tuple[str, ...]
    """Linear layers that it adapts, sorted."""

    def __str__(self) -> str:
        lora = self.lora
        kinds = ", ".join(sorted({_kind(module) for module in self.modules}))
        settings = f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}"
        return f"LoRA {settings}, {len(self.modules)} modules ({kinds})"


def _kind(module: str) -> str:
    """Return the last part of a name, such as `q_proj`. A number is that of a part: `mlp.0`."""
    around, _, last = module.rpartition(".")
    return f"{around.rpartition('.')[2]}.{last}" if last.isdigit() else last


def read_init_adapter(folder: Path, asked: LoraConfig) -> InitAdapter:
    """Return what training continues from. Reads the weights.

    Raises `UserError` for settings of `asked` that were given and differ. Raises it too for whatever a soup would
    refuse: otherwise that would come out when the training is done.
    """
    (adapter,) = open_parents({_SETTING: folder})
    assert isinstance(adapter, Adapter), "its config says so"
    for name in adapter.tensors.layout:
        adapter.tensors.read(name)  # refuses numbers that are not finite
    config = adapter.config
    modules = tuple(modules_of(adapter))
    found = {
        "scope": scope_of(modules),
        "rank": adapter.rank,
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout", 0.0),
    }
    for name, value in found.items():
        said = getattr(asked, name) if name in asked.model_fields_set else None
        if said is not None and said != value:
            fix = f"leave model.lora out, because the adapter decides, or set {_SETTING}: null"
            raise UserError(f"model.lora.{name}={said}", f"{_SETTING} {folder} has {value}", fix)
    return InitAdapter(LoraConfig.model_validate(found), modules)
