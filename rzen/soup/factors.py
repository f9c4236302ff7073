"""A delta of a weight as the product B.A of its factors, without ever writing it out.

Suffixes: R rank, I inputs, O outputs of the module, K the smaller of R and O or I.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Factors(NamedTuple):
    """The delta B.A. The scale of an adapter is part of B."""

    a: Tensor
    """[R, I]"""
    b: Tensor
    """[O, R]"""


class Truncated(NamedTuple):
    """The best approximation of a delta by a rank, and the squares of two Frobenius norms."""

    factors: Factors
    dropped: float
    """Squared norm of what it leaves out."""
    whole: float
    """Squared norm of the delta."""


def concatenate(parts: Sequence[Factors], coefficients: Sequence[float]) -> Factors:
    """Return the sum of c B.A, exactly: [c1 B1 | c2 B2] . [A1 ; A2] = c1 B1.A1 + c2 B2.A2."""
    a_RI = torch.cat([part.a for part in parts])
    return Factors(a_RI, torch.cat([c * part.b for c, part in zip(coefficients, parts, strict=True)], dim=1))


def inner(one: Factors, other: Factors) -> float:
    """Return <B1.A1, B2.A2>, the sum of products of entries. It equals that of B1'.B2 and A1.A2', rank x rank."""
    b_RR, a_RR = one.b.T @ other.b, one.a @ other.a.T
    return float((b_RR.double() * a_RR).sum())


def truncate(factors: Factors, rank: int) -> Truncated:
    """Return the SVD of B.A to a rank: QR of both factors, then the SVD of a core of rank x rank.

    Both factors get the roots of the values. A module whose smaller dimension is below `rank` gets rows of zeros,
    because PEFT needs one rank for all.
    """
    q_OK, b_KR = torch.linalg.qr(factors.b)
    q_IK, a_KR = torch.linalg.qr(factors.a.T)
    left_KK, values_K, right_KK = torch.linalg.svd(b_KR @ a_KR.T, full_matrices=False)
    roots_R = values_K[:rank].sqrt()
    b_OR = q_OK @ (left_KK[:, :rank] * roots_R)
    a_RI = (roots_R[:, None] * right_KK[:rank]) @ q_IK.T
    squares_K = values_K.double().square()
    return Truncated(_padded(a_RI, b_OR, rank), float(squares_K[rank:].sum()), float(squares_K.sum()))


def factorise(delta_OI: Tensor, rank: int) -> Truncated:
    """Return the SVD of a dense delta to a rank, by projecting it on the leading eigenvectors of delta'.delta.

    It works in fp64, because squares lose half of the digits. It takes half as long as an SVD of 8960 x 1536 in fp32.
    """
    outputs, inputs = delta_OI.shape
    if outputs < inputs:
        (a_RO, b_IR), dropped, whole = factorise(delta_OI.T, rank)
        return Truncated(Factors(b_IR.T.contiguous(), a_RO.T.contiguous()), dropped, whole)
    wide_OI = delta_OI.double()
    squares_I, vectors_II = torch.linalg.eigh(wide_OI.T @ wide_OI)  # ascending
    squares_I, vectors_II = squares_I.flip(0).clamp(min=0), vectors_II.flip(1)
    a_RI = vectors_II[:, :rank].T
    b_OR = wide_OI @ a_RI.T
    factors = _padded(a_RI.to(delta_OI.dtype), b_OR.to(delta_OI.dtype), rank)
    return Truncated(factors, float(squares_I[rank:].sum()), float(squares_I.sum()))


def _padded(a_RI: Tensor, b_OR: Tensor, rank: int) -> Factors:
    missing = rank - len(a_RI)
    return Factors(pad(a_RI, (0, 0, 0, missing)), pad(b_OR, (0, missing)))
