"""Which samples form which shard: splits, order and keys, before any file is read.

Everything here is a pure function of the raw samples and the seed. Files are identified by name: equal files with
different names count as different. Bytes in tables are identified by their content.

A source may be planned in several groups, which know nothing of each other. Names and keys then carry the group, and
the target of a sample alone decides its split.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import get_args

from pipelines.samples import CellRef, Input, RawSample, Reference, StoredSplit
from pipelines.sources.references import identity
from pipelines.storage.urls import is_local

TRAIN: StoredSplit
HELD_OUT: StoredSplit
UNCAPTIONED: StoredSplit
TRAIN, HELD_OUT, UNCAPTIONED = get_args(StoredSplit)
Splits = dict[StoredSplit, list[RawSample]]
_TOP = Path("/")
_encode = json.JSONEncoder(ensure_ascii=False).encode
MIN_TRAIN_SAMPLES = 2  # one sample has nothing to be contrasted with


@dataclass(frozen=True, slots=True)
class Block:
    """The samples of one future shard, in order, with their keys."""

    split: StoredSplit
    source: str
    ordinal: int
    samples: tuple[RawSample, ...]
    group: str = ""

    @property
    def path(self) -> str:
        """Path of the shard below the data root."""
        group = f"{self.group}-" if self.group else ""
        return f"{self.split}/{self.source}/{self.source}-{group}{self.ordinal:06d}.tar"

    @property
    def digest(self) -> str:
        """Hash of the samples in order, with the places of their media: equal for blocks that give equal shards."""
        content = sha256(self.path.encode())
        for raw in self.samples:
            content.update(repr(raw).encode())
        return content.hexdigest()


def pair_identity(raw: RawSample, root: Path = _TOP) -> str:
    """Identify a sample by instruction, texts and media. Files are relative to `root`, so that raw data may move."""
    inputs = [_input_identity(part, raw.files, root) for part in (raw.sample.query, raw.sample.positive)]
    return _encode([raw.sample.instruction, *inputs])


def _input_identity(part: Input, files: dict[str, Reference], root: Path) -> str:
    names = [(media.kind, *identity(files.get(media.member), root)) for media in part.media]
    return _encode([part.text, names])


def plan_blocks(
    samples: Sequence[RawSample],
    held_out_fraction: float,
    seed: int,
    samples_per_shard: int,
    *,
    group: str = "",
    root: Path | None = None,
) -> list[Block]:
    """Split, shuffle and cut each source into blocks. Keys count the samples of a source in a split from 0.

    Without a `group`, the samples are all that their sources have. With one, they are a part. All parts of a source
    must have the same `root`, which is otherwise the deepest folder that holds all local files.
    """
    if root is None:
        root = shared_folder(samples)
    by_source: dict[str, list[RawSample]] = defaultdict(list)
    for raw in samples:
        by_source[raw.sample.source].append(raw)
    blocks = []
    for source, members in sorted(by_source.items()):
        split_samples = _split_by_target if group else _split
        for split, chosen in split_samples(members, held_out_fraction, seed, root).items():
            chosen.sort(key=lambda raw: _draw(seed, "order", pair_identity(raw, root)))
            prefix = f"{group}-" if group else ""
            keyed = [_with_key(raw, f"{prefix}{position:08d}") for position, raw in enumerate(chosen)]
            for ordinal, start in enumerate(range(0, len(keyed), samples_per_shard)):
                blocks.append(Block(split, source, ordinal, tuple(keyed[start : start + samples_per_shard]), group))
    return blocks


def shared_folder(samples: Iterable[RawSample]) -> Path:
    """Return the deepest folder that holds all local files."""
    paths = {ref.path for raw in samples for ref in raw.files.values() if not isinstance(ref, CellRef)}
    folders = {str(Path(path).absolute().parent) for path in paths if is_local(path)}
    return Path(os.path.commonpath(folders)) if folders else _TOP


def _split(samples: list[RawSample], fraction: float, seed: int, root: Path) -> Splits:
    """Split the samples of a source, as they say or at random.

    Of the n samples that name no split, round(fraction * n) are held out, or fewer: samples with the same target stay
    together, and train keeps at least two.
    """
    splits: Splits = {TRAIN: [], HELD_OUT: [], UNCAPTIONED: []}
    by_target: dict[str, list[RawSample]] = defaultdict(list)
    free = [raw for raw in samples if raw.split is None]
    for raw in samples:
        if raw.split:
            splits[raw.split].append(raw)
    for raw in free:
        by_target[_input_identity(raw.sample.positive, raw.files, root)].append(raw)
    room = max(0, min(round(fraction * len(free)), len(free) - MIN_TRAIN_SAMPLES))
    # In random order, each target is held out if all of its samples still fit. Otherwise a model would be tested on
    # targets that it has trained on.
    for target in sorted(by_target, key=lambda target: _draw(seed, "held out", target)):
        group = by_target[target]
        fits = len(group) <= room
        room -= len(group) * fits
        splits[HELD_OUT if fits else TRAIN] += group
    return splits


def _split_by_target(samples: list[RawSample], fraction: float, seed: int, root: Path) -> Splits:
    """Split a part of a source, as the samples say or by their targets, so that equal targets of all parts meet."""
    splits: Splits = {TRAIN: [], HELD_OUT: [], UNCAPTIONED: []}
    for raw in samples:
        drawn = _draw(seed, "held out", _input_identity(raw.sample.positive, raw.files, root))
        is_held_out = int.from_bytes(drawn[:8]) < fraction * 2**64
        splits[raw.split or (HELD_OUT if is_held_out else TRAIN)].append(raw)
    return splits


def _draw(seed: int, purpose: str, identity: str) -> bytes:
    """Return a pseudo-random rank that depends on the arguments only."""
    return sha256(f"{seed} {purpose} {identity}".encode()).digest()


def _with_key(raw: RawSample, key: str) -> RawSample:
    return replace(raw, sample=replace(raw.sample, key=key))
