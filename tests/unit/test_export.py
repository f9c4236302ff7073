from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from pipelines.errors import UserError
from rzen.backbone import build_tiny, load_backbone
from rzen.checkpoints import checkpoint_dir, checkpoint_sha256
from rzen.config import LoraConfig, MeanSoup, ModelIdentity, ReadoutConfig, TinyBackbone
from rzen.embedder import Embedder
from rzen.export import export_model, load_encoder
from rzen.lora import add_lora, load_adapter, save_adapter
from rzen.processor import Processor
from rzen.soup.make import make_soup
from tests.tiny import PROMPT, TEXTS, TINY, mixed_sides, tiny_checkpoint, tiny_model

IDENTITY = ModelIdentity(prompt=PROMPT)
UMARVEL = ReadoutConfig(direction="bidirectional", pooling="mean")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"))


def trained_adapter(base: str, folder: Path, seed: int = 0) -> Path:
    """An adapter whose B is not zero, as after training."""
    model = add_lora(load_backbone(base, tiny_model(base)), LoraConfig(rank=3), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, folder, identity=IDENTITY, base=base, base_sha256=checkpoint_sha256(Path(base)))
    return folder


def unmerged_vectors(base: str, adapter: Path | None) -> Tensor:
    processor = Processor(base, PROMPT)
    backbone = load_backbone(base, tiny_model(base))
    model = load_adapter(backbone, adapter) if adapter else backbone
    with torch.no_grad():
        return Embedder(model, processor.layout)(processor.encode(mixed_sides()))


def exported_vectors(model_dir: Path) -> Tensor:
    processor, embedder = load_encoder(str(model_dir))
    return embedder(processor.encode(mixed_sides()))


def test_the_exported_model_gives_the_vectors_of_base_and_adapter(base: str, tmp_path: Path) -> None:
    adapter = trained_adapter(base, tmp_path / "adapter")
    export_model(base, adapter, tmp_path / "model", IDENTITY, "float32")
    expected = unmerged_vectors(base, adapter)
    torch.testing.assert_close(exported_vectors(tmp_path / "model"), expected, atol=1e-5, rtol=0)
    assert (expected - unmerged_vectors(base, None)).abs().max() > 1e-2


def test_the_exported_model_is_an_ordinary_checkpoint(base: str, tmp_path: Path) -> None:
    adapter = trained_adapter(base, tmp_path / "adapter")
    export_model(base, adapter, tmp_path / "model", IDENTITY, "float32")
    model_dir = str(tmp_path / "model")
    processor = Processor(model_dir, PROMPT)
    embedder = Embedder(AutoModel.from_pretrained(model_dir), processor.layout)
    with torch.no_grad():
        actual = embedder(processor.encode(mixed_sides()))
    torch.testing.assert_close(actual, exported_vectors(tmp_path / "model"), atol=0, rtol=0)
    assert AutoTokenizer.from_pretrained(model_dir)(TEXTS[0]) == AutoTokenizer.from_pretrained(base)(TEXTS[0])
    assert AutoImageProcessor.from_pretrained(model_dir, backend="pil").patch_size == 14
    assert not list(tmp_path.glob("*.partial"))


def test_weights_are_merged_in_fp32_and_rounded_once(base: str, tmp_path: Path) -> None:
    adapter = trained_adapter(base, tmp_path / "adapter")
    export_model(base, adapter, tmp_path / "model", IDENTITY, "bfloat16")
    name = "language_model.layers.0.mlp.down_proj"
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
    original = load_file(Path(base) / "model.safetensors")[f"{name}.weight"]
    merged = load_file(tmp_path / "model/model.safetensors")[f"{name}.weight"]
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, (original + 2 * b @ a).to(torch.bfloat16))
    assert not torch.equal(merged, original.bfloat16() + (2 * b @ a).bfloat16())  # rounding thrice would show
    assert exported_vectors(tmp_path / "model").dtype == torch.float32


def test_an_export_without_adapter_keeps_the_base(base: str, tmp_path: Path) -> None:
    export_model(base, None, tmp_path / "model", IDENTITY, "float32")
    torch.testing.assert_close(exported_vectors(tmp_path / "model"), unmerged_vectors(base, None), atol=0, rtol=0)


def test_a_soup_of_one_adapter_twice_exports_as_the_adapter(base: str, tmp_path: Path) -> None:
    adapter = trained_adapter(base, tmp_path / "adapter")
    make_soup({"a": adapter, "b": adapter}, tmp_path / "soup", MeanSoup(weights={"a": 0.3, "b": 0.7}))
    export_model(base, tmp_path / "soup", tmp_path / "model", IDENTITY, "float32")
    expected = unmerged_vectors(base, adapter)
    torch.testing.assert_close(exported_vectors(tmp_path / "model"), expected, atol=1e-5, rtol=0)


