"""The inputs of the checks, of every kind, as plain data that any environment can build.

Sizes are whole tokens, so that nothing is resized, but for those whose name says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

TEXT = "Which page shows the grey cross? Find it, please."
INSTRUCTION = "Find what matches the given side."
FRAMES = 4


@dataclass(frozen=True)
class Visual:
    """`kind` is image, document or video; `pixels` uint8 [T, H, W, 3]."""

    kind: str
    pixels: Any


@dataclass(frozen=True)
class Input:
    """One input."""

    text: str = ""
    instruction: str = ""
    visuals: tuple[Visual, ...] = ()


def noise(kind: str, frames: int, height_px: int, width_px: int, seed: int) -> Visual:
    """A visual of random pixels."""
    shape = (frames, height_px, width_px, 3)
    return Visual(kind, np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def make_inputs(token_px: int) -> dict[str, Input]:
    """By kind, for a family whose tokens cover `token_px` x `token_px` pixels."""

    def visual(kind: str, height_tokens: int, width_tokens: int, seed: int) -> Visual:
        frames = FRAMES if kind == "video" else 1
        return noise(kind, frames, height_tokens * token_px, width_tokens * token_px, seed)

    image, page, video = visual("image", 2, 3, 0), visual("document", 4, 3, 1), visual("video", 2, 3, 2)
    wide = visual("video", 8, 21, 6)  # frames of 168 tokens, which the released script wants
    photo, scan, clip = (
        noise("image", 1, 61, 97, 3),
        noise("document", 1, 771, 593, 4),
        noise("video", FRAMES, 59, 83, 5),
    )
    return {
        "text": Input(TEXT),
        "text, instruction": Input(TEXT, INSTRUCTION),
        "image": Input(visuals=(image,)),
        "image, resized": Input(visuals=(photo,)),
        "page": Input(instruction=INSTRUCTION, visuals=(page,)),
        "page, shrunk": Input(visuals=(scan,)),
        "video": Input(visuals=(video,)),
        "video of large frames": Input(visuals=(wide,)),
        "video, resized": Input(visuals=(clip,)),
        "image + text": Input(TEXT, INSTRUCTION, (image,)),
        "two images + text": Input(TEXT, "", (image, photo)),
        "video + image + text": Input(TEXT, INSTRUCTION, (video, image)),
    }
