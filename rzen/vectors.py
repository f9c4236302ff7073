"""The representation of an input: one vector of length 1. This module and the similarity know its shape, others do not.

Everything between the model and the loss calls these functions, so that another representation is a change here and in
`rzen.objective.similarity`. All functions treat dimension 0 as the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

Vectors = Tensor
"""`[rows, width]`, floating point, each row of length 1 (L2)."""


def unit_vectors(pooled: Tensor) -> Vectors:
    """Scale each pooled hidden state `[rows, width]` to length 1."""
    return normalize(pooled, dim=-1)


def width(vectors: Vectors) -> int:
    """Return the number of values of one vector."""
    return vectors.shape[-1]


def cut(vectors: Vectors, dims: int) -> Vectors:
    """Return the first `dims` values of each vector as a vector of length 1 (Matryoshka)."""
    return vectors if dims == width(vectors) else normalize(vectors[..., :dims], dim=-1)


def concat(parts: Sequence[Vectors]) -> Vectors:
    """Join the rows of all parts, in order."""
    return torch.cat(list(parts))


def take(vectors: Vectors, rows: Tensor | slice) -> Vectors:
    """Return the chosen rows, in the order in which they are named."""
    return vectors[rows]


def zeros(like: Vectors, num_rows: int, per_row: int) -> Tensor:
    """Return room for `per_row` vectors of each of `num_rows` rows, filled with zeros."""
    return like.new_zeros(num_rows, per_row, *like.shape[1:])


def widen(vectors: Vectors) -> Vectors:
    """Return the vectors in fp32, or in their own type where it is wider."""
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))


def to_device(vectors: npt.NDArray[np.float32], device: torch.device) -> Vectors:
    """Return stored vectors in fp32, without a copy where torch may have the memory: not of a read-only map."""
    return torch.from_numpy(np.require(vectors, np.float32, ["C", "W"])).to(device)


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply in fp32 on GPUs, too. TF32 rounds to 10 bits, and ties would break."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
