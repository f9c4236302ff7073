"""The embedder against a plain transformers forward, one side at a time, and planted faults that must show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipelines.errors import UserError
from pipelines.samples import DecodedSide, Visual
from rzen.backbone import load_backbone
from rzen.config import LoraConfig
from rzen.embedder import Embedder
from rzen.lora import add_lora, load_adapter, save_adapter
from rzen.processor import Processor
from rzen.prompts import render
from tests.tiny import PROMPT, TEXTS, TINY, mixed_sides, noise, tiny_checkpoint, tiny_model, trainable_state

LORA = LoraConfig(rank=3)
LINEARS = 2 * 4 + 2 + 2 * 7  # vision blocks, merger, language layers


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny backbone with no weight at its initial 0 or 1: a norm of ones would hide where the pooling happens."""
    model_dir = tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    model = AutoModel.from_pretrained(model_dir)
    shake(model, 0.2)
    model.save_pretrained(model_dir)
    return model_dir


def shake(module: nn.Module, scale: float) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def processor(model_dir: str) -> Processor:
    return Processor(model_dir, PROMPT)


def embedder_of(model_dir: str, processor: Processor) -> Embedder:
    return Embedder(load_backbone(model_dir, tiny_model(model_dir)), processor.layout)


@pytest.fixture(scope="module")
def expected(model_dir: str, processor: Processor) -> Tensor:
    return reference_vectors(model_dir, processor, mixed_sides())


