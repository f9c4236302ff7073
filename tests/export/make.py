"""Exports of tiny models and the vectors that rzen's own encoder gives for `inputs.py`: what the checks compare with.

python -m tests.export.make OUT         in the project's environment
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from pipelines.samples import DecodedInput
from pipelines.samples import Visual as DecodedVisual
from rzen.config import LoraConfig, ModelIdentity, PromptConfig, ReadoutConfig, TinyBackbone
from rzen.export.export import ExportOptions, Format, export_model, load_encoder
from rzen.families import FAMILIES
from rzen.model.backbone import load_backbone
from rzen.model.checkpoints import checkpoint_sha256
from rzen.model.lora import add_lora, save_adapter
from tests.export.inputs import FRAMES, Input, make_inputs
from tests.tiny import tiny_checkpoint, tiny_model

PROMPT = PromptConfig(max_visual_tokens=400)
RELEASE = ModelIdentity(
    prompt=PromptConfig(template="rzen_release", max_visual_tokens=400), readout=ReadoutConfig(positions="1d")
)


def decoded(input: Input) -> DecodedInput:
    """As rzen takes it."""
    visuals = tuple(DecodedVisual(visual.kind, visual.pixels) for visual in input.visuals)
    return DecodedInput(text=input.text, instruction=input.instruction, visuals=visuals)


def trained_adapter(
    base: str, folder: Path, identity: ModelIdentity, seed: int = 0, *, rank: int = 3, std: float = 0.05
) -> Path:
    """An adapter whose B is not zero, as after training."""
    model = add_lora(load_backbone(base, tiny_model(base)), LoraConfig(rank=rank), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += std * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, folder, identity=identity, base=base, base_sha256=checkpoint_sha256(Path(base)))
    return folder


def export(
    out: Path, base: str, identity: ModelIdentity, format: Format = "model", dimensions: tuple[int, ...] = ()
) -> None:
    """A directory `out` in fp32, and `out.npz` with the vector of every input."""
    adapter = trained_adapter(base, out.with_name(f"{out.name}-adapter"), identity)
    options = ExportOptions(format=format, dtype="float32", frames=FRAMES, dimensions=dimensions)
    export_model(base, adapter, out, identity, options)
    processor, embedder = load_encoder(str(out))
    inputs = make_inputs(processor.layout.factor_px)
    vectors = {name: embedder(processor.encode([decoded(input)]))[0].numpy() for name, input in inputs.items()}
    np.savez(out.with_suffix(".npz"), **vectors)


def main(out: Path) -> None:
    """Writes everything into a new folder."""
    for family in FAMILIES:
        base = tiny_checkpoint(out / f"{family}-base", TinyBackbone(vocabulary=640, family=family))
        export(out / family, base, ModelIdentity(prompt=PROMPT))
        if family == "qwen2_vl":
            export(out / "rzen_release", base, RELEASE, "rzen_release")
    # vLLM's attention on CPUs takes no smaller heads.
    wide = TinyBackbone(vocabulary=640, hidden=256, heads=4, vision_width=256)
    export(out / "vllm", tiny_checkpoint(out / "vllm-base", wide), ModelIdentity(prompt=PROMPT), dimensions=(64,))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
