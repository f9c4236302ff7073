"""Packages of npm's registry: datasets as pinned tarballs, fetched by npm or, without it, by Python."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import BadMedia, UserError
from pipelines.redaction import redact_text
from pipelines.storage.web import read_url

PUBLIC = "https://registry.npmjs.org"
_MAX_BYTES = 256 << 20
_FIX = "check the network, or set npm's `registry` to one that has the package"


@dataclass(frozen=True, slots=True)
class Package:
    """A version of a package, and the SHA-512 of its tarball as the registry states it (base64)."""

    name: str
    version: str
    sha512: str


def fetch_package(package: Package) -> bytes:
    """Return the tarball of a package. Raises `UserError` if it cannot be had, or is not the pinned one."""
    data = _by_npm(package) if shutil.which("npm") else _by_python(package)
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != package.sha512:
        fix = "name another registry: this one has other bytes"
        raise UserError(_place(package), "is not the tarball with the pinned hash", fix)
    return data


def registry() -> str:
    """Return the registry that npm is set to use: environment, then `~/.npmrc`, then the public one."""
    given = {name.lower(): value for name, value in os.environ.items()}  # npm reads them in any case
    if url := given.get("npm_config_registry"):
        return url.rstrip("/")
    settings = Path(given.get("npm_config_userconfig", "~/.npmrc")).expanduser()
    for line in settings.read_text().splitlines() if settings.is_file() else []:
        key, _, value = line.partition("=")
        if key.strip() == "registry":
            return value.strip().rstrip("/")
    return PUBLIC


def _by_npm(package: Package) -> bytes:
    """Return what `npm pack` downloads. It runs no script of the package."""
    with tempfile.TemporaryDirectory(prefix="rzen-npm-") as scratch:
        command = ["npm", "pack", "--silent", "--ignore-scripts", f"--pack-destination={scratch}"]
        done = subprocess.run(
            [*command, f"{package.name}@{package.version}"], cwd=scratch, capture_output=True, text=True, check=False
        )
        files = list(Path(scratch).glob("*.tgz"))
        if done.returncode or len(files) != 1:
            last = " ".join((done.stderr or done.stdout).split())[-200:]
            raise UserError(_place(package), f"npm cannot fetch it: {redact_text(last)}", _FIX)
        return files[0].read_bytes()


def _by_python(package: Package) -> bytes:
    url = f"{registry()}/{package.name}/-/{package.name.rpartition('/')[2]}-{package.version}.tgz"
    try:
        return read_url(url, _MAX_BYTES).data
    except BadMedia as error:
        raise UserError(redact_text(url), str(error), _FIX) from error


def _place(package: Package) -> str:
    return f"{package.name}@{package.version}"
