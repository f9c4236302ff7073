"""An export for the inference script released with RzenEmbed, in that script.

    python -m tests.export.check_release OUT SCRIPT

needs torch, transformers 4.51 and the script, `rzen_embed_inference.py` of github.com/360CVGroup/RzenEmbed, and the
folder that `make.py` has written. Of rzen it imports nothing. The script computes in bfloat16; to compare in fp32, the
class that loads its model is told to, and nothing else of it is changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration

from tests.export.inputs import Input, make_inputs
from tests.export.report import largest, report

NOTES = """\
Largest difference from rzen's own vectors in fp32, on a tiny Qwen2-VL with a merged adapter, exported with
`format: rzen_release` and loaded by the released script (sha256 {sha256}). "bf16" is the script as it is,
which rounds weights, pixels and states to bfloat16; "fp32" is the script with a model loaded in fp32. The script feeds
a video as images of 160 to 180 tokens, as does the prompt `rzen_release`; several images are a video to it, but for
this check they are sized as images. It resizes twice what is neither whole tokens nor within its limits, first by its
own rule: "page, shrunk" and "video, resized"."""
RESIZED_TWICE = ("page, shrunk", "video, resized")


class InFp32(Qwen2VLForConditionalGeneration):
    """Loads weights in fp32 whatever it is told."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As the class that the script imports."""
        return Qwen2VLForConditionalGeneration.from_pretrained(*args, **(kwargs | {"torch_dtype": torch.float32}))


def load(script: Path) -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("rzen_embed_inference", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def differences(model: Any, expected: Any) -> dict[str, float | str]:
    """Kind of input -> difference."""
    found: dict[str, float | str] = {}
    for name, input in make_inputs(28).items():
        vector = embed(model, input)
        found[name] = "not taken" if vector is None else float(np.abs(vector - expected[name]).max())
    return found


def embed(model: Any, input: Input) -> Any:
    """Its vector; None for an input that the script cannot take: a video beside an image.

    The script puts nothing between instruction and text.
    """
    kinds = {visual.kind == "video" for visual in input.visuals}
    if len(kinds) > 1:
        return None
    images = [Image.fromarray(frame) for visual in input.visuals for frame in visual.pixels]
    given: Any = images if len(images) > 1 else images[0] if images else None
    words = " ".join(part for part in (input.instruction, input.text) if part)
    several_images = kinds == {False} and len(images) > 1
    if several_images:
        model.qwen2vl_video_processor, kept = model.processor, model.qwen2vl_video_processor
    vector = model.embed(texts=[words or None], images=[given])[0].float().numpy()
    if several_images:
        model.qwen2vl_video_processor = kept
    return vector


def main(out: Path, script: Path) -> None:
    """Writes the result beside this file."""
    expected = np.load(out / "rzen_release.npz")
    columns = {}
    for title in ("fp32", "bf16"):
        module = load(script)
        if title == "fp32":
            module.Qwen2VLForConditionalGeneration = InFp32
        limits = {"min_image_tokens": 4, "max_image_tokens": 400}  # as the tiny model was trained
        model = module.RzenEmbed(str(out / "rzen_release"), device="cpu", attn_implementation="sdpa", **limits)
        columns[title] = differences(model, expected)
    notes = NOTES.format(sha256=hashlib.sha256(script.read_bytes()).hexdigest()[:16])
    text = report("An export in the released script", ("torch", "transformers"), columns, notes)
    print(text)
    Path(__file__).with_name("release.md").write_text(text)
    exact = {name: value for name, value in columns["fp32"].items() if name not in RESIZED_TWICE}
    if largest({"fp32": exact}) > 1e-5:
        sys.exit("more than 1e-5")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
