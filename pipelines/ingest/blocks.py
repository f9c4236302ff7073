"""Which samples form which shard: duplicates, splits, order and keys, before any file is read.

Everything here is a pure function of the raw samples and the seed. Files are identified by name: equal files with
different names count as different. Bytes in tables are identified by their content.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import get_args

from pipelines.samples import CellRef, Input, RawSample, Reference, StoredSplit
from pipelines.sources.references import identity
from pipelines.storage.location import is_local

TRAIN, HELD_OUT, UNCAPTIONED = get_args(StoredSplit)
_TOP = Path("/")
_PARTS_OF_GROUP = 16  # our choice
_MIN_TRAIN_SAMPLES = 2  # one sample has nothing to be contrasted with


@dataclass(frozen=True, slots=True)
class Block:
    """The samples of one future shard, in order, with their keys."""

    split: str
    source: str
    ordinal: int
    samples: tuple[RawSample, ...]

    @property
    def path(self) -> str:
        """Path of the shard below the data root."""
        return f"{self.split}/{self.source}/{self.source}-{self.ordinal:06d}.tar"


def pair_identity(raw: RawSample, root: Path = _TOP) -> str:
    """Identify a sample by instruction, texts and media. Files are relative to `root`, so that raw data may move."""
    inputs = [_input_identity(part, raw.files, root) for part in (raw.sample.query, raw.sample.positive)]
    return json.dumps([raw.sample.instruction, *inputs], ensure_ascii=False)


def _input_identity(part: Input, files: dict[str, Reference], root: Path) -> str:
    names = [(media.kind, *identity(files.get(media.member), root)) for media in part.media]
    return json.dumps([part.text, names], ensure_ascii=False)


def plan_blocks(samples: list[RawSample], held_out_fraction: float, seed: int, samples_per_shard: int) -> list[Block]:
    """Split, shuffle and cut each source into blocks. Keys count the samples of a source in a split from 0."""
    root = _shared_folder(samples)
    by_source: dict[str, list[RawSample]] = defaultdict(list)
    for raw in samples:
        by_source[raw.sample.source].append(raw)
    blocks = []
    for source, members in sorted(by_source.items()):
        for split, chosen in _split(members, held_out_fraction, seed, root).items():
            groups = _groups_of_parts(chosen, seed)
            chosen.sort(key=lambda raw: (groups.get(_part(raw), 0), _draw(seed, "order", pair_identity(raw, root))))
            keyed = [_with_key(raw, f"{position:08d}") for position, raw in enumerate(chosen)]
            for ordinal, start in enumerate(range(0, len(keyed), samples_per_shard)):
                blocks.append(Block(split, source, ordinal, tuple(keyed[start : start + samples_per_shard])))
    return blocks


def _part(raw: RawSample) -> tuple[str, int] | None:
    """Return table and part of the first cell that a sample needs. None for samples without cells."""
    cells = (ref for ref in raw.files.values() if isinstance(ref, CellRef))
    return next(((cell.path, cell.part) for cell in cells), None)


def _groups_of_parts(samples: list[RawSample], seed: int) -> dict[tuple[str, int] | None, int]:
    """Divide the parts of tables whose cells are needed into groups of 16, in random order.

    Samples are shuffled within a group. So a shard needs few parts, and the parts of a group lie apart in the table.
    """
    parts = sorted({part for raw in samples if (part := _part(raw))})
    order = sorted(range(len(parts)), key=lambda number: _draw(seed, "part", str(number)))
    return {parts[number]: rank // _PARTS_OF_GROUP for rank, number in enumerate(order)}


def _shared_folder(samples: list[RawSample]) -> Path:
    """Return the deepest folder that holds all local files."""
    paths = {ref.path for raw in samples for ref in raw.files.values() if not isinstance(ref, CellRef)}
    folders = {str(Path(path).absolute().parent) for path in paths if is_local(path)}
    return Path(os.path.commonpath(folders)) if folders else _TOP


def _split(samples: list[RawSample], fraction: float, seed: int, root: Path) -> dict[str, list[RawSample]]:
    """Split the samples of a source, as they say or at random.

    Of the n samples that name no split, round(fraction * n) are held out, or fewer: samples with the same target stay
    together, and train keeps at least two.
    """
    splits: dict[str, list[RawSample]] = {TRAIN: [], HELD_OUT: [], UNCAPTIONED: []}
    by_target: dict[str, list[RawSample]] = defaultdict(list)
    free = [raw for raw in samples if raw.split is None]
    for raw in samples:
        if raw.split:
            splits[raw.split].append(raw)
    for raw in free:
        by_target[_input_identity(raw.sample.positive, raw.files, root)].append(raw)
    room = max(0, min(round(fraction * len(free)), len(free) - _MIN_TRAIN_SAMPLES))
    # In random order, each target is held out if all of its samples still fit. Otherwise a model would be tested on
    # targets that it has trained on.
    for target in sorted(by_target, key=lambda target: _draw(seed, "held out", target)):
        group = by_target[target]
        fits = len(group) <= room
        room -= len(group) * fits
        splits[HELD_OUT if fits else TRAIN] += group
    return splits


def _draw(seed: int, purpose: str, identity: str) -> bytes:
    """Return a pseudo-random rank that depends on the arguments only."""
    return sha256(f"{seed} {purpose} {identity}".encode()).digest()


def _with_key(raw: RawSample, key: str) -> RawSample:
    return replace(raw, sample=replace(raw.sample, key=key))
