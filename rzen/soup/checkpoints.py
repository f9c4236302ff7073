"""The soup of full checkpoints, tensor by tensor: memory is that of one tensor of every parent, whatever the model.

The mean holds two tensors at a time. PEFT's TIES and DARE hold each several times. The soup has the files, the dtypes
and the shards of its first parent. Numbers are mixed in fp32 and rounded once.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.errors import UserError
from rzen.config import DareSoup, SlerpSoup, SoupConfig, TiesSoup
from rzen.model.checkpoints import IDENTITY
from rzen.soup.methods import merge, slerp_coefficients
from rzen.soup.parents import LINEAGE, Checkpoint, open_checkpoint
from rzen.soup.tensors import write_tensors


def write_checkpoint(
    checkpoints: Sequence[Checkpoint], shares: Sequence[float], out: Path, config: SoupConfig, base_dir: Path | None
) -> dict[str, Any]:
    """Write the soup into `out`, without its `rzen.json`, and return its part of the lineage.

    The mean needs no base. The angle of SLERP is that of the fine-tunes seen from the base. Without a base it is seen
    from zero, and so small that SLERP is the mean. TIES and DARE are defined on differences from the base. Raises
    `UserError` where they get none, or one that the fine-tunes did not start from.
    """
    if isinstance(config.rank, int):  # `keep` keeps what there is
        problem = f"rank={config.rank}, but full checkpoints have no rank"
        raise UserError(f"soup method {config.method}", problem, "leave rank out")
    if isinstance(config, TiesSoup | DareSoup) and base_dir is None:
        problem = "works on differences from the base, which full checkpoints do not hold"
        raise UserError(f"soup method {config.method}", problem, "name their base checkpoint, or use method: mean")
    base = None if base_dir is None else _open_base(base_dir, checkpoints[0])
    found: dict[str, Any] = {}
    if isinstance(config, SlerpSoup):
        shares = found["coefficients"] = slerp_coefficients(_gram(checkpoints, base), shares)
    first = checkpoints[0]
    for file, layout in first.tensors.files.items():
        mixed = (_mixed(checkpoints, base, shares, config, name).to(dtype) for name, (_, dtype) in layout.items())
        write_tensors(out / file.name, layout, mixed)
    for path in first.path.iterdir():
        # Weights that nobody reads, such as those of another format, are not those of the soup.
        if path.is_file() and path.suffix not in (".safetensors", ".bin") and path.name not in (IDENTITY, LINEAGE):
            shutil.copyfile(path, out / path.name)
    if base is not None:
        found["base"] = {"path": str(base.path), "sha256": base.sha256}
    return found


def _mixed(
    checkpoints: Sequence[Checkpoint], base: Checkpoint | None, shares: Sequence[float], config: SoupConfig, name: str
) -> Tensor:
    """Return one weight of the soup, fp32."""
    if not checkpoints[0].tensors.layout[name][1].is_floating_point:
        return _equal(checkpoints, name)
    if isinstance(config, TiesSoup | DareSoup):
        assert base is not None
        origin = base.tensors.read(name).float()
        deltas = [checkpoint.tensors.read(name).float().sub_(origin) for checkpoint in checkpoints]
        return merge(deltas, shares, config, name).add_(origin)
    mixed = torch.zeros(checkpoints[0].tensors.layout[name][0])
    for checkpoint, share in zip(checkpoints, shares, strict=True):
        mixed.add_(checkpoint.tensors.read(name), alpha=share)
    rest = 1.0 - sum(shares)  # coefficients of SLERP are those of deltas
    return mixed if base is None or abs(rest) < 1e-12 else mixed.add_(base.tensors.read(name), alpha=rest)


def _equal(checkpoints: Sequence[Checkpoint], name: str) -> Tensor:
    first, *others = (checkpoint.tensors.read(name) for checkpoint in checkpoints)
    if not all(torch.equal(first, other) for other in others):
        raise UserError(f"{checkpoints[0].path} {name}", "is of whole numbers and differs", "soup one model's weights")
    return first


def _gram(checkpoints: Sequence[Checkpoint], base: Checkpoint | None) -> Tensor:
    """Return the inner products [P, P] of the checkpoints' differences from the base, or of their weights, fp64."""
    gram_PP = torch.zeros(len(checkpoints), len(checkpoints), dtype=torch.float64)
    for name, (_, dtype) in checkpoints[0].tensors.layout.items():
        if dtype.is_floating_point:
            deltas_PN = torch.stack([checkpoint.tensors.read(name).float().reshape(-1) for checkpoint in checkpoints])
            if base is not None:
                deltas_PN -= base.tensors.read(name).float().reshape(-1)
            gram_PP += (deltas_PN @ deltas_PN.T).double()
    return gram_PP


def _open_base(folder: Path, first: Checkpoint) -> Checkpoint:
    base = open_checkpoint("base", folder)
    if first.base_sha256 not in (None, base.sha256):
        problem = f"is not what {first.path} was fine-tuned from: base_sha256 {base.sha256} and {first.base_sha256}"
        raise UserError(str(folder), problem, "name the base of the fine-tunes")
    theirs = base.tensors.layout
    for name, (shape, _) in first.tensors.layout.items():
        if name not in theirs or theirs[name][0] != shape:
            problem = f"has no {name} of shape {shape}, as the fine-tunes have"
            raise UserError(str(folder), problem, "name the base of the fine-tunes")
    return base
