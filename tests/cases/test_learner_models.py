"""What a model is and how models are combined, each with its right value by hand or by another library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from jobs.serving.export import _scores
from jobs.serving.specs import ExportSpec
from jobs.workflows.specs import RetrainSpec
from pipelines.errors import UserError
from rzen.config import DareSoup, MeanSoup, TiesSoup
from rzen.evaluation.results import Result, write_results
from rzen.model.checkpoints import checkpoint_dir, checkpoint_sha256
from rzen.soup.make import make_soup
from rzen.soup.methods import merge
from tests.adapters import SHAPES, adapter, dense, error
from tests.tiny import tiny_checkpoint


def edit(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def as_bin(folder: Path, *, shards: int = 1) -> Path:
    """Store the weights as PyTorch files instead, as older checkpoints on the hub."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names = {name: f"pytorch_model-{number % shards}.bin" for number, name in enumerate(tensors)}
    for file in set(names.values()):
        torch.save({name: tensors[name] for name in tensors if names[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def nudge(path: Path) -> None:
    """Change one weight of a file."""
    is_safe = path.suffix == ".safetensors"
    tensors = load_file(path) if is_safe else torch.load(path)
    name = min(tensors)
    tensors[name] = tensors[name] + 1
    save_file(tensors, path, metadata={"format": "pt"}) if is_safe else torch.save(tensors, path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "model.safetensors": lambda folder: nudge(folder / "model.safetensors"),
    "config.json": lambda folder: edit(folder / "config.json", image_token_id=7),
    "text_config": lambda folder: edit(folder / "config.json", text_config={"rope_theta": 5.0}),
    "tokenizer.json": lambda folder: edit(folder / "tokenizer.json", normalizer=None),
    "preprocessor_config.json": lambda folder: edit(folder / "preprocessor_config.json", merge_size=1),
}
NOTES: dict[str, Callable[[Path], None]] = {
    "nothing": lambda folder: None,
    "version of the writer": lambda folder: edit(folder / "config.json", transformers_version="4.0", dtype="bfloat16"),
    "indentation": lambda folder: edit(folder / "config.json"),
    "weights of another format that nobody reads": lambda folder: torch.save({}, folder / "pytorch_model.bin"),
    "weights under another name": lambda folder: save_file({"a": torch.ones(1)}, folder / "consolidated.safetensors"),
    "text": lambda folder: (folder / "README.md").write_text("new"),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_is_another_one_with_any_file_that_decides_vectors(name: str, tmp_path: Path) -> None:
    before, after = (Path(tiny_checkpoint(tmp_path / some)) for some in "ab")
    CHANGES[name](after)
    assert checkpoint_sha256(before) != checkpoint_sha256(after)


@pytest.mark.parametrize("name", NOTES)
def test_a_checkpoint_is_the_same_whatever_else_its_folder_holds(name: str, tmp_path: Path) -> None:
    before, after = (Path(tiny_checkpoint(tmp_path / some)) for some in "ab")
    NOTES[name](after)
    assert checkpoint_sha256(before) == checkpoint_sha256(after)


@pytest.mark.parametrize("shards", [1, 3])
def test_models_in_pytorch_files_are_told_apart(shards: int, tmp_path: Path) -> None:
    one, same, other = (as_bin(Path(tiny_checkpoint(tmp_path / some)), shards=shards) for some in "abc")
    nudge(max(other.glob("*.bin")))
    assert checkpoint_sha256(one) == checkpoint_sha256(same)
    assert checkpoint_sha256(one) != checkpoint_sha256(other)


def test_a_model_in_several_files_needs_all_of_them(tmp_path: Path) -> None:
    folder = as_bin(Path(tiny_checkpoint(tmp_path / "a")), shards=2)
    (folder / "pytorch_model-1.bin").unlink()
    with pytest.raises(UserError, match=r"pytorch_model-1.bin: does not exist, but pytorch_model.bin.index.json names"):
        checkpoint_sha256(folder)
    with pytest.raises(UserError, match=r"has no weights; one of these is expected: model.safetensors"):
        checkpoint_sha256(tmp_path)


def test_adapters_are_told_apart_by_weights_and_scale(tmp_path: Path) -> None:
    """The path of the base, the order of the modules and the mode are notes of the writer."""
    one = adapter(tmp_path / "one", 2, 4, seed=1)
    for name in ("scaled", "elsewhere", "other", "bin", "other bin", "tokenizer"):
        shutil.copytree(one, tmp_path / name)
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")  # as other trainers leave it there; nobody reads it
    config = "adapter_config.json"
    targets = json.loads((one / config).read_text())["target_modules"]
    edit(tmp_path / "scaled" / config, lora_alpha=8)
    edit(
        tmp_path / "elsewhere" / config, base_model_name_or_path="x", inference_mode=False, target_modules=targets[::-1]
    )
    nudge(tmp_path / "other/adapter_model.safetensors")
    for name in ("bin", "other bin"):
        (tmp_path / name / "adapter_model.safetensors").unlink()
        torch.save(load_file(one / "adapter_model.safetensors"), tmp_path / name / "adapter_model.bin")
    nudge(tmp_path / "other bin/adapter_model.bin")
    found = {path.name: checkpoint_sha256(path) for path in tmp_path.iterdir()}
    assert found["one"] == found["elsewhere"] == found["tokenizer"]
    assert len(set(found.values())) == 5


def test_an_adapter_next_to_a_checkpoint_is_refused(tmp_path: Path) -> None:
    """transformers would load it on top of the checkpoint without a word."""
    folder = tiny_checkpoint(tmp_path / "a")
    shutil.copy(adapter(tmp_path / "b", 2, 4, seed=1) / "adapter_config.json", folder)
    with pytest.raises(UserError, match=r"a: holds a checkpoint and an adapter; move adapter_config.json"):
        checkpoint_dir(folder)


def test_an_export_takes_the_scores_of_its_weights_whatever_their_names(tmp_path: Path) -> None:
    base, own = Path(tiny_checkpoint(tmp_path / "base")), adapter(tmp_path / "adapter", 2, 4, seed=1)
    scored = {"a": [checkpoint_sha256(base), None], "b": [checkpoint_sha256(base), checkpoint_sha256(own)]}
    rows = [Result(name, "text_image", "hit@1", value, 9, 9, 0.1) for name, value in (("a", 0.2), ("b", 0.6))]
    write_results(tmp_path / "results.json", rows, {"weights": scored})
    fields = {"kind": "export", "model": {"base": "elsewhere"}, "scores": str(tmp_path / "results.json"), "out": "o"}
    spec = ExportSpec.model_validate(fields)
    assert [row["value"] for row in _scores(spec, base, own)["rows"]] == [0.6]
    assert [row["value"] for row in _scores(spec, base, None)["rows"]] == [0.2]
    nudge(own / "adapter_model.safetensors")
    with pytest.raises(UserError, match="has no score of the weights of base elsewhere"):
        _scores(spec, base, own)


def test_ties_with_unequal_weights_is_a_weighted_mean(tmp_path: Path) -> None:
    """All entries count, so the right value is sum w d / sum w over the parents with the sign of sum w d."""
    a, b = adapter(tmp_path / "a", 2, 4, seed=1), adapter(tmp_path / "b", 4, 16, seed=2)
    make_soup({"a": a, "b": b}, tmp_path / "soup", TiesSoup(weights={"a": 0.9, "b": 0.1}, density=0.9999))
    right = {}
    for module in SHAPES:
        deltas = torch.stack([dense(a)[module], dense(b)[module]])
        weights = torch.tensor([0.9, 0.1], dtype=torch.float64)[:, None, None]
        agree = torch.sign(deltas) == torch.sign((weights * deltas).sum(0))
        right[module] = (weights * deltas * agree).sum(0) / (weights * agree).sum(0)
    assert error(dense(tmp_path / "soup"), right) < 1e-5


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=4),
    density=st.floats(0.01, 0.99),
    method=st.sampled_from(["total", "frequency", "dare"]),
)
def test_no_entry_of_ties_is_larger_than_its_largest_parent(
    seed: int, weights: list[float], density: float, method: Any
) -> None:
    """DARE enlarges what it keeps, each parent by the same factor."""
    torch.manual_seed(seed)
    deltas = [10 ** torch.randn(1) * torch.randn(5, 7) for _ in weights]
    shares = [weight / sum(weights) for weight in weights]
    config = DareSoup(density=density, merge="ties") if method == "dare" else TiesSoup(density=density, signs=method)
    found = merge(deltas, shares, config, "some")
    largest = torch.stack(deltas).abs().amax(0) / (density if method == "dare" else 1)
    assert bool((found.abs() <= largest * (1 + 1e-6)).all())
    assert bool((found != 0).any()) or method == "dare"  # at least one entry is kept, however few there are


def test_retraining_keeps_rank_scale_and_dropout(tmp_path: Path) -> None:
    champion = adapter(tmp_path / "0", 4, 8, seed=1, lora_dropout=0.1)
    for tick in range(1, 4):
        candidate = adapter(tmp_path / f"candidate {tick}", 4, 8, seed=tick + 1, lora_dropout=0.1)
        parents = {"champion": champion, "candidate": candidate}
        exact = {m: (dense(champion)[m] + dense(candidate)[m]) / 2 for m in SHAPES}
        lineage = make_soup(parents, tmp_path / str(tick), RetrainSpec.model_fields["soup"].default)
        champion = tmp_path / str(tick)
        config = json.loads((champion / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
        left_out = {m: exact[m] - dense(champion)[m] for m in SHAPES}
        whole = sum(float(delta.square().sum()) for delta in exact.values())
        lost = sum(float(delta.square().sum()) for delta in left_out.values()) / whole
        assert lineage["residual"] == pytest.approx(lost**0.5, rel=1e-3)


def test_a_soup_of_one_scale_keeps_it_at_any_rank(tmp_path: Path) -> None:
    a, b = adapter(tmp_path / "a", 2, 8, seed=1), adapter(tmp_path / "b", 3, 12, seed=2)
    make_soup({"a": a, "b": b}, tmp_path / "soup", MeanSoup())
    config = json.loads((tmp_path / "soup/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 20)
    assert error(dense(tmp_path / "soup"), {m: (dense(a)[m] + dense(b)[m]) / 2 for m in SHAPES}) < 1e-6
