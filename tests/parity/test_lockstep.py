"""The blank input that keeps ranks in step: it calls all there is, and leaves the other inputs alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rzen.families import FAMILIES
from rzen.inputs.processor import EncodedBatch, Processor
from rzen.model.backbone import load_backbone
from rzen.model.embedding_model import EmbeddingModel
from rzen.training.lockstep import align_chunk_counts, dummy_input
from tests.tiny import PROMPT, TINY, mixed_inputs, tiny_checkpoint, tiny_model


@pytest.mark.parametrize(
    ("family", "packing"),
    [(name, packing) for name, family in FAMILIES.items() for packing in ["padded", *["packed"] * family.packs]],
)
def test_a_blank_input_reaches_every_parameter_and_changes_no_vector(family: str, packing: str, tmp_path: Path) -> None:
    model_dir = tiny_checkpoint(tmp_path, TINY.model_copy(update={"family": family}))
    processor = Processor(model_dir, PROMPT)
    model = tiny_model(model_dir).model_copy(update={"packing": packing})
    embedder = EmbeddingModel(load_backbone(model_dir, model), processor.layout, packing=model.packing)
    blank, inputs = dummy_input(embedder.backbone), processor.encode(mixed_inputs())
    with torch.no_grad():
        found = embedder(EncodedBatch.concat([inputs, blank]))
        torch.testing.assert_close(found[:-1], embedder(inputs), atol=2e-6, rtol=0)
    embedder(blank)[0, 0].backward()
    without = [name for name, value in embedder.named_parameters() if value.grad is None]
    assert without == []


def test_every_chunk_ends_with_the_blank_input() -> None:
    chunks = align_chunk_counts([np.array([3, 1]), np.array([0, 2])], 4, torch.device("cpu"))
    assert [chunk.tolist() for chunk in chunks] == [[3, 1, 4], [0, 2, 4]]
