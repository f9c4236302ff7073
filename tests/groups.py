"""Which tests one process of pytest-xdist runs, and in which order."""

from __future__ import annotations

import re
from functools import cache

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.paths import ROOT

RAY = "ray"
_IN_RAY = re.compile(
    r"""ray_cluster: None|usefixtures\("ray_cluster"\)|^pytestmark = .*mark\.ray.*mark\.long""", re.MULTILINE
)


@cache
def group_of(module: str) -> str:
    """Return the group of the tests of a module. All tests of a group run in one process, one after the other.

    Modules on the session's Ray cluster form one group. It takes about as long as all others. Long modules that start
    a cluster of their own are in it, because two clusters would compete for the CPUs, and they measure times. Every
    other module is a group, because fixtures belong to a module.
    """
    return RAY if _IN_RAY.search((ROOT / module).read_text(encoding="utf-8")) else module


def arrange(items: list[pytest.Item]) -> None:
    """Sort the tests: Ray first, then modules with slow tests, then the others."""
    slow = {_module(item.nodeid) for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (group_of(_module(item.nodeid)) != RAY, _module(item.nodeid) not in slow))


class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Hands whole groups to the processes.

    The `xdist_group` marker does not work: pytest 9.2 ignores the suffix that pytest-xdist 3.8 adds to the test ids.
    """

    def _split_scope(self, nodeid: str) -> str:
        return group_of(_module(nodeid))


def _module(nodeid: str) -> str:
    return nodeid.partition("::")[0]
