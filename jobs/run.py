"""`python -m jobs.run SPEC [--set a.b=c]`, the same as `rzen run`; also the shebang of every shipped spec."""

from __future__ import annotations

import sys

from jobs.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
