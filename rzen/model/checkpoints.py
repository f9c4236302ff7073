"""Checkpoint directories: where they are, what family and weights they hold, how they are to be read.

Imports neither torch nor transformers, because the workers that encode media need the tokenizer's files only.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ValidationError
from typing_extensions import TypedDict

from pipelines.config import PositiveInt
from pipelines.errors import UserError
from pipelines.redaction import redacted
from pipelines.stored_json import explain, read_json, stored_file
from rzen.config import ModelIdentity, PairPromptConfig
from rzen.families import read_family

IDENTITY, TEMPERATURES = "rzen.json", "temperatures"
MODEL_CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
WRITERS_NOTES = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "is_matryoshka",
    "matryoshka_dimensions",
)
"""Entries of a `config.json` that say who wrote it, how, and which widths may be asked for. They change no vector."""
# The first of these that a folder has is what transformers, or PEFT, reads. An index names further files.
_MODEL_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_ADAPTERS_NOTES = ("base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version")
_PREPROCESSING = ("preprocessor_config.json", "tokenizer.json")


@stored_file
class IdentityFile(TypedDict, total=False):
    """What `rzen.json` of a model or adapter may say, in addition to `ModelIdentity` or `RerankerIdentity`."""

    prompt: dict[str, Any]
    readout: dict[str, Any]
    pair_prompt: dict[str, Any]
    dtype: str | None
    lineage: dict[str, str]
    temperatures: dict[str, float]
    base_sha256: str
    license: str
    training_data: list[str]


def checkpoint_dir(path_or_hub: str) -> Path:
    """Return the directory of a checkpoint. A hub name (`Qwen/Qwen2-VL-2B-Instruct`) is downloaded, if not cached.

    Raises `UserError` for anything that is not a checkpoint of a supported type. transformers would also load an
    adapter that is in the same folder, without being asked. Such a folder is refused.
    """
    folder = Path(path_or_hub)
    if not folder.is_dir():
        folder = _download(path_or_hub)
    read_family(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        fix = f"move {ADAPTER_CONFIG} and its weights to a folder of their own, and name that as the adapter"
        raise UserError(str(folder), "holds a checkpoint and an adapter", fix)
    return folder


@stored_file
class AdapterFile(TypedDict):
    """What the `adapter_config.json` of an adapter has."""

    base_model_name_or_path: NotRequired[str | None]
    r: NotRequired[PositiveInt]
    lora_alpha: NotRequired[float]


def read_identity_file(folder: Path) -> IdentityFile:
    """Return what the `rzen.json` of a model or adapter says; nothing if it has none. Raises `UserError`."""
    path = folder / IDENTITY
    return read_json(path, IdentityFile, "copy or export the model again") if path.is_file() else IdentityFile()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file of a model or adapter, without secrets. Equal contents give equal bytes."""
    path.write_text(json.dumps(redacted(content), indent=2, sort_keys=True) + "\n")


def read_identity(folder: Path, default: ModelIdentity) -> ModelIdentity:
    """Return how a model or adapter is to be read, as it says itself; `default` where it says nothing.

    One that names a prompt and no readout is read by the defaults of `ReadoutConfig`. Raises `UserError` for a
    re-ranker, which has no vectors.
    """
    saved = read_identity_file(folder)
    if "pair_prompt" in saved:
        fix = "open it with rzen.load_reranker, or name it in `model` of a job of kind judge"
        raise UserError(str(folder / IDENTITY), "is that of a re-ranker, which has no vectors", fix)
    if not saved.get("prompt"):
        return default
    try:
        return ModelIdentity.model_validate({name: saved[name] for name in ModelIdentity.model_fields if name in saved})  # type: ignore[literal-required]
    except ValidationError as error:
        raise UserError(str(folder / IDENTITY), explain(error), "export the model again") from error


def read_pair_prompt(folder: Path) -> PairPromptConfig | None:
    """Return how a trained re-ranker asks about a pair. None for a model or adapter that does not say."""
    saved = read_identity_file(folder)
    if "pair_prompt" not in saved:
        return None
    try:
        return PairPromptConfig.model_validate(saved["pair_prompt"])
    except ValidationError as error:
        raise UserError(str(folder / IDENTITY), explain(error), "copy the model again") from error


def trained_pair_prompt(base: Path, adapter: Path | None) -> PairPromptConfig:
    """Return the prompt that a re-ranker was trained with, and the default one of a model that does not say."""
    return (adapter and read_pair_prompt(adapter)) or read_pair_prompt(base) or PairPromptConfig()


