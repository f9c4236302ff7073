"""How deltas become one: by coefficients of a linear combination (mean, SLERP) or a merge of entries (TIES, DARE)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from peft.utils import merge_utils
from torch import Tensor

from pipelines.errors import UserError
from rzen.config import DareSoup, TiesSoup

STRAIGHT = 1e-6  # below this sine of their angle, two directions are one: SLERP is then the mean, its limit


def slerp_coefficients(gram_PP: Tensor, shares: Sequence[float]) -> list[float]:
    """Return the coefficients of the deltas of P parents, from their inner products (fp64).

    For two parents they are sin((1-t)w)/sin(w) and sin(tw)/sin(w): t is the share of the second, w their angle. Further
    parents are added one by one, each with its share among those so far. So the order matters.

    The angle is that of whole models, all modules as one vector. Every parent then has one coefficient everywhere, as
    in the mean. How layers are cut into modules (q, k and v separate or in one) changes nothing. Raises `UserError` for
    opposite deltas, between which there are many shortest ways.
    """
    found = torch.zeros(len(shares), dtype=torch.float64)
    found[0] = 1.0
    total = shares[0]
    for new, share in enumerate(shares[1:], start=1):
        total += share
        one, other = _slerp(found @ gram_PP @ found, gram_PP[new, new], found @ gram_PP[new], share / total)
        found *= one
        found[new] = other
    return [float(coefficient) for coefficient in found]


def _slerp(one: Tensor, other: Tensor, product: Tensor, t: float) -> tuple[float, float]:
    """Return two coefficients, from the squared lengths of two vectors and their product."""
    lengths = math.sqrt(one * other)
    cosine = min(1.0, max(-1.0, float(product) / lengths)) if lengths else 1.0
    angle = math.acos(cosine)
    if math.sin(angle) < STRAIGHT:
        if cosine < 0:
            raise UserError("slerp", "the parents do opposite things", "use method: mean")
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def merge(deltas: Sequence[Tensor], shares: Sequence[float], config: TiesSoup | DareSoup, name: str) -> Tensor:
    """Return TIES or DARE of the dense deltas of one weight, by PEFT. The `name` of the weight decides what DARE drops.

    PEFT's TIES divides by the number of parents with the elected sign, so that its weights must be 1 on average.
    """
    shares_P = torch.tensor(shares, dtype=torch.float32)
    counts_P = shares_P * len(shares)
    if isinstance(config, TiesSoup):
        found: Tensor = merge_utils.ties(list(deltas), counts_P, config.density, config.signs)
        return found
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{config.seed} {name}".encode()).digest()[:8], "little"))
        if config.merge == "ties":
            found = merge_utils.dare_ties(list(deltas), counts_P, config.density)
        else:
            found = merge_utils.dare_linear(list(deltas), shares_P, config.density)
    return found