def reference_vectors(model_dir: str, processor: Processor, sides: Sequence[DecodedSide]) -> Tensor:
    """[B, D]: the library's tokenizer, image processor and model, one side at a time, without padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(model_dir), AutoModel.from_pretrained(model_dir).eval()
    rows = []
    for side in sides:
        ids = torch.tensor([tokenizer(render(processor.pieces(side)))["input_ids"]])
        types = (ids == model.config.image_token_id).long() + 2 * (ids == model.config.video_token_id)
        with torch.no_grad():
            output = model(input_ids=ids, mm_token_type_ids=types, **library_visuals(side.visuals))
        rows.append(output.last_hidden_state[0, -1] / output.last_hidden_state[0, -1].norm())
    return torch.stack(rows)


def library_visuals(visuals: Sequence[Visual]) -> dict[str, Tensor]:
    images = [library_frame(v.frames[0], 4, 24) for v in visuals if v.kind != "video"]
    videos = [library_video(v.frames) for v in visuals if v.kind == "video"]
    arguments = {}
    if images:
        arguments["pixel_values"] = torch.cat([pixels for pixels, _ in images])
        arguments["image_grid_thw"] = torch.tensor([[1, *size] for _, size in images])
    if videos:
        arguments["pixel_values_videos"] = torch.cat([pixels for pixels, _ in videos])
        arguments["video_grid_thw"] = torch.tensor([grid for _, grid in videos])
    return arguments


def library_frame(frame: np.ndarray, low_tokens: int, high_tokens: int) -> tuple[Tensor, list[int]]:
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": low_tokens * 784, "longest_edge": high_tokens * 784}
    )
    output = image_processor(images=[Image.fromarray(frame)], return_tensors="pt")
    return output["pixel_values"].float(), output["image_grid_thw"][0, 1:].tolist()


def library_video(frames: np.ndarray) -> tuple[Tensor, list[int]]:
    """Two images at a time become the two frames of a temporal patch; 24 tokens are shared by the groups."""
    frames = np.concatenate([frames, frames[-1:]]) if len(frames) % 2 else frames
    groups = len(frames) // 2
    singles = [library_frame(frame, 4, 24 // groups) for frame in frames]
    pixels = torch.stack([pixels.view(-1, 3, 2, 14, 14)[:, :, 0] for pixels, _ in singles])
    pairs = torch.stack([pixels[0::2], pixels[1::2]], dim=3)
    return pairs.reshape(-1, 3 * 2 * 14 * 14), [groups, *singles[0][1]]


def vectors(embedder: Embedder, processor: Processor, sides: Sequence[DecodedSide]) -> Tensor:
    with torch.no_grad():
        return embedder(processor.encode(sides))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_mixed_batch_equals_single_unpadded_forwards(
    model_dir: str, processor: Processor, expected: Tensor, attention: str
) -> None:
    batch = processor.encode(mixed_sides())
    assert len(set(batch.lengths.tolist())) > 4
    model = tiny_model(model_dir).model_copy(update={"attention": attention})
    actual = vectors(Embedder(load_backbone(model_dir, model), processor.layout), processor, mixed_sides())
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert (expected @ expected.T - torch.eye(8)).max() < 0.999  # the sides are told apart


def test_a_text_batch_after_an_image_batch_keeps_its_own_positions(
    model_dir: str, processor: Processor, expected: Tensor
) -> None:
    embedder = embedder_of(model_dir, processor)
    sides = mixed_sides()
    vectors(embedder, processor, sides[1:2])
    torch.testing.assert_close(vectors(embedder, processor, sides[0:1]), expected[:1], atol=1e-5, rtol=0)


FAULTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pooled before the final norm": lambda post_norm, pre_norm: pre_norm,
    "pooled one token early": lambda post_norm, pre_norm: post_norm.roll(1, dims=1),
    "pooled one token late": lambda post_norm, pre_norm: post_norm.roll(-1, dims=1),
    "pooled at the last column": lambda post_norm, pre_norm: post_norm[:, -1:].expand_as(post_norm),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_pooling_faults_show(model_dir: str, processor: Processor, expected: Tensor, fault: str) -> None:
    embedder = embedder_of(model_dir, processor)
    seen: dict[str, Tensor] = {}
    embedder.backbone.language_model.norm.register_forward_pre_hook(lambda _, inputs: seen.update(pre=inputs[0]))
    embedder.backbone.register_forward_hook(
        lambda *call: SimpleNamespace(last_hidden_state=FAULTS[fault](call[2].last_hidden_state, seen["pre"]))
    )
    actual = vectors(embedder, processor, mixed_sides())
    assert (actual - expected).abs().max() > 1e-2


def test_videos_fed_as_images_show(model_dir: str, processor: Processor, expected: Tensor) -> None:
    video = mixed_sides()[4].visuals[0]
    images = DecodedSide(visuals=tuple(Visual("image", frame[None]) for frame in video.frames))
    actual = vectors(embedder_of(model_dir, processor), processor, [images])
    assert (actual - expected[4]).abs().max() > 1e-2


def with_lora(model_dir: str, processor: Processor, seed: int = 0, **settings: Any) -> Embedder:
    model = tiny_model(model_dir).model_copy(update=settings)
    return Embedder(add_lora(load_backbone(model_dir, model), LORA, seed), processor.layout)


def test_lora_is_on_every_linear_layer_and_nothing_else_is_trained(model_dir: str, processor: Processor) -> None:
    linears = [m for m in load_backbone(model_dir, tiny_model(model_dir)).modules() if isinstance(m, nn.Linear)]
    state = trainable_state(with_lora(model_dir, processor))
    assert len(linears) == LINEARS
    assert len(state) == 2 * LINEARS
    assert all(".lora_A." in name or ".lora_B." in name for name in state)
    assert sum(".visual." in name for name in state) == 2 * (2 * 4 + 2)
    assert not any("patch_embed" in name for name in state)


def test_a_new_adapter_changes_nothing_and_equal_seeds_give_equal_adapters(
    model_dir: str, processor: Processor, expected: Tensor
) -> None:
    first, again, other = (with_lora(model_dir, processor, seed) for seed in (0, 0, 1))
    torch.testing.assert_close(vectors(first, processor, mixed_sides()), expected, atol=1e-5, rtol=0)
    states = [trainable_state(embedder) for embedder in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_gradients_reach_the_vision_tower_with_and_without_checkpointing(
    model_dir: str, processor: Processor, tune: str
) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(model_dir).model_copy(update={"gradient_checkpointing": checkpointing})
        backbone = load_backbone(model_dir, model)
        embedder = Embedder(add_lora(backbone, LORA, 0) if tune == "lora" else backbone, processor.layout).train()
        shake(embedder, 0.1)
        batch = processor.encode(mixed_sides())
        embedder(batch)[:, 0].sum().backward()
        assert backbone.visual.is_gradient_checkpointing == checkpointing
        gradients.append({name: p.grad for name, p in embedder.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    for name, gradient in plain.items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4)
    assert sum("visual" in name for name in plain) > 10


def test_a_saved_adapter_is_loaded_by_us_and_by_peft(model_dir: str, processor: Processor, tmp_path: Path) -> None:
    trained = with_lora(model_dir, processor)
    shake(trained, 0.1)
    for name in ("one", "two"):
        save_adapter(trained.backbone, tmp_path / name, prompt=PROMPT, base="tiny", base_sha256="ab")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "rzen.json"]
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)

    sides = mixed_sides()
    before = vectors(trained, processor, sides)
    ours = load_adapter(load_backbone(model_dir, tiny_model(model_dir)), tmp_path / "one", trainable=True)
    theirs = peft.PeftModel.from_pretrained(load_backbone(model_dir, tiny_model(model_dir)), str(tmp_path / "one"))
    for loaded in (ours, theirs):
        torch.testing.assert_close(
            vectors(Embedder(loaded, processor.layout), processor, sides), before, atol=0, rtol=0
        )
    assert len(trainable_state(ours)) == 2 * LINEARS
    assert len(trainable_state(theirs)) == 0
    assert (before - vectors(embedder_of(model_dir, processor), processor, sides)).abs().max() > 1e-2


def test_an_adapter_of_another_backbone_is_refused(model_dir: str, processor: Processor, tmp_path: Path) -> None:
    save_adapter(with_lora(model_dir, processor).backbone, tmp_path / "a", prompt=PROMPT, base="t", base_sha256="ab")
    backbone = load_backbone(model_dir, tiny_model(model_dir))
    backbone.language_model.layers = backbone.language_model.layers[:1]
    with pytest.raises(UserError, match="does not fit the backbone: 14 tensors without a partner"):
        load_adapter(backbone, tmp_path / "a")
    wider = tiny_checkpoint(tmp_path / "wider", TINY.model_copy(update={"hidden": 80}))
    with pytest.raises(UserError, match=r"does not fit the backbone \(.*size mismatch for [^\n]*; name the base"):
        load_adapter(load_backbone(wider, tiny_model(wider)), tmp_path / "a")
    with pytest.raises(UserError, match=r"has no adapter_config.json"):
        load_adapter(backbone, tmp_path)


def test_a_read_only_batch_is_accepted(model_dir: str, processor: Processor) -> None:
    batch = processor.encode([DecodedSide(text=TEXTS[0], visuals=(noise("image", 1, 40, 40),))])
    for array in vars(batch).values():
        array.flags.writeable = False  # as arrays that come from Ray's object store
    with torch.no_grad():
        assert embedder_of(model_dir, processor)(batch).norm(dim=-1).item() == pytest.approx(1.0, abs=1e-6)
