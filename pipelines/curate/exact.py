"""Exact duplicates, by the content hashes that the shards have."""

from __future__ import annotations

from pipelines.curate.samples import POSITIVE, QUERY, Drop, Samples, positions
from pipelines.curate.settings import ExactRule
from pipelines.curate.tables import Bools

PAIR, TARGET = "exact_pair", "exact_target"
_UNREAD = b""  # numpy strips the zeros of a sample that cannot be read


def find_exact(samples: Samples, keep: Bools, rule: ExactRule, within: str) -> list[Drop]:
    """Return the samples whose pair, or target, an earlier sample has."""
    content = samples.texts.content.reshape(-1, 2)
    has_media = samples.texts.num_media.reshape(-1, 2)[:, POSITIVE] > 0
    source_of = samples.source_of.tolist()
    seen: dict[tuple[object, ...], int] = {}
    drops = []
    for sample in positions(keep).tolist():
        target, query = content[sample, POSITIVE], content[sample, QUERY]
        if target == _UNREAD:
            continue
        by_target = rule.of == "target" and bool(has_media[sample])
        key = (source_of[sample] if within == "source" else None, target, None if by_target else query)
        first = seen.setdefault(key, sample)
        if first != sample:
            drops.append(samples.duplicate(sample, first, TARGET if by_target else PAIR))
    return drops
