"""The model of a re-ranker: joint sequences become one number each, the log-odds of yes against no.

z = h_last (w_yes - w_no), which is the difference of the two logits of the whole model, and sigmoid(z) is the softmax
over the two (tests/parity/test_reranker.py). Shapes: B pairs, n tokens of a medium, D width of a hidden state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from rzen.config import Packing
from rzen.families import part_of
from rzen.inputs.processor import GRID_KINDS, EncodedBatch, VisionLayout
from rzen.model.embedding_model import SequenceModel
from rzen.reranking.encoder import JointBatch


@dataclass(frozen=True)
class MediumFeatures:
    """What the vision tower makes of one medium."""

    tokens: Tensor
    """[n, D], which replace the embeddings of its tokens."""
    deepstack: tuple[Tensor, ...]
    """[n, D] each, which are added after the first language layers (Qwen3-VL). Empty in other families."""


class ScoringModel(SequenceModel):
    """One number for each pair. `direction` is that of `answer_direction`, and is moved with the model.

    `trained_answers` are the tokens of yes and no where the head is tied to token embeddings that are trained. The
    direction is then that of the embeddings as they are, with their gradient.
    """

    direction: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        layout: VisionLayout,
        direction: Tensor,
        packing: Packing = "auto",
        *,
        trained_answers: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(backbone, layout, packing=packing)
        self.trained_answers = trained_answers
        self.register_buffer("direction", direction, persistent=False)

    def features(self, media: Sequence[EncodedBatch]) -> list[MediumFeatures]:
        """Return the features of media, each an input with one visual, from one call of the tower for each kind."""
        if not media:
            return []
        batch = EncodedBatch.concat(media)
        pixels = self.pixels(batch)
        found: dict[int, Iterator[MediumFeatures]] = {}
        for kind, number in GRID_KINDS.items():
            values = pixels.get("pixel_values" if kind == "image" else "pixel_values_videos")
            if values is not None:
                extract = part_of(self.backbone, f"get_{kind}_features")
                found[number] = _by_medium(extract(values, pixels[f"{kind}_grid_thw"], return_dict=True))
        return [next(found[number]) for number in batch.grid_kinds.tolist()]

    def forward(self, sequences: EncodedBatch, features: Sequence[MediumFeatures]) -> Tensor:
        """Return z, fp32 `[B]`, on the model's device. `features` are in the order of the visuals' tokens.

        It does not depend on the other pairs of the batch.
        """
        outputs = {
            name: _joined(
                [features[visual] for visual in np.flatnonzero(np.equal(sequences.grid_kinds, kind)).tolist()]
            )
            for name, kind in GRID_KINDS.items()
            if kind in sequences.grid_kinds
        }
        hidden, rows_N = self.hidden(sequences, **({"mm_encoder_outputs": outputs} if outputs else {}))
        last_B = torch.tensor(np.cumsum(sequences.lengths) - 1, device=hidden.device)
        # One product for each pair: a product of matrices may add up in another order for another number of rows.
        return (hidden[rows_N[last_B]].float() * self._direction()).sum(dim=1)

    def _direction(self) -> Tensor:
        if self.trained_answers is None:
            return self.direction
        # By the module, and not by its weight, of which ZeRO stage 3 holds a piece only.
        embed = part_of(self.backbone, "language_model.embed_tokens")
        rows: Tensor = embed(torch.tensor(self.trained_answers, device=self.direction.device)).float()
        return rows[0] - rows[1]

    def score(self, batch: JointBatch) -> Tensor:
        """Return z of all pairs of a batch at once."""
        features = dict(zip(batch.media, self.features(list(batch.media.values())), strict=True))
        z_B: Tensor = self(batch.sequences, [features[key] for key in batch.shown])
        return z_B


def _by_medium(output: Any) -> Iterator[MediumFeatures]:
    deepstack = getattr(output, "deepstack_features", None) or []
    for number, tokens in enumerate(output.pooler_output):
        yield MediumFeatures(tokens, tuple(layer[number] for layer in deepstack))


def _joined(features: Sequence[MediumFeatures]) -> Any:
    """Return features of one kind as the tower's output, which transformers' models take instead of pixels."""
    output = BaseModelOutputWithPooling(pooler_output=[one.tokens for one in features])
    output.deepstack_features = [list(layer) for layer in zip(*(one.deepstack for one in features), strict=True)]
    return output
