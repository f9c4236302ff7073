"""Which tests one process of pytest-xdist runs, and in which order."""

from __future__ import annotations

import pytest

RAY = "ray"


def group_of(item: pytest.Item) -> str:
    """Return the group of a test. All tests of a group run in one process, one after the other.

    Tests with Ray form one group, because two clusters would compete for the CPUs. The others form one group a module,
    because their fixtures belong to a module.
    """
    if item.get_closest_marker("ray") or "ray_cluster" in getattr(item, "fixturenames", ()):
        return RAY
    return item.nodeid.partition("::")[0]


def arrange(items: list[pytest.Item]) -> None:
    """Assign the groups and sort the tests: Ray first, then modules with slow tests, then the others."""
    groups = {item: group_of(item) for item in items}
    slow = {groups[item] for item in items if item.get_closest_marker("slow")}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (groups[item] != RAY, groups[item] not in slow))
