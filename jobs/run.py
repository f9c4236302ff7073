"""Runs a spec: `python -m jobs.run SPEC [--set a.b=c]` is `rzen run`. It is the shebang of every shipped spec."""

from __future__ import annotations

import sys

from jobs.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