def read_temperatures(folder: Path) -> dict[str, float]:
    """Return task -> temperature that a model or adapter was trained with; empty if it does not say."""
    return read_identity_file(folder).get("temperatures", {})


def stored_dtype(folder: Path) -> str | None:
    """Return the type that an exported model is computed in by default. None for a model that does not say."""
    return read_identity_file(folder).get("dtype")


@stored_file
class MadeBy(TypedDict):
    """What identifies the vectors of a model: hashes of its weights, its prompt and its readout."""

    base: str
    adapter: str | None
    identity: ModelIdentity


def made_by(base: Path, adapter: Path | None, identity: ModelIdentity) -> MadeBy:
    """Return what identifies the vectors of a model in these folders. Reads all weights."""
    tuned = None if adapter is None else checkpoint_sha256(adapter)
    return MadeBy(base=checkpoint_sha256(base), adapter=tuned, identity=identity)


def checkpoint_sha256(folder: Path) -> str:
    """Return the identity of a checkpoint or adapter: the hash of what is read from its folder. Reads all of it.

    That is the files of the weights, of any format, and what decides vectors next to them: configuration, tokenizer and
    patches. Names of the files, and notes of the program that wrote them, do not count. Prompt and readout do not
    either: `read_identity` returns them. Raises `UserError` for a folder without weights.
    """
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    name, notes = (ADAPTER_CONFIG, _ADAPTERS_NOTES) if is_adapter else (MODEL_CONFIG, WRITERS_NOTES)
    content: dict[str, Any] = {"weights": [file_sha256(path) for path in weight_files(folder)]}
    if (folder / name).is_file():
        content[name] = _without(notes, _read_object(folder / name))
    for name in () if is_adapter else _PREPROCESSING:  # an adapter's tokenizer is that of its base
        if (folder / name).is_file():
            content[name] = file_sha256(folder / name)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers or PEFT reads the weights of a folder from, sorted by name.

    Other files with weights are not read, such as those of another format. Raises `UserError` where there are none, or
    where a file is missing that an index names.
    """
    names: tuple[str, ...] = _ADAPTER_WEIGHTS
    if not (folder / ADAPTER_CONFIG).is_file():
        own = folder / MODEL_CONFIG
        named = _read_object(own).get("transformers_weights") if own.is_file() else None
        names = (str(named),) if named else _MODEL_WEIGHTS
    first = next((name for name in names if (folder / name).is_file()), None)
    if first is None:
        raise UserError(str(folder), "has no weights", f"one of these is expected: {', '.join(names)}")
    if not first.endswith(".index.json"):
        return [folder / first]
    shards = sorted(set(_read_object(folder / first).get("weight_map", {}).values()))
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise UserError(str(folder / missing[0]), f"does not exist, but {first} names it", "copy the model again")
    if not shards:
        raise UserError(str(folder / first), "names no files", "copy the model again")
    return [folder / name for name in shards]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Give a folder to fill. It becomes `folder` when the block ends, and is deleted if the block raises."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_base(adapter: Path, base: Path) -> None:
    """Refuse an adapter that was trained on another checkpoint than `base`, by their hashes. Reads the checkpoint.

    Raises `UserError`. An adapter from elsewhere names no hash, and is taken for one of this base.
    """
    path = adapter / IDENTITY
    trained = read_identity_file(adapter).get("base_sha256")
    if trained is not None and trained != (found := checkpoint_sha256(base)):
        problem = f"the adapter was trained with {trained[:16]}, not {found[:16]} ({base})"
        raise UserError(f"{path} base_sha256", problem, "name the base of its training")


def _without(notes: Sequence[str], node: Any) -> Any:
    """Return a configuration without the entries of these names, at any depth. PEFT writes names in any order."""
    if isinstance(node, dict):
        return {key: _without(notes, value) for key, value in node.items() if key not in notes}
    if isinstance(node, list) and all(isinstance(item, str) for item in node):
        return sorted(node)
    return node


def _read_object(path: Path) -> dict[str, Any]:
    return read_json(path, dict[str, Any], "copy the model again")


def _download(name: str) -> Path:
    if not HUB_NAME.fullmatch(name):
        raise UserError(name, "is neither a directory nor a hub name", "name an existing checkpoint directory")
    from huggingface_hub import snapshot_download  # here, because every process that decodes imports this module

    try:
        return Path(snapshot_download(name, allow_patterns=CHECKPOINT_FILES))
    except (OSError, ValueError) as error:
        raise UserError(name, f"is no directory and cannot be downloaded ({error})", "check the name") from error
