"""Inputs of a shape without content, to find out what a chunk of them takes."""

from __future__ import annotations

from typing import Any

import numpy as np

from rzen.inputs.processor import GRID_KINDS, EncodedBatch
from rzen.model.activations import ChunkInputs


def example_batch(config: Any, inputs: ChunkInputs) -> EncodedBatch:
    """Return inputs of this shape without content, for a backbone of this configuration."""
    vision, count, tokens = config.vision_config, inputs.count, inputs.visual_tokens
    visual = (
        [config.vision_start_token_id, *[config.image_token_id] * tokens, config.vision_end_token_id] if tokens else []
    )
    ids = [0] * (inputs.tokens - len(visual)) + visual
    edge = vision.spatial_merge_size
    frame_values = vision.in_channels * vision.patch_size**2
    num_visuals = count if tokens else 0
    return EncodedBatch(
        input_ids=np.array(ids * count, np.int32),
        instruction=np.zeros(len(ids) * count, np.bool_),
        lengths=np.full(count, len(ids), np.int32),
        visual_counts=np.full(count, int(tokens > 0), np.int32),
        patches=np.zeros((num_visuals * tokens * edge**2, frame_values), np.uint8),
        patch_frames=np.ones(num_visuals, np.uint8),
        grids=np.array([[1, edge, edge * tokens]] * num_visuals, np.int32).reshape(-1, 3),
        grid_kinds=np.full(num_visuals, GRID_KINDS["image"], np.uint8),
        grid_seconds=np.zeros(num_visuals, np.float32),
    )
