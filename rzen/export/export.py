"""Export one directory: the adapter merged into the base, and what other libraries need to give the same vectors.

    model          weights, tokenizer, sizes of media: AutoModel and rzen, which mteb is given; by the files of
                   rzen/export sentence-transformers and vLLM, where they can read the model as it was trained
    adapter        the adapter as it was trained, for PEFT
    rzen_release   weights for the inference script released with RzenEmbed
    reranker       a re-ranker with its language-model head (rzen/export/reranker.py)

`rzen.json` in each holds what a transformers checkpoint does not, prompt, readout and descent; README.md is its card.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from pipelines.errors import UserError
from pipelines.stored_json import read_json
from rzen.config import Dtype, ModelConfig, ModelIdentity, RerankerIdentity
from rzen.embedding.embedder import load
from rzen.embedding.tasks import TASKS, named_tasks
from rzen.export import release, sentence_transformers
from rzen.export.card import CARD, model_card
from rzen.export.card_metadata import ModelCardData
from rzen.export.weights import write_backbone
from rzen.inputs.processor import Processor
from rzen.model.backbone import load_backbone
from rzen.model.checkpoints import (
    IDENTITY,
    TEMPERATURES,
    atomic_directory,
    check_base,
    checkpoint_dir,
    checkpoint_sha256,
    read_identity,
    read_identity_file,
    read_temperatures,
    write_json,
)
from rzen.model.embedding_model import EmbeddingModel
from rzen.model.lora import CONFIG, WEIGHTS, load_adapter
from rzen.soup.parents import LINEAGE

Format = Literal["model", "adapter", "rzen_release", "reranker"]


@dataclass(frozen=True)
class ExportOptions:
    """Settings of an exported directory that are not its weights."""

    format: Format = "model"
    dtype: Dtype = "bfloat16"
    frames: int = 8
    """Frames of a video, for libraries that sample frames and size them by a fixed number. Even."""
    instructions: dict[str, str] = field(default_factory=dict)
    """Name -> instruction, for `task` of rzen and `prompt_name` of sentence-transformers."""
    dimensions: tuple[int, ...] = ()
    """Smaller widths that the model was trained for."""
    facts: ModelCardData = field(default_factory=ModelCardData)
    """Contents of the model card."""


def export_model(
    base_dir: str, adapter_dir: Path | None, out_dir: Path, identity: ModelIdentity, options: ExportOptions
) -> str | None:
    """Write the base with the adapter merged in fp32 and rounded once. `out_dir` appears complete or not at all.

    Returns the reason if libraries other than rzen and the one of the format cannot read it as it was trained. Raises
    `UserError` where `out_dir` exists, or the adapter does not fit the base or was trained with another identity.
    Raises it too for a format that cannot hold the model.
    """
    if out_dir.exists():
        raise UserError(str(out_dir), "exists already", "name a new directory for the model")
    base = checkpoint_dir(base_dir)
    base_sha256 = checkpoint_sha256(base)
    lineage = {"base": options.facts.base or base_dir, "base_sha256": base_sha256}
    if options.format == "rzen_release":
        release.check(base, identity)
    model = load_backbone(
        str(base), ModelConfig(backbone=base_dir, tune="full", dtype="float32", gradient_checkpointing=False)
    )
    if adapter_dir is not None:
        check_base(adapter_dir, base)
        _check_identity(adapter_dir, identity)
        adapted = load_adapter(model, adapter_dir)
        lineage |= {
            "adapter": options.facts.adapter or str(adapter_dir),
            "adapter_sha256": checkpoint_sha256(adapter_dir),
        }
        model = adapted.merge_and_unload(safe_merge=True) if options.format != "adapter" else model
    elif options.format == "adapter":
        raise UserError("format=adapter", "there is no adapter", "name one in model.adapter, or set format: model")
    temperatures = read_temperatures(adapter_dir or base)
    unsupported_reason = sentence_transformers.unsupported_reason(identity)
    with atomic_directory(out_dir) as folder:
        if options.format == "adapter":
            assert adapter_dir is not None
            _copy_adapter(adapter_dir, folder, lineage)
            content = identity.model_dump() | {"base_sha256": base_sha256, "lineage": lineage}
            write_json(folder / IDENTITY, content | _with_temperatures(temperatures))
        else:
            write_backbone(model, base, folder, options.dtype)
            _add_dimensions(folder / "config.json", options.dimensions)
            write_identity(folder, identity, options.dtype, lineage, temperatures)
            add_origin(folder / IDENTITY, options)
        if options.format == "rzen_release":
            release.write_files(folder, identity)
        elif options.format == "model" and unsupported_reason is None:
            sentence_transformers.write_files(folder, identity, options.frames, options.instructions)
        card = model_card(folder, identity, options.format, unsupported_reason, options.frames, options.facts)
        (folder / CARD).write_text(card, encoding="utf-8")
    return unsupported_reason


def write_model(
    model: PreTrainedModel,
    base: Path,
    out_dir: Path,
    identity: ModelIdentity | RerankerIdentity,
    dtype: Dtype,
    lineage: dict[str, str],
    temperatures: Mapping[str, float] | None = None,
    *,
    head: Tensor | None = None,
) -> None:
    """Write a full model, rounded once to `dtype` in place, with the tokenizer and preprocessor of its `base`.

    `lineage` says what it was made from, and `temperatures` are those of its tasks. `head` is a language-model head
    that is not tied to the embeddings; without one, it is tied. `out_dir` appears complete or not at all.
    """
    with atomic_directory(out_dir) as folder:
        write_backbone(model, base, folder, dtype, head)
        write_identity(folder, identity, dtype, lineage, temperatures)


def write_identity(
    folder: Path,
    identity: ModelIdentity | RerankerIdentity,
    dtype: Dtype,
    lineage: dict[str, str],
    temperatures: Mapping[str, float] | None = None,
) -> None:
    """Write `rzen.json` into a checkpoint directory, for `load_encoder` to open it."""
    content = identity.model_dump() | {"dtype": dtype, "lineage": lineage}
    if isinstance(identity, ModelIdentity):
        content["normalize"] = True
    write_json(folder / IDENTITY, content | _with_temperatures(temperatures or {}))


def add_origin(path: Path, options: ExportOptions) -> None:
    """Add the tasks, and license and training data where they are known. Other programs read them there."""
    facts = options.facts
    sources = {source for recipe in facts.recipes.values() for source in recipe["data"].get("data", {})}
    known = {
        TASKS: named_tasks(options.instructions),
        "license": facts.license,
        "training_data": sorted(sources),
    }
    write_json(path, read_json(path, dict[str, Any]) | {name: value for name, value in known.items() if value})


def _add_dimensions(path: Path, dimensions: Sequence[int]) -> None:
    """Add the widths of a vector that may be asked for, the full one included: vLLM and `rzen serve` accept no others.

    Without smaller ones, vLLM accepts none. Raises `UserError` for one above the full width.
    """
    if not dimensions:
        return
    config = read_json(path, dict[str, Any])
    full = config.get("text_config", config)["hidden_size"]
    if wrong := [width for width in dimensions if width > full]:
        raise UserError("dimensions", f"has {wrong[0]}, and the vectors have {full} values", "name smaller widths")
    write_json(path, config | {"is_matryoshka": True, "matryoshka_dimensions": sorted({*dimensions, full})})


def _with_temperatures(temperatures: Mapping[str, float]) -> dict[str, Any]:
    return {TEMPERATURES: dict(temperatures)} if temperatures else {}


def load_encoder(model_dir: str, dtype: Dtype | None = None) -> tuple[Processor, EmbeddingModel]:
    """Return processor and frozen model of an exported directory, on the CPU. `dtype` replaces the stored one.

    Raises `UserError` where the directory is no exported model.
    """
    path = Path(model_dir) / IDENTITY
    if "dtype" not in read_identity_file(path.parent):
        raise UserError(str(path), "is missing, or an adapter's", "name a directory with a model, written by export")
    embedder = load(model_dir, device="cpu", dtype=dtype)
    return embedder.processor, embedder.model


def _copy_adapter(adapter_dir: Path, folder: Path, lineage: dict[str, str]) -> None:
    """Copy PEFT's files. They name the base as the export does, not by its path on a worker."""
    shutil.copyfile(adapter_dir / WEIGHTS, folder / WEIGHTS)
    config = read_json(adapter_dir / CONFIG, dict[str, Any], "copy the adapter again")
    write_json(folder / CONFIG, config | {"base_model_name_or_path": lineage["base"]})
    if (adapter_dir / LINEAGE).is_file():
        shutil.copyfile(adapter_dir / LINEAGE, folder / LINEAGE)


def _check_identity(adapter_dir: Path, identity: ModelIdentity) -> None:
    """Refuse an adapter that was trained with another identity. One from elsewhere names none."""
    trained = read_identity(adapter_dir, identity).model_dump()
    for key, value in identity.model_dump().items():
        if trained[key] != value:
            problem = f"the adapter was trained with {trained[key]}, not {value}"
            fix = "export it with the prompt and readout of its training"
            raise UserError(f"{adapter_dir / IDENTITY} {key}", problem, fix)
