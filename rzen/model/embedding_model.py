"""The model: encoded inputs become vectors of length 1. Backbone, pooling after the final norm, L2 normalization.

The default is RzenEmbed (arXiv 2510.27350v1, section 3); settings give U-MARVEL (arXiv 2507.14902). Shapes: B inputs,
N tokens of all inputs, P patches of T frames, F frames that were sent, C channels, D width of a hidden state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipelines.errors import UserError
from rzen.config import Packing, ReadoutConfig
from rzen.families import family_of, part_of
from rzen.inputs.layout import BatchLayout
from rzen.inputs.processor import GRID_KINDS, EncodedBatch, VisionLayout
from rzen.vectors import Vectors, unit_vectors


class SequenceModel(nn.Module):
    """Encoded inputs to hidden states after the final norm.

    `backbone` is a model of `load_backbone`, with or without adapters. Its attention is switched in place to the
    direction of `readout`. `layout` comes from the same checkpoint, `readout` from its identity. `packing` changes
    speed only. Raises `UserError` for what the family of the backbone cannot do.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        layout: VisionLayout,
        readout: ReadoutConfig | None = None,
        packing: Packing = "auto",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.readout = readout or ReadoutConfig()
        self.packing = packing
        self._frames_of_patch = layout.temporal_patch_frames
        self._family = family_of(backbone)
        self._family.check(self.readout, packing)
        _set_direction(backbone, self.readout)
        for name in ("image_mean", "image_std"):
            values = torch.tensor(getattr(layout, name), dtype=torch.float32)
            self.register_buffer(name, values.view(1, -1, 1), persistent=False)

    @property
    def packs(self) -> bool:
        """Whether inputs lie end to end, without padding."""
        if self.packing != "auto":
            return self.packing == "packed"
        backbone: Any = self.backbone
        return self._family.packs and "flash" in backbone.config._attn_implementation

    def hidden(self, batch: EncodedBatch, **visuals: Any) -> tuple[Tensor, Tensor]:
        """Return hidden states `[places, D]`, and the place of each token, int64 `[N]`.

        `visuals` are the backbone's arguments for pixels or for what its vision tower made of them.
        """
        backbone: Any = self.backbone
        device, attention = self.image_mean.device, backbone.config._attn_implementation
        layout = BatchLayout(batch, self.packs)
        mask = layout.mask(self.readout, attention, backbone.dtype)
        hidden = backbone(
            input_ids=layout.tokens().to(device),
            # Always given: left to itself, Qwen2.5-VL falls back to 1-D positions, and the others may reuse old ones.
            position_ids=layout.positions(backbone, self.readout).to(device),
            attention_mask=None if mask is None else mask.to(device),
            use_cache=False,
            **visuals,
        ).last_hidden_state
        return hidden.flatten(0, 1), layout.rows().to(device)

    def pixels(self, batch: EncodedBatch) -> dict[str, Tensor]:
        """Return pixels and grids of the images and of the videos, each in the order of their tokens."""
        device = self.image_mean.device
        patch_kinds_P = np.repeat(batch.grid_kinds, batch.grids.prod(axis=1))
        frames = torch.tensor(batch.patches, device=device)
        frames_PT = frames_of_patches(batch, self._frames_of_patch)
        visuals = {}
        for kind, pixels, grids in (
            (GRID_KINDS["image"], "pixel_values", "image_grid_thw"),
            (GRID_KINDS["video"], "pixel_values_videos", "video_grid_thw"),
        ):
            chosen_V = np.equal(batch.grid_kinds, kind)
            if chosen_V.any():
                chosen_PT = torch.tensor(frames_PT[patch_kinds_P == kind], device=device)
                visuals[pixels] = normalized_patches(frames, chosen_PT, self.image_mean, self.image_std)
                visuals[grids] = torch.tensor(batch.grids[chosen_V], dtype=torch.int64, device=device)
        return visuals


class EmbeddingModel(SequenceModel):
    """One vector for each input, pooled after the final norm: its last token, or the mean of its tokens."""

    def forward(self, batch: EncodedBatch) -> Vectors:
        """Return the vectors of B inputs in fp32, on the model's device, equal to those of each input on its own.

        tests/parity/test_embedder.py proves it against transformers.
        """
        hidden, rows_N = self.hidden(batch, **self.pixels(batch))
        return unit_vectors(_pool(hidden, rows_N, batch, self.readout))


def frames_of_patches(batch: EncodedBatch, num_frames: int) -> npt.NDArray[np.int64]:
    """Return [P, T]: which of the frames in `batch.patches` are the `num_frames` frames of each patch.

    The only frame of a still picture is repeated.
    """
    sent_P = np.repeat(batch.patch_frames, batch.grids.prod(axis=1)).astype(np.int64)
    starts_P = np.cumsum(sent_P) - sent_P
    return starts_P[:, None] + np.minimum(np.arange(num_frames), sent_P[:, None] - 1)


def normalized_patches(frames: Tensor, frames_PT: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return fp32 pixels [P, C * T * rest], bit for bit what the library's image processor gives.

    `frames` are uint8 [F, C * rest], `frames_PT` those of each patch, `mean` and `std` `[1, C, 1]`.
    """
    channels = mean.numel()
    patches = frames.view(len(frames), channels, -1)[frames_PT].transpose(1, 2).flatten(2)
    return patches.float().div_(255).sub_(mean).div_(std).flatten(1)


def _pool(hidden: Tensor, rows_N: Tensor, batch: EncodedBatch, readout: ReadoutConfig) -> Tensor:
    """Return fp32 [B, D] from the hidden states of all places of the input. `rows_N` are the places of the tokens."""
    if readout.pooling == "last_token":
        return hidden[rows_N[torch.tensor(np.cumsum(batch.lengths) - 1, device=hidden.device)]].float()
    counted_N = torch.tensor(~batch.instruction, device=hidden.device)
    starts_B = np.cumsum(batch.lengths) - batch.lengths
    counts_B = batch.lengths - np.add.reduceat(batch.instruction, starts_B, dtype=np.int32)
    # One by one: adding up by index would take another order, and give other last digits, at every call on a GPU.
    return torch.stack([own.float().mean(dim=0) for own in torch.split(hidden[rows_N[counted_N]], counts_B.tolist())])


def _set_direction(backbone: nn.Module, readout: ReadoutConfig) -> None:
    """Let attention of the language model go one way or both, in place.

    Without this the mask alone would decide: where none is needed, attention would be causal all the same. Raises
    `UserError` where a layer has no such switch.
    """
    family = family_of(backbone)
    if not family.bidirectional:
        return  # always causal; the family refuses everything else
    for number, layer in enumerate(part_of(backbone, "language_model.layers")):
        reached = [module for module in layer.modules() if hasattr(module, "is_causal")]
        if not reached:
            problem = f"has no is_causal in language_model.layers.{number}"
            raise UserError(f"backbone {family.title}", problem, "set bidirectional=False in its entry of FAMILIES")
        for module in reached:
            module.is_causal = readout.direction == "causal"
