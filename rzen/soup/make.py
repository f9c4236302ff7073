"""Make a soup in one call: fine-tunes in, a directory with the soup, its identity and its lineage out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from pipelines.errors import UserError
from pipelines.stored_json import read_json, stored_file
from rzen.config import GreedySoup, MeanSoup, SearchedSoup, SoupConfig
from rzen.model.checkpoints import IDENTITY, TEMPERATURES, atomic_directory, write_json
from rzen.soup.adapters import write_adapter
from rzen.soup.checkpoints import write_checkpoint
from rzen.soup.parents import LINEAGE, Adapter, Checkpoint, Parent, open_parents
from rzen.soup.select import Selection


@stored_file
class SoupParent(TypedDict):
    """A parent of a soup."""

    name: str
    place: str
    coefficient: float


@stored_file
class SoupFile(TypedDict, total=False):
    """`soup.json`: what a soup was made of, and how."""

    settings: dict[str, Any]
    parents: list[SoupParent]
    total_weight: float
    """Weight of the soup as a parent of a further mean."""


def make_soup(
    parents: Mapping[str, Path],
    out: Path,
    config: SoupConfig,
    *,
    base: Path | None = None,
    selection: Selection | None = None,
    scores: Mapping[str, float] | None = None,
    places: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the soup of these directories to the new directory `out`, and return its lineage (`soup.json`).

    Parents are all adapters or all full checkpoints, and so is the soup. They are taken in the order of their names, so
    that the order of `parents` does not matter. `selection` is what `greedy_weights` or `searched_weights` found, for
    the methods of these names. `base` is for full checkpoints only.

    The lineage records `scores` (parent -> own score), and `places` where `parents` are local copies. `out` appears
    complete or not at all. Raises `UserError` where parents do not belong together, hold numbers that are not finite,
    or are not what the method needs.
    """
    if out.exists():
        raise UserError(str(out), "exists already", "name a new directory for the soup")
    weights = _weights(parents, config, selection)
    total = sum(weights.values())
    shares = [weight / total for weight in weights.values()]
    opened = open_parents({name: parents[name] for name in weights})
    with atomic_directory(out) as partial:
        made = _write(opened, shares, partial, config, base)
        coefficients = made.pop("coefficients", shares)
        lineage = {
            "settings": config.model_dump(),
            **made,
            **_total_weight(weights, config),
            "parents": [
                _entry(parent, places or {}) | {"weight": weight, "coefficient": coefficient}
                for parent, weight, coefficient in zip(opened, weights.values(), coefficients, strict=True)
            ],
            **({} if scores is None else {"scores": dict(scores)}),
            **({} if selection is None else {"score": selection.score, "trace": selection.trace}),
        }
        if identity := _in_common([parent.identity for parent in opened]) | _temperatures(opened, shares):
            write_json(partial / IDENTITY, identity)
        write_json(partial / LINEAGE, lineage)
    return lineage


def total_weight(folder: Path) -> float:
    """Return the weight of a soup as a parent of a further mean, so that the result is the mean over all fine-tunes.

    It is the sum of the weights that the soup was made with. A selected soup weighs as many as the parents that it
    kept. The mean is as exact as the soup, which may have lost something to an SVD. Raises `UserError` for anything but
    a mean.
    """
    path = folder / LINEAGE
    lineage = read_json(path, SoupFile) if path.is_file() else SoupFile()
    if "total_weight" not in lineage:
        problem = "is no soup that says what it weighs; a mean of its parents does"
        raise UserError(str(path), problem, "name the directory of such a soup, or choose a weight yourself")
    return lineage["total_weight"]


def _weights(parents: Mapping[str, Path], config: SoupConfig, selection: Selection | None) -> dict[str, float]:
    """Return the relative weights of the parents that take part, in the order of their names."""
    if not parents:
        raise UserError("soup", "has no parents", "name at least one fine-tune")
    if isinstance(config, GreedySoup | SearchedSoup):
        if selection is None:
            raise UserError(f"soup method {config.method}", "has no scores to choose by", "use method: mean")
        weights = selection.weights
    else:
        weights = config.weights or dict.fromkeys(parents, 1.0)
    if unknown := sorted(set(weights) - set(parents)):
        raise UserError("soup weights", f"{unknown[0]!r} is none of {', '.join(sorted(parents))}", "name a parent")
    return {name: weights[name] for name in sorted(weights)}


def _total_weight(weights: Mapping[str, float], config: SoupConfig) -> dict[str, float]:
    if isinstance(config, MeanSoup):
        return {"total_weight": sum(weights.values())}
    return {"total_weight": float(len(weights))} if isinstance(config, GreedySoup | SearchedSoup) else {}


def _write(
    parents: Sequence[Parent], shares: Sequence[float], out: Path, config: SoupConfig, base: Path | None
) -> dict[str, Any]:
    """Write weights and their config, and return their part of the lineage."""
    if adapters := [parent for parent in parents if isinstance(parent, Adapter)]:
        if base is not None:
            raise UserError(str(base), "a base was named, but adapters need none", "leave the base out")
        return write_adapter(adapters, shares, out, config)
    checkpoints = [parent for parent in parents if isinstance(parent, Checkpoint)]
    return write_checkpoint(checkpoints, shares, out, config, base)


def _entry(parent: Parent, places: Mapping[str, str]) -> dict[str, Any]:
    """Return the entry of a parent in the lineage. A soup brings its own lineage too."""
    place = places.get(parent.name, str(parent.path))
    entry: dict[str, Any] = {"name": parent.name, "place": place, "sha256": parent.sha256}
    if isinstance(parent, Adapter):
        entry["rank"] = parent.rank
    own = parent.path / LINEAGE
    return entry | ({"soup": read_json(own, SoupFile)} if own.is_file() else {})


def _temperatures(parents: Sequence[Parent], shares: Sequence[float]) -> dict[str, Any]:
    """Return the temperatures of the soup: for each task the mean of theta, the logarithm, of the parents that have it.

    They decide no vector. A stage that starts from the soup can take them over.
    """
    thetas: dict[str, list[tuple[float, float]]] = {}
    for parent, share in zip(parents, shares, strict=True):
        for task, value in parent.identity.get(TEMPERATURES, {}).items():
            thetas.setdefault(task, []).append((math.log(value), share))
    found = {
        task: math.exp(sum(theta * share for theta, share in some) / sum(share for _, share in some))
        for task, some in thetas.items()
    }
    return {TEMPERATURES: found} if found else {}


def _in_common(identities: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the entries that are equal in all identities, also within `lineage`."""
    first, *others = identities
    common = {key: value for key, value in first.items() if all(key in o and o[key] == value for o in others)}
    lineages = [identity["lineage"] for identity in identities if "lineage" in identity]
    if len(lineages) == len(identities):
        common["lineage"] = {k: v for k, v in lineages[0].items() if all(k in o and o[k] == v for o in lineages[1:])}
    return common
