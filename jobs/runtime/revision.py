"""Identifies the code and the libraries that a result was made with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

REVISION = "RZEN_REVISION"
"""Variable that names the revision of code without git history: of container images and submitted packages."""
_PACKAGES = ("ray", "torch", "transformers", "deepspeed", "peft")


def revision() -> str:
    """Return the git revision of the code, with `-dirty` if there are uncommitted changes.

    Code without git history has that of `RZEN_REVISION`.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(REVISION, "unknown")


def versions() -> dict[str, str]:
    """Return package -> installed version of the libraries that decide results."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def hardware() -> str:
    """Return nodes, CPUs and GPUs of the cluster, and the processor of this machine. Needs a connected Ray."""
    import ray

    present = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    return f"nodes {nodes}, CPUs {present.get('CPU', 0):g}, GPUs {present.get('GPU', 0):g}, {_processor()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} x {os.cpu_count()}"
