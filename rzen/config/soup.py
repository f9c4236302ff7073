"""Settings of a soup: how several fine-tunes become one model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipelines.config import Config, NonNegativeInt, PositiveInt

Rank = PositiveInt | Literal["keep"] | None


class WeightedSoup(Config):
    """What all soups of named parents share."""

    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    """Relative weight of each parent. Parents that are not named are left out. `null`: all equal. To add a fine-tune to
    an existing soup, weigh the soup with its `total_weight`: the result is the mean over all fine-tunes."""
    rank: Rank = None
    """Rank of the soup of adapters. `null`: the sum of their ranks, with which mean and SLERP are exact. `keep`: the
    largest of their ranks. A rank below the sum takes an SVD of each module, and the lineage records what is left out.
    """


class MeanSoup(WeightedSoup):
    """The weighted mean of what the parents do to the model (paper, section 4)."""

    method: Literal["mean"] = "mean"
    """Must be `mean`, the default."""


class SlerpSoup(WeightedSoup):
    """Interpolation between parents on a sphere, which keeps the length of a delta (Shoemake, 1985)."""

    method: Literal["slerp"] = "slerp"
    """Must be `slerp`. More than two parents are added one after another, in the order of their names."""


class TiesSoup(WeightedSoup):
    """Largest entries of each delta, an elected sign for each entry, weighted mean of those (arXiv 2306.01708)."""

    method: Literal["ties"] = "ties"
    """Must be `ties`. Full checkpoints need their base."""
    density: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the entries of a weight's delta that is kept, the largest (TIES: 20%)."""
    signs: Literal["total", "frequency"] = "total"
    """A sign is elected by the weighted sum of the entries (TIES) or by their number."""


class DareSoup(WeightedSoup):
    """Drop entries of each delta at random and enlarge the others to the same mean (arXiv 2311.03099)."""

    method: Literal["dare"] = "dare"
    """Must be `dare`. Full checkpoints need their base."""
    density: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the entries that is kept. Our choice. DARE drops up to 90% of a full fine-tune, but what is left has no
    low rank."""
    merge: Literal["linear", "ties"] = "linear"
    """After dropping, take the weighted mean of all entries, or of those with the elected sign (TIES)."""
    seed: NonNegativeInt = 0
    """Seed of the choice of entries."""


class GreedySoup(Config):
    """Parents from the best down, each kept if the mean scores higher with it (Wortsman et al., arXiv 2203.05482)."""

    method: Literal["greedy"] = "greedy"
    """Must be `greedy`. Needs validation scores."""
    rank: Rank = None
    """Rank of the soup of adapters, as in `mean`."""


class SearchedSoup(Config):
    """The mean with the weights that score best on a small set, found in a few evaluations."""

    method: Literal["searched"] = "searched"
    """Must be `searched`. Needs scores of soups."""
    evaluations: PositiveInt = 24
    """Soups that are scored at most. Our choice: with three parents the weights are then right to a few hundredths."""
    at_once: PositiveInt = 4
    """Soups that are scored at the same time. Their scores decide the next ones. Our choice."""
    seed: NonNegativeInt = 0
    """Seed of the weights that are tried."""
    rank: Rank = None
    """Rank of the soup of adapters, as in `mean`."""


SoupConfig = Annotated[
    MeanSoup | GreedySoup | SearchedSoup | SlerpSoup | TiesSoup | DareSoup, Field(discriminator="method")
]
"""How fine-tunes become one model."""
