"""A mixture resolved against the sources that the data has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pipelines.config import MixtureConfig
from pipelines.errors import UserError
from pipelines.plan.plan import Plan, source_weight
from pipelines.plan.sources import PlanSource
from pipelines.plan.types import SourceTable

SMALL = "small"
"""Name of the source that `merge_small` makes."""
_NAMED = 5  # sources of an error


def build_plan(
    tables: Mapping[str, SourceTable],
    mixture: MixtureConfig,
    *,
    global_batch: int,
    steps: int | None = None,
    epochs: float = 1.0,
    seed: int = 0,
) -> Plan:
    """Resolve a mixture against the available sources.

    `steps` fixes the length of the run. Without it, the run has `epochs` times the batches of all sources together.
    Without weights, each source gets steps in proportion to its batches, so that one epoch visits each source once.

    Raises `UserError` for unknown or too small sources, and for groups and blocks that contradict each other.
    """
    sources = _resolve_sources(tables, mixture, global_batch, seed)
    steps_per_epoch = [source.batches_per_epoch / source.blocks for source in sources]
    if steps is None:
        steps = max(1, round(epochs * sum(steps_per_epoch)))
    if mixture.weights is None:
        shares = steps_per_epoch
    else:
        shares = [source_weight(mixture.weights, source) for source in sources]
    return Plan(sources, global_batch, steps, ((0, tuple(shares)),), seed)


def _resolve_sources(
    tables: Mapping[str, SourceTable], mixture: MixtureConfig, global_batch: int, seed: int
) -> tuple[PlanSource, ...]:
    def merge(name: str, members: list[str], batch: int, blocks: int) -> PlanSource:
        return PlanSource(name, {member: tables[member] for member in sorted(members)}, batch, blocks, mixture, seed)

    sources: dict[str, PlanSource] = {}
    for name, members in sorted(_members_of_sources(tables, mixture).items()):
        block = mixture.blocks.get(name, global_batch)
        if block < 2 or global_batch % block:
            problem = f"{block} samples of {name!r} do not divide a global batch of {global_batch}"
            raise UserError("data.mixture.blocks", problem, "choose a divisor of global_batch, at least 2")
        sources[name] = merge(name, members, block, global_batch // block)
    small = [name for name, source in sources.items() if source.num_samples < source.batch]
    if small and not mixture.merge_small:
        raise _too_small([sources[name] for name in small])
    total = sum(sources[name].num_samples for name in small)
    members = [member for name in small for member in sources.pop(name).members]
    if total >= 2:  # one sample has nothing to be contrasted with
        sources[SMALL] = merge(SMALL, members, min(global_batch, total - total % 2), 1)
    if not sources:
        raise UserError("data.root", f"{total} training samples are not enough to contrast", "add at least two pairs")
    return tuple(sources.values())


def _too_small(sources: Sequence[PlanSource]) -> UserError:
    """Return the error for sources that do not fill a batch, with what each has lost on the way."""
    first, *others = sources
    problem = (
        f"source {first.name!r} has {first.num_samples} samples{_lost(first)}, fewer than one batch of {first.batch}"
    )
    if others:
        named = ", ".join(f"{source.name} with {source.num_samples}{_lost(source)}" for source in others[:_NAMED])
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        problem += f"; the same holds for {named}{more}"
    ways = [
        "lower global_batch",
        "set a smaller data.mixture.blocks for it",
        "leave the source out of data.mixture.weights",
        "set data.mixture.merge_small: true",
    ]
    if any(source.num_dropped or source.num_weighted for source in sources):
        ways.append("leave out less by data.curation and data.candidates")
    return UserError("global_batch", problem, f"{', '.join(ways[:-1])}, or {ways[-1]}")


def _lost(source: PlanSource) -> str:
    """Return why a source has fewer samples than are stored."""
    reasons = []
    if source.num_dropped:
        reasons.append(f"tables drop {source.num_dropped}")
    if source.num_weighted:
        reasons.append(f"an epoch takes {source.num_drawn} of {source.num_weighted} with a weight")
    if source.num_samples < source.num_kept:
        reasons.append(f"data.mixture.max_samples_per_source leaves {source.num_samples} of {source.num_kept}")
    return f" of {source.num_stored} ({', '.join(reasons)})" if reasons else ""


def _members_of_sources(tables: Mapping[str, SourceTable], mixture: MixtureConfig) -> dict[str, list[str]]:
    """Return the source or group of each batch -> its members that are drawn, after checking every name."""
    group_of = _group_of_members(tables, mixture)
    asked = sorted(tables if mixture.weights is None else mixture.weights)
    names = [member for name in asked for member in mixture.groups.get(name, [name])]
    for name in names:
        _check_known("data.mixture.weights", name, tables)
    drawable = {group_of.get(name, name) for name in tables}
    if unknown := sorted(set(mixture.blocks) - drawable):
        known = ", ".join(sorted(drawable))
        raise UserError("data.mixture.blocks", f"unknown source {unknown[0]!r}", f"it may name {known}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError("data.mixture.weights", f"names {twice[0]!r} and its group", "name one of them")
    members_of: dict[str, list[str]] = {}
    for name in names:
        members_of.setdefault(group_of.get(name, name), []).append(name)
    return members_of


def _group_of_members(tables: Mapping[str, SourceTable], mixture: MixtureConfig) -> dict[str, str]:
    group_of = {}
    for group, members in mixture.groups.items():
        for name in members:
            _check_known("data.mixture.groups", name, tables)
            group_of[name] = group
        if group in tables:
            raise UserError("data.mixture.groups", f"{group!r} is a source already", "choose another name")
    return group_of


def _check_known(place: str, name: str, tables: Mapping[str, SourceTable]) -> None:
    if name not in tables:
        raise UserError(place, f"unknown source {name!r}", f"the data has {', '.join(sorted(tables))}")
