"""Writes the hashes of the pinned packages: `python -m infra.image.hashes`. It needs the package index.

For each line of the lock, pip names the file that it would install, and its SHA-256. torch is left out. Machines
without GPU install another build of it, with another hash. This package is left out as well. It is built from the
checkout. `make setup HASHES=1` installs what is here by its hashes, and the rest by the lock.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOCK, HASHES = ROOT / "requirements.lock", ROOT / "infra/image/requirements.hashes"
WITHOUT_HASH = frozenset({"torch"})
_HEAD = """\
# The files of requirements.lock that pip installs on Linux on x86-64 with Python 3.11, without torch.
# Made by `python -m infra.image.hashes`; `make setup HASHES=1` installs them.
"""


def pinned(lock: str) -> list[str]:
    """Return the lines `name==version` of a lock that get a hash."""
    lines = [line.strip() for line in lock.splitlines() if line.strip() and not line.startswith("#")]
    return [line for line in lines if line.partition("==")[0] not in WITHOUT_HASH]


def hashed(wanted: Iterable[str], installed: Iterable[Mapping[str, Any]]) -> str:
    """Return the file of hashes from the `install` of pip's report. Raises `KeyError` for a package without one."""
    found = {}
    for package in installed:
        name = str(package["metadata"]["name"]).lower().replace("_", "-").replace(".", "-")
        found[name, package["metadata"]["version"]] = package["download_info"]["archive_info"]["hashes"]["sha256"]
    lines = []
    for line in wanted:
        name, _, version = line.partition("==")
        digest = found[name.lower().replace("_", "-").replace(".", "-"), version]
        lines.append(f"{line} --hash=sha256:{digest}\n")
    return _HEAD + "".join(lines)


def main() -> None:
    """Ask pip, and write the file."""
    wanted = pinned(LOCK.read_text())
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        subprocess.run([*command, "--report", str(report), *wanted], check=True)
        HASHES.write_text(hashed(wanted, json.loads(report.read_text())["install"]))


if __name__ == "__main__":
    main()
