"""Visuals of the test inputs as transformers' own image processor gives them to its models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipelines.samples import Visual


def library_visuals(visuals: Sequence[Visual], family: Any) -> dict[str, Tensor]:
    images = [library_frame(v.frames[0], 4, 24, family) for v in visuals if v.kind != "video"]
    videos = [library_video(v.frames, family) for v in visuals if v.kind == "video"]
    arguments = {}
    if images:
        arguments["pixel_values"] = torch.cat([pixels for pixels, _ in images])
        arguments["image_grid_thw"] = torch.tensor([[1, *size] for _, size in images])
    if videos:
        arguments["pixel_values_videos"] = torch.cat([pixels for pixels, _ in videos])
        arguments["video_grid_thw"] = torch.tensor([grid for _, grid in videos])
    return arguments


def library_frame(frame: np.ndarray, low_tokens: int, high_tokens: int, family: Any) -> tuple[Tensor, list[int]]:
    token_pixels = (2 * family.patch_px) ** 2
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": low_tokens * token_pixels, "longest_edge": high_tokens * token_pixels},
        patch_size=family.patch_px,
        image_mean=list(family.image_mean),
        image_std=list(family.image_std),
    )
    output = image_processor(images=[Image.fromarray(frame)], return_tensors="pt")
    return output["pixel_values"].float(), output["image_grid_thw"][0, 1:].tolist()


def library_video(frames: np.ndarray, family: Any) -> tuple[Tensor, list[int]]:
    """Two images at a time become the two frames of a temporal patch; 24 tokens are shared by the groups.

    The library's own video processors need torchvision, for which there is no CPU build.
    """
    frames = np.concatenate([frames, frames[-1:]]) if len(frames) % 2 else frames
    groups, patch = len(frames) // 2, family.patch_px
    singles = [library_frame(frame, 4, 24 // groups, family) for frame in frames]
    pixels = torch.stack([pixels.view(-1, 3, 2, patch, patch)[:, :, 0] for pixels, _ in singles])
    pairs = torch.stack([pixels[0::2], pixels[1::2]], dim=3)
    return pairs.reshape(-1, 3 * 2 * patch * patch), [groups, *singles[0][1]]
