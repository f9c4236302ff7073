"""The soup of adapters, module by module: memory is that of one module of every parent.

Mean and SLERP are linear combinations of deltas. Ranks are concatenated, which is exact, or cut down by SVD. TIES and
DARE look at entries. They write out the delta of one module at a time for each parent, and cut the result to a rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rzen.config import DareSoup, SlerpSoup, SoupConfig, TiesSoup
from rzen.model.checkpoints import write_json
from rzen.model.lora import CONFIG, WEIGHTS
from rzen.soup.factors import Factors, Truncated, concatenate, factorise, inner, truncate
from rzen.soup.methods import merge, slerp_coefficients
from rzen.soup.parents import FACTORS, Adapter
from rzen.soup.tensors import Layout, write_tensors

Squares = dict[str, tuple[float, float]]  # module -> squared norms of what an SVD dropped, and of the delta


def write_adapter(
    adapters: Sequence[Adapter], shares: Sequence[float], out: Path, config: SoupConfig
) -> dict[str, Any]:
    """Write weights (fp32) and PEFT's config of the soup into `out`, and return its part of the lineage.

    That is coefficients, rank and, where an SVD left something out, the residual. Scale and dropout are those of the
    parents where all have the same, so that training can continue from the soup as from a parent. Otherwise they are 1
    and 0.
    """
    whole_rank = sum(adapter.rank for adapter in adapters)
    asked = max(adapter.rank for adapter in adapters) if config.rank == "keep" else config.rank
    scale = _common([adapter.scale for adapter in adapters], 1.0) or 1.0
    found: dict[str, Any] = {}
    squares: Squares = {}
    if isinstance(config, TiesSoup | DareSoup):
        rank = asked or whole_rank
        soup_of = partial(_merged, adapters, shares, config, rank, squares=squares)
    else:
        rank = min(asked or whole_rank, whole_rank)
        if isinstance(config, SlerpSoup):
            shares = found["coefficients"] = slerp_coefficients(gram(adapters), shares)
        soup_of = partial(_combined, adapters, shares, rank, squares=squares)
    modules, shapes = modules_of(adapters[0]), adapters[0].tensors.layout
    layout: Layout = {}
    for a, b in ([module + factor for factor in FACTORS] for module in modules):
        layout[a] = ([rank, shapes[a][0][1]], torch.float32)
        layout[b] = ([shapes[b][0][0], rank], torch.float32)
    write_tensors(out / WEIGHTS, layout, (tensor for module in modules for tensor in _divided(soup_of(module), scale)))
    alpha = scale * rank
    plain = {
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": _common([adapter.config.get("lora_dropout", 0.0) for adapter in adapters], 0.0),
        "use_rslora": False,
        "inference_mode": True,
    }
    write_json(out / CONFIG, {**adapters[0].config, **plain})
    return found | {"rank": rank} | _residual(squares)


def _common(values: Sequence[float], otherwise: float) -> float:
    return values[0] if len(set(values)) == 1 else otherwise


def _divided(factors: Factors, scale: float) -> Factors:
    """Return factors whose product is `factors` once PEFT has multiplied it with the scale."""
    return Factors(factors.a, factors.b / scale)


def modules_of(adapter: Adapter) -> list[str]:
    """Return the names of the adapted modules, sorted."""
    return sorted(name.removesuffix(FACTORS[0]) for name in adapter.tensors.layout if name.endswith(FACTORS[0]))


def gram(adapters: Sequence[Adapter]) -> Tensor:
    """Return the inner products [P, P] of the adapters' deltas, summed over all modules, fp64."""
    gram_PP = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for module in modules_of(adapters[0]):
        parts = [adapter.factors(module) for adapter in adapters]
        gram_PP += torch.tensor([[inner(one, other) for other in parts] for one in parts], dtype=torch.float64)
    return gram_PP


def _combined(
    adapters: Sequence[Adapter], coefficients: Sequence[float], rank: int, module: str, squares: Squares
) -> Factors:
    """Return one module of the linear combination."""
    factors = concatenate([adapter.factors(module) for adapter in adapters], coefficients)
    return _noted(truncate(factors, rank), module, squares) if rank < len(factors.a) else factors


def _merged(
    adapters: Sequence[Adapter],
    shares: Sequence[float],
    config: TiesSoup | DareSoup,
    rank: int,
    module: str,
    squares: Squares,
) -> Factors:
    """Return one module after a merge of entries."""
    parts = (adapter.factors(module) for adapter in adapters)
    merged_OI = merge([part.b @ part.a for part in parts], shares, config, module)
    return _noted(factorise(merged_OI, rank), module, squares)


def _noted(found: Truncated, module: str, squares: Squares) -> Factors:
    squares[module] = (found.dropped, found.whole)
    return found.factors


def _residual(squares: Squares) -> dict[str, Any]:
    """Return the share of the delta's length (Frobenius norm) that is left out, of the model and the worst module."""
    if not squares:
        return {}
    of_module = {module: math.sqrt(dropped / whole) if whole else 0.0 for module, (dropped, whole) in squares.items()}
    worst = max(of_module, key=lambda module: of_module[module])
    dropped, whole = (sum(column) for column in zip(*squares.values(), strict=True))
    return {
        "residual": math.sqrt(dropped / whole) if whole else 0.0,
        "largest_residual": {"module": worst, "residual": of_module[worst]},
    }
