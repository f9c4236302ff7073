"""One ordinary checkpoint directory for serving: adapter folded into the base, tokenizer, preprocessor and prompt.

`rzen.json` in it holds what a transformers checkpoint does not: prompt, readout and descent.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from pipelines.errors import UserError
from rzen.backbone import load_backbone
from rzen.checkpoints import IDENTITY, checkpoint_dir, checkpoint_sha256, read_identity
from rzen.config import ModelConfig, ModelIdentity
from rzen.embedder import Embedder
from rzen.lora import WEIGHTS, load_adapter
from rzen.processor import Processor

Dtype = Literal["float32", "bfloat16"]
COMPANIONS = ("*.txt", "*.jinja", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")


def export_model(base_dir: str, adapter_dir: Path | None, out_dir: Path, identity: ModelIdentity, dtype: Dtype) -> None:
    """Write the base with the adapter merged in fp32 and rounded once to `dtype`. Appears complete or not at all.

    Raises `UserError` where `out_dir` exists, the adapter does not fit the base, or was trained with another identity.
    """
    if out_dir.exists():
        raise UserError(str(out_dir), "exists already", "name a new directory for the model")
    base = checkpoint_dir(base_dir)
    lineage = {"base": base_dir, "base_sha256": checkpoint_sha256(base)}
    model = load_backbone(str(base), _plain(base_dir, "float32"))
    if adapter_dir is not None:
        _check_identity(adapter_dir, identity, lineage["base_sha256"])
        model = load_adapter(model, adapter_dir).merge_and_unload(safe_merge=True)
        lineage |= {"adapter": str(adapter_dir), "adapter_sha256": _sha256(adapter_dir / WEIGHTS)}
    write_model(model, base, out_dir, identity, dtype, lineage)


def write_model(
    model: PreTrainedModel, base: Path, out_dir: Path, identity: ModelIdentity, dtype: Dtype, lineage: dict[str, str]
) -> None:
    """Write a full model, rounded once to `dtype` in place, with the tokenizer and preprocessor of its `base`.

    `lineage` says what it was made from. Appears complete or not at all.
    """
    partial = out_dir.with_name(f"{out_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(getattr(torch, dtype)).save_pretrained(partial)
    for pattern in (*COMPANIONS, "*preprocessor_config.json"):
        for path in base.glob(pattern):
            shutil.copyfile(path, partial / path.name)
    write_identity(partial, identity, dtype, lineage)
    partial.rename(out_dir)


def write_identity(folder: Path, identity: ModelIdentity, dtype: Dtype, lineage: dict[str, str]) -> None:
    """Write `rzen.json` into a checkpoint directory, for `load_encoder` to open it."""
    content = identity.model_dump() | {"normalize": True, "dtype": dtype, "lineage": lineage}
    (folder / IDENTITY).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def load_encoder(model_dir: str, dtype: Dtype | None = None) -> tuple[Processor, Embedder]:
    """Processor and frozen embedder of an exported model, on the CPU; `dtype` replaces the stored one.

    Raises `UserError` where the directory is no exported model.
    """
    path = Path(model_dir) / IDENTITY
    if not path.is_file():
        raise UserError(str(path), "does not exist", "name a directory written by export")
    identity = read_identity(Path(model_dir), ModelIdentity())
    stored: Dtype = json.loads(path.read_text())["dtype"]
    processor = Processor(model_dir, identity.prompt)
    backbone = load_backbone(model_dir, _plain(model_dir, dtype or stored))
    return processor, Embedder(backbone, processor.layout, identity.readout).requires_grad_(False).eval()


def _plain(base_dir: str, dtype: Dtype) -> ModelConfig:
    return ModelConfig(backbone=base_dir, tune="full", dtype=dtype, gradient_checkpointing=False)


def _check_identity(adapter_dir: Path, identity: ModelIdentity, base_sha256: str) -> None:
    """An adapter that says what it was trained with must say the same; one from elsewhere says nothing."""
    path = adapter_dir / IDENTITY
    saved = json.loads(path.read_text()) if path.is_file() else {}
    trained = read_identity(adapter_dir, identity).model_dump() | {"base_sha256": saved.get("base_sha256", base_sha256)}
    for key, value in (identity.model_dump() | {"base_sha256": base_sha256}).items():
        if trained[key] != value:
            problem = f"the adapter was trained with {trained[key]}, not {value}"
            raise UserError(f"{path} {key}", problem, "export it with the base, prompt and readout of its training")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
