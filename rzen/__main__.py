"""The command `rzen`, and `python -m rzen`: starts the command line of `jobs` in any folder."""

from __future__ import annotations

import sys
from importlib import import_module

from rzen.packages import import_own_packages


def main() -> int:
    """Run the command line. Return its exit status."""
    import_own_packages()
    status: int = import_module("jobs.cli").main()
    return status


if __name__ == "__main__":
    sys.exit(main())
