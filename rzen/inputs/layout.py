"""Lay a batch out as the backbone's input: places, positions, and which tokens see which.

Padded: a row for each input, filled up on the right. Packed: all inputs end to end in one row. The vectors are the same
(tests/parity/test_embedder.py). Shapes: B inputs, L tokens of the longest, N tokens of all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rzen.config import ReadoutConfig
from rzen.families import part_of
from rzen.inputs.processor import GRID_KINDS, EncodedBatch


class BatchLayout:
    """One batch in one of the two forms, on the CPU. `backbone` is a model of `load_backbone`, also with adapters."""

    def __init__(self, batch: EncodedBatch, packed: bool) -> None:
        self.batch = batch
        self.packed = packed
        self.filled_BL = np.arange(batch.lengths.max()) < batch.lengths[:, None]

    def rows(self) -> Tensor:
        """Return the place of each token among the rows x columns of the input, int64 `[N]`."""
        size = len(self.batch.input_ids)
        return torch.arange(size) if self.packed else torch.tensor(np.flatnonzero(self.filled_BL))

    def tokens(self) -> Tensor:
        """Return token ids, int64 `[1, N]` if packed, else `[B, L]`."""
        return torch.tensor(self.batch.input_ids[None], dtype=torch.int64) if self.packed else self._padded_ids()

    def positions(self, backbone: Any, readout: ReadoutConfig) -> Tensor:
        """Return time, height and width of each token, int64 `[3, B, L]`, or `[4, 1, N]` if packed.

        The additional first row counts from 0 in each input. transformers reads from it where an input begins, and
        hands that to flash attention.
        """
        counts_BL = torch.arange(self.filled_BL.shape[1]).expand(self.filled_BL.shape)
        positions_3BL = counts_BL.expand(3, -1, -1)
        if readout.positions == "mrope" and len(self.batch.grids):
            positions_3BL = self._mrope(backbone)
        if not self.packed:
            return positions_3BL
        filled_BL = torch.tensor(self.filled_BL)
        return torch.cat([counts_BL[None], positions_3BL])[:, filled_BL][:, None]

    def mask(self, readout: ReadoutConfig, attention: str, dtype: torch.dtype) -> Tensor | None:
        """Return the attention mask for the backbone.

        None if causal: padding comes after the tokens, and positions separate packed inputs. If bidirectional, every
        token sees its own input. Flash attention gets `[B, L]` of the tokens to keep. Others get a mask that is
        broadcast, or none where nothing is left out.
        """
        everything = self.packed or bool(self.filled_BL.all())
        if readout.direction == "causal":
            return None
        if "flash" in attention:
            return None if everything else torch.tensor(self.filled_BL)
        if self.packed:
            inputs_N = torch.tensor(np.repeat(np.arange(len(self.batch)), self.batch.lengths))
            seen = (inputs_N[:, None] == inputs_N)[None, None]
        elif everything and attention == "sdpa":
            return None
        else:
            seen = torch.tensor(self.filled_BL)[:, None, None]
        # Eager attention adds its mask, and would be given a causal one for none.
        return seen if attention == "sdpa" else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)

    def _padded_ids(self) -> Tensor:
        ids_BL = np.zeros(self.filled_BL.shape, np.int64)
        ids_BL[self.filled_BL] = self.batch.input_ids
        return torch.tensor(ids_BL)

    def _mrope(self, backbone: Any) -> Tensor:
        """Return `[3, B, L]` by the rule of the backbone's class. On the CPU, because it reads the grids one by one."""
        ids_BL = self._padded_ids()
        types_BL = GRID_KINDS["image"] * (ids_BL == backbone.config.image_token_id)
        types_BL = types_BL + GRID_KINDS["video"] * (ids_BL == backbone.config.video_token_id)
        images, videos = (np.equal(self.batch.grid_kinds, GRID_KINDS[kind]) for kind in ("image", "video"))
        grids = torch.tensor(self.batch.grids, dtype=torch.int64)
        positions_3BL: Tensor = part_of(backbone, "get_rope_index")(
            input_ids=ids_BL,
            mm_token_type_ids=types_BL,
            image_grid_thw=grids[images],
            video_grid_thw=grids[videos],
            second_per_grid_ts=self.batch.grid_seconds[videos].tolist(),
            attention_mask=torch.tensor(self.filled_BL),
        )[0]
        return positions_3BL
