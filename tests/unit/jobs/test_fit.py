"""What the driver of a training run refuses before any worker starts."""

from pathlib import Path
from typing import Any

import pytest

from jobs.training.specs import TrainSpec
from jobs.training.start import check_backbone
from pipelines.errors import UserError
from rzen.config import TinyBackbone
from tests.tiny import TINY, tiny_checkpoint


def spec(backbone: Any, **model: Any) -> TrainSpec:
    fields: dict[str, Any] = {
        "kind": "train",
        "name": "r",
        "run": {"root": "runs"},
        "data": {"root": "data"},
        "model": {"backbone": backbone} | model,
    }
    return TrainSpec.model_validate(fields)


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"packing": "packed"}, r"^model.packing=packed: Qwen3.5 cannot be packed: .*; set packing: auto, which pads"),
        ({"readout": {"direction": "bidirectional"}}, r"^model.readout.direction=bidirectional: Qwen3.5 cannot be bi"),
    ],
)
def test_what_a_family_cannot_do_is_refused_before_workers_start(
    tmp_path: Path, model: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tiny_checkpoint(tmp_path, TinyBackbone(**TINY.model_dump() | {"family": "qwen3_5"}))
    for backbone in ({"family": "qwen3_5"}, local):
        with pytest.raises(UserError, match=problem):
            check_backbone(spec(backbone, **model))
        check_backbone(spec(backbone))
    check_backbone(spec({"family": "qwen3_vl"}, **model))
    missing = spec("rzen/no-such-model", **model)
    with pytest.raises(UserError, match=r"^model.backbone=rzen/no-such-model: is no directory, and the hub does not"):
        check_backbone(missing)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_backbone(missing)  # workers of a cluster may have it
