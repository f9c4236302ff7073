"""The fast vision tower against transformers' own: neighbors of one size at once, patches by a product."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from pipelines.samples import DecodedInput
from rzen.families import FAMILIES
from rzen.inputs.processor import Processor
from rzen.model import vision
from rzen.model.backbone import load_backbone
from rzen.model.embedding_model import EmbeddingModel
from tests.tiny import PROMPT, TINY, noise, tiny_checkpoint, tiny_model


@pytest.fixture(scope="module", params=FAMILIES)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), TINY.model_copy(update={"family": request.param}))


def images(*sizes_px: tuple[int, int]) -> list[DecodedInput]:
    return [DecodedInput(visuals=(noise("image", 1, *size, seed),)) for seed, size in enumerate(sizes_px)]


def vectors_and_gradients(backbone: Any, processor: Processor, inputs: Sequence[DecodedInput]) -> list[Tensor]:
    embedder = EmbeddingModel(backbone, processor.layout)
    vectors_BD = embedder(processor.encode(inputs))
    (vectors_BD * torch.arange(vectors_BD.shape[1])).sum().backward()
    return [vectors_BD.detach(), *(parameter.grad for parameter in backbone.visual.parameters())]


@pytest.mark.parametrize(
    ("inputs", "together"),
    [
        (images((60, 60), (60, 60), (60, 60)), [3]),
        (images((60, 60), (120, 61), (60, 60), (60, 60), (61, 120)), [1, 1, 2, 1]),
        ([DecodedInput(visuals=(noise("video", 6, 57, 83), noise("image", 1, 60, 60)))], [3]),
    ],
)
def test_the_fast_tower_equals_the_slow_one(
    model_dir: str, inputs: list[DecodedInput], together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, batches = vision.scaled_dot_product_attention, []

    def counted(query: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        batches.append(len(query))
        return kernel(query, *rest, **options)

    monkeypatch.setattr(vision, "scaled_dot_product_attention", counted)
    processor = Processor(model_dir, PROMPT)
    grouped = vectors_and_gradients(load_backbone(model_dir, tiny_model(model_dir)), processor, inputs)
    looped = vectors_and_gradients(AutoModel.from_pretrained(model_dir), processor, inputs)
    assert len(grouped) == len(looped) > 10
    for ours, theirs in zip(grouped, looped, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert batches[-len(together) :] == together  # in the last block: whole images and frames


@pytest.mark.parametrize("family", FAMILIES)
def test_the_device_is_asked_for_the_sizes_once_and_not_by_every_layer(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    by_length = vision.groupby

    def counted(lengths: list[int]) -> Any:
        asked.append(len(lengths))
        return by_length(lengths)

    monkeypatch.setattr(vision, "groupby", counted)
    model_dir = tiny_checkpoint(tmp_path, TINY.model_copy(update={"family": family, "vision_depth": 4}))
    model = tiny_model(model_dir).model_copy(update={"gradient_checkpointing": True})
    backbone: Any = load_backbone(model_dir, model).train()
    vectors_and_gradients(backbone, Processor(model_dir, PROMPT), images((60, 60), (120, 61)))
    # Qwen2.5-VL has layers that look at windows, and layers that look at whole images.
    assert len(asked) == (2 if family == "qwen2_5_vl" else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_by_a_product_equal_the_convolution(dtype: torch.dtype) -> None:
    for bias in (True, False):
        convolution = torch.nn.Conv3d(3, 24, (2, 5, 5), (2, 5, 5), bias=bias, dtype=dtype)
        patches = torch.randn(7, 3, 2, 5, 5, dtype=dtype)
        expected = convolution(patches)
        convolution.__class__ = vision.PatchProjection
        found = convolution(patches)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected)


def test_patches_larger_than_the_kernel_are_refused() -> None:
    projection = vision.PatchProjection(3, 24, (2, 5, 5), (2, 5, 5))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        projection(torch.randn(7, 3, 2, 10, 5))


def test_a_backbone_is_stored_without_it(model_dir: str, tmp_path: Path) -> None:
    load_backbone(model_dir, tiny_model(model_dir)).save_pretrained(tmp_path)
    assert vision.NAME not in (tmp_path / "config.json").read_text()
    visual = AutoModel.from_pretrained(tmp_path).visual
    assert visual.config._attn_implementation == "sdpa"
    assert type(visual.patch_embed.proj) is torch.nn.Conv3d
