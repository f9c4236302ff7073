"""The corpora of the evidence: real data in which the right answers, the duplicates and the look-alikes are known.

    emoji     304 emoji in five skin tones, MIT: pictures are targets, and captions ask for them
    stamps    stamps of Tux Paint with names in five languages, GPL-2: names are targets, and pictures ask for them

Emoji come from npm's registry, with the pins of `jobs.data.emoji`. Stamps come from Debian's package, which apt
fetches. Nothing of them is in this repository.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import zlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from tests.benchmarks.corpora import CORPORA, fetch, stamps
from tests.benchmarks.evidence_bed import VARIANTS, Bed

NUM_EMOJI = 304
"""Emoji of the packages that have a picture in each tone."""
LANGUAGES = ("es", "pt", "gl", "ca", "it")
"""Languages of the names of stamps."""
NUM_STAMPS = 782
"""Stamps that have a name in each language."""
_PIXELS, _COMPONENTS = 32, 128
_HASHES, _NAME_COMPONENTS = 1024, 256
_LANGUAGE_SCALE = 4.0  # components of a picture have a length of about 11


def read_emoji(folder: Path) -> Bed:
    """Fetch the two packages into a folder once, and read them."""
    from jobs.data.emoji import NAMES, PICTURES
    from jobs.data.npm import fetch_package

    folder.mkdir(parents=True, exist_ok=True)
    data = []
    for package, name in ((PICTURES, "pictures.tgz"), (NAMES, "names.tgz")):
        if not (folder / name).exists():
            (folder / name).write_bytes(fetch_package(package))
        data.append((folder / name).read_bytes())
    return load_emoji(*data)


def load_emoji(pictures: bytes, names: bytes) -> Bed:
    """Read the two npm packages (tar.gz). A caption names the emoji and its tone, or the emoji only."""
    entries = json.loads(_member(names, re.compile(r"package/en/data\.json"))["package/en/data.json"])
    images = _member(pictures, re.compile(r"package/assets/[0-9a-f-]+\.webp"))
    pixels, captions = [], []
    for entry in sorted(entries, key=lambda entry: entry["hexcode"]):
        skins = {skin["tone"]: skin for skin in entry.get("skins", []) if isinstance(skin["tone"], int)}
        files = [f"package/assets/{skins[tone]['hexcode'].lower()}.webp" for tone in sorted(skins)]
        if len(files) != VARIANTS or any(file not in images for file in files):
            continue
        pixels += [_pixels(io.BytesIO(images[file])) for file in files]
        captions += [*(skins[tone]["label"] for tone in sorted(skins)), entry["label"]]
    assert len(pixels) == VARIANTS * NUM_EMOJI, "the packages are pinned"
    return Bed(_components(np.stack(pixels), _COMPONENTS), _words(captions), torch.arange(len(pixels)))


def _member(package: bytes, pattern: re.Pattern[str]) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(package), mode="r:gz") as tar:
        files = [member for member in tar if member.isfile() and pattern.fullmatch(member.name)]
        return {member.name: file.read() for member in files if (file := tar.extractfile(member))}


def read_stamps(folder: Path) -> Bed:
    """Fetch the package into a folder and read it, once: its features are kept there."""
    path = folder / "stamps.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for package in CORPORA["stamps"].packages:
            fetch(package, folder / "files", folder)
        bed = load_stamps(folder)
        torch.save([bed.targets, bed.queries, bed.contents], path)
    return Bed(*torch.load(path))


def load_stamps(folder: Path) -> Bed:
    """Read the unpacked stamps. A picture asks for its name in one language, or in any."""
    source = stamps(folder / "files", folder)["sources"]["stamps"]
    names: dict[str, dict[str, str]] = {}
    for line in Path(source["table"]).read_text("utf-8").splitlines():
        row = json.loads(line)
        names.setdefault(row["image"], {})[row["language"]] = row["caption"].strip(" .")
    known = {image: found for image, found in names.items() if all(found.get(name) for name in LANGUAGES)}
    assert len(known) == NUM_STAMPS, f"{len(known)} stamps"
    pixels = _components(np.stack([_pixels(Path(source["media_root"]) / image) for image in known]), _COMPONENTS)
    asked = _LANGUAGE_SCALE * torch.eye(VARIANTS + 1)
    queries = torch.cat([pixels.repeat_interleave(VARIANTS + 1, dim=0), asked.repeat(len(pixels), 1)], dim=1)
    words = [found[language] for found in known.values() for language in LANGUAGES]
    number = {name: n for n, name in enumerate(dict.fromkeys(words))}
    contents = torch.tensor([number[name] for name in words])
    return Bed(_components(_trigrams(words), _NAME_COMPONENTS), queries, contents)


def _pixels(data: io.BytesIO | Path) -> np.ndarray[Any, Any]:
    with Image.open(data) as image:
        rgba = image.convert("RGBA").resize((_PIXELS, _PIXELS), Image.Resampling.BOX)
    ground = Image.new("RGBA", rgba.size, "white")
    return np.asarray(Image.alpha_composite(ground, rgba).convert("RGB"), np.float32).reshape(-1) / 255


def _components(values_NP: np.ndarray[Any, Any], count: int) -> Tensor:
    """Return principal components of unit variance."""
    centered = torch.from_numpy(values_NP - values_NP.mean(axis=0)).double()
    _, vectors = torch.linalg.eigh(centered.T @ centered)
    strongest = vectors[:, -count:]
    strongest = strongest * strongest.sum(dim=0).sign()  # an eigenvector has no sign of its own
    found = centered @ strongest
    return (found / found.std(dim=0)).float()


def _words(captions: Sequence[str]) -> Tensor:
    """Return the words of each caption as a unit vector."""
    split = [re.findall(r"\w+", caption.casefold()) for caption in captions]
    number = {word: n for n, word in enumerate(sorted({word for words in split for word in words}))}
    texts = torch.zeros(len(split), len(number))
    for row, words in enumerate(split):
        texts[row, [number[word] for word in words]] = 1
    return normalize(texts, dim=1)


def _trigrams(names: Sequence[str]) -> np.ndarray[Any, Any]:
    """Return the hashed groups of three letters of each name as a unit vector."""
    found_NH = np.zeros((len(names), _HASHES), np.float32)
    for row, name in enumerate(names):
        letters = f" {name} "
        for group in zip(letters, islice(letters, 1, None), islice(letters, 2, None), strict=False):
            found_NH[row, zlib.crc32("".join(group).encode()) % _HASHES] = 1
    return found_NH / np.linalg.norm(found_NH, axis=1, keepdims=True)
