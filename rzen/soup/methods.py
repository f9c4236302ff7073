"""How deltas become one: by coefficients of a linear combination (mean, SLERP) or a merge of entries (TIES, DARE)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

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
    """Return TIES or DARE of the dense deltas of one weight. The `name` of the weight decides what DARE drops.

    DARE drops entries by PEFT. TIES is our own, because PEFT divides by the number of parents with the elected sign,
    whatever their weights. An entry can then be larger than that of every parent.
    """
    if isinstance(config, TiesSoup):
        return _disjoint_mean([_largest(delta, config.density) for delta in deltas], shares, config.signs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{config.seed} {name}".encode()).digest()[:8], "little"))
        if config.merge == "ties":
            kept = (merge_utils.prune(delta, config.density, "random", rescale=True) for delta in deltas)
            return _disjoint_mean(list(kept), shares, "total")
        shares_P = torch.tensor(shares, dtype=torch.float32)
        found: Tensor = merge_utils.dare_linear(list(deltas), shares_P, config.density)
    return found


def _largest(delta: Tensor, density: float) -> Tensor:
    """Return a delta of which only the largest entries are left: their share rounded, and at least one."""
    count = max(1, round(density * delta.numel()))
    flat = delta.flatten()
    kept = torch.zeros_like(flat)
    at = flat.abs().topk(count).indices
    kept[at] = flat[at]
    return kept.view_as(delta)


def _disjoint_mean(deltas: Sequence[Tensor], shares: Sequence[float], signs: Literal["total", "frequency"]) -> Tensor:
    """Return the weighted mean of the entries that have the elected sign, 0 where there are none.

    `total` elects the sign of the weighted sum, as TIES (arXiv 2306.01708, section 3) with weights. `frequency` elects
    that of more parents. Positive wins a tie, as in PEFT. No entry is larger than the largest of the parents.
    """
    votes = torch.zeros_like(deltas[0])
    for delta, share in zip(deltas, shares, strict=True):
        votes += share * delta if signs == "total" else delta.sign()
    is_positive = votes >= 0
    total, weight = torch.zeros_like(votes), torch.zeros_like(votes)
    for delta, share in zip(deltas, shares, strict=True):
        agrees = (delta != 0) & ((delta > 0) == is_positive)
        total += share * delta * agrees
        weight += share * agrees
    return total.div_(weight.clamp_(min=torch.finfo(weight.dtype).tiny))
