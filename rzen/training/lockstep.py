"""ZeRO stage 3: make every rank call the same modules in the same order, whatever its share of the batch is.

Stage 3 gathers the weights of a module from all ranks when it is called. A rank without visuals, or with fewer chunks,
would not call what the others call. All ranks would then wait for each other indefinitely.

So each chunk gets a dummy input, with the smallest image and video. Ranks with fewer chunks get chunks of only that.
Its vectors are dropped, so that its gradients are zero. The step stays that of the samples
(tests/parity/test_deepspeed.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rzen.inputs.processor import GRID_KINDS, EncodedBatch
from rzen.model.chunks import Indices


def dummy_input(backbone: Any) -> EncodedBatch:
    """Return an input of six tokens, with an image and a video of one token each."""
    config = backbone.config
    vision = config.vision_config
    merged = vision.spatial_merge_size
    ids = [
        token
        for visual in (config.image_token_id, config.video_token_id)
        for token in (config.vision_start_token_id, visual, config.vision_end_token_id)
    ]
    return EncodedBatch(
        input_ids=np.array(ids, np.int32),
        instruction=np.zeros(len(ids), np.bool_),
        lengths=np.array([len(ids)], np.int32),
        visual_counts=np.array([2], np.int32),
        patches=np.zeros((2 * merged**2, 3 * vision.patch_size**2), np.uint8),
        patch_frames=np.ones(2, np.uint8),
        grids=np.array([[1, merged, merged]] * 2, np.int32),
        grid_kinds=np.array([GRID_KINDS["image"], GRID_KINDS["video"]], np.uint8),
        grid_seconds=np.ones(2, np.float32),
    )


def align_chunk_counts(chunks: Sequence[Indices], blank: int, device: torch.device) -> list[Indices]:
    """Return the chunks with input `blank` at the end of each, equally many on every rank. A collective."""
    num_chunks = torch.tensor(len(chunks), device=device)
    if dist.is_initialized():
        dist.all_reduce(num_chunks, dist.ReduceOp.MAX)
    none = np.zeros(0, np.int64)
    return [np.append(chunk, blank) for chunk in [*chunks, *[none] * (int(num_chunks) - len(chunks))]]
