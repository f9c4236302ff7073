"""Exports in sentence-transformers and in transformers' AutoModel and AutoProcessor, images and videos too.

    python -m tests.export.check_sentence_transformers OUT

needs torch, torchvision, transformers and sentence-transformers, and the folder that `make.py` has written. Of rzen it
imports nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

from tests.export.inputs import Input, make_inputs
from tests.export.report import largest, report

TOKEN_PX = {"qwen2_vl": 28, "qwen2_5_vl": 28, "qwen3_vl": 32, "qwen3_5": 32}
NOTES = """\
Largest difference from rzen's own vectors in fp32, on tiny backbones of the real classes with a merged adapter. ST is
sentence-transformers as its users call it, one input at a time. AutoModel is the chat template, AutoProcessor,
AutoModel and the last state of the last token. Both resize images with Pillow, as rzen, and videos with torchvision,
which rounds otherwise ("video, resized"). "batch" is all inputs but the resized video at once, padded."""


def parts(input: Input) -> dict[str, Any]:
    """An input as sentence-transformers takes it."""
    found: dict[str, Any] = {}
    if images := [Image.fromarray(v.pixels[0]) for v in input.visuals if v.kind != "video"]:
        found["image"] = images
    if videos := [v.pixels.transpose(0, 3, 1, 2) for v in input.visuals if v.kind == "video"]:
        found = {"video": videos[0]} | found
    return found | ({"text": input.text} if input.text else {})


def by_sentence_transformers(folder: Path, inputs: dict[str, Input], expected: Any) -> dict[str, float | str]:
    """Kind of input -> difference."""
    model = SentenceTransformer(str(folder), device="cpu")
    found: dict[str, float | str] = {}
    for name, input in inputs.items():
        vector = model.encode([parts(input)], prompt=input.instruction or None)[0]
        found[name] = float(np.abs(vector - expected[name]).max())
    together = [name for name, input in inputs.items() if not input.instruction and "video, resized" not in name]
    vectors = model.encode([parts(inputs[name]) for name in together], batch_size=len(together))
    found["batch"] = float(max(np.abs(v - expected[name]).max() for v, name in zip(vectors, together, strict=True)))
    return found


def by_auto_model(folder: Path, inputs: dict[str, Input], expected: Any) -> dict[str, float | str]:
    """Kind of input -> difference."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder, use_fast=False)
    found: dict[str, float | str] = {}
    for name, input in inputs.items():
        content = [
            {"type": kind, kind: value}
            for kind, values in parts(input).items()
            for value in (values if isinstance(values, list) else [values])
        ]
        messages = [{"role": "user", "content": content}]
        if input.instruction:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": input.instruction}]})
        inputs = processor.apply_chat_template([messages], tokenize=True, return_dict=True, return_tensors="pt")
        inputs.pop("video_metadata", None)
        with torch.no_grad():
            state = model(**inputs).last_hidden_state[0, -1]
        vector = torch.nn.functional.normalize(state, dim=0).numpy()
        found[name] = float(np.abs(vector - expected[name]).max())
    return found


def main(out: Path) -> None:
    """Writes the result beside this file."""
    columns: dict[str, dict[str, float | str]] = {}
    for family, token_px in TOKEN_PX.items():
        inputs = make_inputs(token_px)
        expected = np.load(out / f"{family}.npz")
        columns[f"ST {family}"] = by_sentence_transformers(out / family, inputs, expected)
        columns[f"AutoModel {family}"] = by_auto_model(out / family, inputs, expected)
    packages = ("torch", "torchvision", "transformers", "sentence-transformers")
    text = report("Exports in sentence-transformers and AutoModel", packages, columns, NOTES)
    print(text)
    Path(__file__).with_name("sentence_transformers.md").write_text(text)
    exact = {title: column | {"video, resized": ""} for title, column in columns.items()}
    if largest(exact) > 1e-5:
        sys.exit("more than 1e-5")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
