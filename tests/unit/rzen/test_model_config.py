from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModel, PreTrainedModel

from pipelines.errors import UserError
from rzen.config import LoraConfig, ModelConfig, ModelIdentity, PromptConfig, ReadoutConfig
from rzen.export.weights import write_backbone
from rzen.model import backbone
from rzen.model.activations import meta_backbone, read_config
from rzen.model.backbone import build_tiny, load_backbone
from rzen.model.checkpoints import read_identity
from rzen.model.loading import LOADING
from rzen.model.lora import add_lora, load_adapter, save_adapter
from tests.tiny import TINY, tiny_checkpoint, tiny_model


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"quantize": "nf4", "tune": "full"}, "quantize=nf4 freezes the weights, so that it needs tune=lora"),
        ({"attention": "flash_attention_2", "dtype": "float32"}, "attention=flash_attention_2 has no float32"),
    ],
)
def test_what_cannot_work_together_is_refused(settings: dict[str, str], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        ModelConfig.model_validate({"backbone": "tiny"} | settings)


@pytest.mark.skipif(
    bool(importlib.util.find_spec("bitsandbytes")) and torch.cuda.is_available(), reason="quantizing is possible here"
)
def test_quantizing_without_what_it_needs_is_the_users_error(tmp_path: Path) -> None:
    model_dir = tiny_checkpoint(tmp_path)
    model = tiny_model(model_dir).model_copy(update={"quantize": "nf4"})
    with pytest.raises(UserError, match=r"model.quantize=nf4: is impossible here: .*; install the extra rzen\[qlora\]"):
        load_backbone(model_dir, model)


def test_threads_load_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loads of transformers at once leave its classes changed: later models have tied weights without values."""
    model_dir = tiny_checkpoint(tmp_path)
    loading: list[int] = []
    most = []

    class Watched(AutoModel):  # type: ignore[misc]
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            loading.append(1)
            most.append(len(loading))
            time.sleep(0.05)
            found = super().from_pretrained(*args, **kwargs)
            loading.pop()
            return found

    monkeypatch.setattr(backbone, "AutoModel", Watched)
    tie = PreTrainedModel.tie_weights
    with ThreadPoolExecutor(3) as threads:
        models = list(threads.map(lambda _: load_backbone(model_dir, tiny_model(model_dir)), range(3)))
    assert most == [1, 1, 1]
    assert PreTrainedModel.tie_weights is tie
    assert all(not parameter.is_meta for model in models for parameter in model.parameters())


def test_whatever_makes_a_model_waits_for_a_load(tmp_path: Path) -> None:
    model_dir = tiny_checkpoint(tmp_path / "base")
    model = tiny_model(model_dir)
    adapted = add_lora(load_backbone(model_dir, model), LoraConfig(rank=2), seed=0)
    save_adapter(adapted, tmp_path / "adapter", identity=ModelIdentity(), base=model_dir, base_sha256="ab")
    bare = [load_backbone(model_dir, model) for _ in range(3)]
    (tmp_path / "written").mkdir()
    calls: list[Callable[[], Any]] = [
        lambda: load_backbone(model_dir, model),
        lambda: load_adapter(bare[0], tmp_path / "adapter"),
        lambda: add_lora(bare[1], LoraConfig(rank=2), seed=0),
        lambda: write_backbone(bare[2], Path(model_dir), tmp_path / "written", "float32"),
        lambda: meta_backbone(read_config(model_dir), model),
        lambda: build_tiny(tmp_path / "tiny", TINY, ["a text"]),
    ]
    with ThreadPoolExecutor(len(calls)) as threads:
        with LOADING:
            made = [threads.submit(call) for call in calls]
            assert not wait(made, timeout=1.0).done
        for one in made:
            one.result()


def test_an_identity_is_read_back_and_falls_back_to_the_default_where_nothing_is_said(tmp_path: Path) -> None:
    said = ModelIdentity(prompt=PromptConfig(max_visual_tokens=7), readout=ReadoutConfig(positions="1d"))
    default = ModelIdentity(prompt=PromptConfig(max_visual_tokens=9), readout=ReadoutConfig(pooling="mean"))
    assert read_identity(tmp_path, default) == default
    path = tmp_path / "rzen.json"
    path.write_text(json.dumps({"base_sha256": "ab"}))
    assert read_identity(tmp_path, default) == default
    path.write_text(json.dumps(said.model_dump() | {"dtype": "float32"}))
    assert read_identity(tmp_path, default) == said
    path.write_text(json.dumps({"prompt": said.prompt.model_dump(), "pooling": "last_token"}))
    assert read_identity(tmp_path, default) == ModelIdentity(prompt=said.prompt)
