"""Vectors as an index of few bits would see them, with a gradient: rounded forward, straight-through backward.

Both functions return vectors of length 1, because indices compare by cosine. Shapes: any, D values of a vector last.
"""

from __future__ import annotations

import math

import torch

from rzen.vectors import Vectors, unit_vectors, width

INT8_LEVELS = 127
"""Steps from zero to the largest value: -127 to 127, the same in both directions."""
FIRST_STEP = 2 * math.sqrt(2 / math.pi) / math.sqrt(INT8_LEVELS)
"""First size of a step, relative to the root mean square of the values: 2 E|x| / sqrt(127) of LSQ, for normal values.

The values of a unit vector have the root mean square 1 / sqrt(D). So no data are needed, and all widths share one step.
"""


def fake_int8(vectors: Vectors, step: torch.Tensor) -> Vectors:
    """Round each value to one of 255 levels. `step` (0-dim) is their distance, relative to 1 / sqrt(D).

    The gradient of a value is 1 within the levels and 0 beyond. That of the step is round(x/s) - x/s within, and +-127
    beyond (LSQ, Esser et al., arXiv 1902.08153, equations 3 and 5). LSQ scales it by 1 / sqrt(values x 127). AdamW
    would undo that, so it is left out.
    """
    size = step / math.sqrt(width(vectors))
    levels = (vectors / size).clamp(-INT8_LEVELS, INT8_LEVELS)
    rounded = levels + (levels.round() - levels).detach()
    return unit_vectors(rounded * size)


def fake_binary(vectors: Vectors) -> Vectors:
    """Keep the sign of each value. Zero counts as negative. The gradient passes unchanged."""
    signs = torch.where(vectors > 0, 1.0, -1.0).to(vectors.dtype) / math.sqrt(width(vectors))
    return vectors + (signs - vectors).detach()