def test_identity_holds_prompt_readout_and_descent(base: str, tmp_path: Path) -> None:
    adapter = trained_adapter(base, tmp_path / "adapter")
    export_model(base, adapter, tmp_path / "model", IDENTITY, "float32")
    identity = json.loads((tmp_path / "model/rzen.json").read_text())
    assert identity["prompt"] == {
        "template": "rzen_paper",
        "max_text_tokens": 2000,
        "min_visual_tokens": 4,
        "max_visual_tokens": 24,
    }
    assert identity["readout"] == {"positions": "mrope", "direction": "causal", "pooling": "last_token"}
    assert (identity["normalize"], identity["dtype"]) == (True, "float32")
    assert sorted(identity["lineage"]) == ["adapter", "adapter_sha256", "base", "base_sha256"]
    assert load_encoder(str(tmp_path / "model"))[0].prompt == PROMPT


def test_an_exported_model_is_read_as_it_was_trained(base: str, tmp_path: Path) -> None:
    model = add_lora(load_backbone(base, tiny_model(base)), LoraConfig(rank=3), 0)
    identity = ModelIdentity(prompt=PROMPT, readout=UMARVEL)
    save_adapter(model, tmp_path / "adapter", identity=identity, base=base, base_sha256=checkpoint_sha256(Path(base)))
    export_model(base, tmp_path / "adapter", tmp_path / "model", identity, "float32")
    assert load_encoder(str(tmp_path / "model"))[1].readout == UMARVEL
    assert (exported_vectors(tmp_path / "model") - unmerged_vectors(base, None)).abs().max() > 1e-2
    with pytest.raises(UserError, match=r"rzen.json readout: the adapter was trained with .*'bidirectional'"):
        export_model(base, tmp_path / "adapter", tmp_path / "causal", IDENTITY, "float32")


def test_a_model_from_before_the_readout_could_be_chosen_is_read_as_ever(base: str, tmp_path: Path) -> None:
    adapter = trained_adapter(base, tmp_path / "adapter")
    export_model(base, adapter, tmp_path / "model", IDENTITY, "float32")
    now = exported_vectors(tmp_path / "model")
    for folder in (adapter, tmp_path / "model"):
        saved = json.loads((folder / "rzen.json").read_text())
        del saved["readout"]
        (folder / "rzen.json").write_text(json.dumps(saved | {"pooling": "last_token"}))
    torch.testing.assert_close(exported_vectors(tmp_path / "model"), now, atol=0, rtol=0)
    export_model(base, adapter, tmp_path / "again", IDENTITY, "float32")
    with pytest.raises(UserError, match=r"rzen.json readout: the adapter was trained with"):
        export_model(base, adapter, tmp_path / "other", ModelIdentity(prompt=PROMPT, readout=UMARVEL), "float32")


def test_wrong_exports_are_the_users_errors(base: str, tmp_path: Path) -> None:
    adapter = trained_adapter(base, tmp_path / "adapter")
    other = tiny_checkpoint(tmp_path / "other", TinyBackbone(vocabulary=640, seed=1))
    with pytest.raises(UserError, match=r"rzen.json prompt: the adapter was trained with"):
        export_model(base, adapter, tmp_path / "model", ModelIdentity(), "float32")
    with pytest.raises(UserError, match=r"rzen.json base_sha256: the adapter was trained with"):
        export_model(other, adapter, tmp_path / "model", IDENTITY, "float32")
    with pytest.raises(UserError, match="exists already"):
        export_model(base, adapter, adapter, IDENTITY, "float32")
    with pytest.raises(UserError, match="written by export"):
        load_encoder(base)
    assert not (tmp_path / "model").exists()


def test_wrong_backbones_are_the_users_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a directory nor a hub name"):
        checkpoint_dir(str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"has no config.json"):
        checkpoint_dir(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"model_type 'llama' is not supported; use one of \['qwen2_5_vl', "):
        checkpoint_dir(str(tmp_path))


def test_equal_seeds_build_equal_bytes(tmp_path: Path) -> None:
    other = TINY.model_copy(update={"seed": 1})
    for outer_seed, (name, config) in enumerate((("a", TINY), ("b", TINY), ("other", other))):
        torch.manual_seed(outer_seed)  # the caller's generator plays no part
        build_tiny(tmp_path / name, config, iter(TEXTS))
    contents = {name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b", "other")}
    assert contents["a"] == contents["b"]
    assert [f for f, data in contents["a"].items() if data != contents["other"][f]] == ["model.safetensors"]


def test_the_tiny_backbone_has_the_sizes_asked_for(tmp_path: Path) -> None:
    config = TinyBackbone(hidden=48, layers=3, heads=3, vision_width=24, vision_depth=1, vocabulary=300, init_std=0.3)
    build_tiny(tmp_path / "tiny", config, TEXTS)
    model = AutoModel.from_pretrained(tmp_path / "tiny")
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (
        48,
        3,
        3,
        1,
    )
    assert (vision.embed_dim, vision.depth, vision.hidden_size) == (24, 1, 48)
    assert text.vocab_size == 300 + 7
    assert text.rope_parameters["mrope_section"] == [2, 3, 3]
    for weight in (model.language_model.embed_tokens.weight, model.visual.patch_embed.proj.weight):
        assert weight.std().item() == pytest.approx(0.3, rel=0.1)
