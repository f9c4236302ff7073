"""From encoded sides to unit vectors: backbone, last-token pooling after the final norm, L2 normalisation.

RzenEmbed (arXiv 2510.27350v1), section 3. Shapes: B sides, L tokens of the longest, P patches, D width of the vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rzen.processor import GRID_KINDS, EncodedBatch, VisionLayout


class Embedder(nn.Module):
    """One vector for each side: the hidden state of its last token, after the final norm, of length 1.

    `backbone` is a model of `load_backbone`, with or without adapters; `layout` comes from the same checkpoint.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, backbone: nn.Module, layout: VisionLayout) -> None:
        super().__init__()
        self.backbone = backbone
        for name in ("image_mean", "image_std"):
            values = torch.tensor(getattr(layout, name), dtype=torch.float32)
            self.register_buffer(name, values.view(1, -1, 1), persistent=False)

    def forward(self, batch: EncodedBatch) -> Tensor:
        """Vectors [B, D] of length 1 in fp32, on the embedder's device; equal to each side on its own (parity test)."""
        hidden_BLD = self.backbone(**self._inputs(batch), use_cache=False).last_hidden_state
        last_B = torch.tensor(batch.lengths - 1, dtype=torch.int64, device=hidden_BLD.device)
        rows_B = torch.arange(len(batch), device=hidden_BLD.device)
        return nn.functional.normalize(hidden_BLD[rows_B, last_B].float(), dim=-1)

    def _inputs(self, batch: EncodedBatch) -> dict[str, Tensor]:
        """Padded on the right. No attention mask: attention is causal, so that no token sees the padding after it."""
        config: Any = self.backbone.config
        device = self.image_mean.device
        filled_BL = np.arange(batch.lengths.max()) < batch.lengths[:, None]
        ids_BL = np.zeros(filled_BL.shape, np.int64)
        ids_BL[filled_BL] = batch.input_ids
        inputs = {"input_ids": torch.tensor(ids_BL, device=device)}
        if not len(batch.grids):
            return inputs
        types_BL = GRID_KINDS["image"] * (ids_BL == config.image_token_id)
        types_BL = types_BL + GRID_KINDS["video"] * (ids_BL == config.video_token_id)
        inputs["mm_token_type_ids"] = torch.tensor(types_BL, device=device)
        return inputs | self._visuals(batch, device)

    def _visuals(self, batch: EncodedBatch, device: torch.device) -> dict[str, Tensor]:
        """Pixels and grids of the images and of the videos, each in the order of their tokens."""
        patch_kinds_P = np.repeat(batch.grid_kinds, batch.grids.prod(axis=1))
        visuals = {}
        for kind, pixels, grids in (
            (GRID_KINDS["image"], "pixel_values", "image_grid_thw"),
            (GRID_KINDS["video"], "pixel_values_videos", "video_grid_thw"),
        ):
            chosen_V = np.equal(batch.grid_kinds, kind)
            if chosen_V.any():
                patches = batch.patches if chosen_V.all() else batch.patches[patch_kinds_P == kind]
                visuals[pixels] = self._normalised(torch.tensor(patches, device=device))
                visuals[grids] = torch.tensor(batch.grids[chosen_V], dtype=torch.int64, device=device)
        return visuals

    def _normalised(self, patches: Tensor) -> Tensor:
        """fp32 from uint8 [P, C * rest], bit for bit what the library's image processor gives."""
        values = patches.view(len(patches), self.image_mean.numel(), -1).float()
        return values.div_(255).sub_(self.image_mean).div_(self.image_std).flatten(1)
