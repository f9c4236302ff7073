"""Markers: what an ingest job has done, stored next to the dataset, so that the same command goes on from there.

    ingest/{group}/plan.json      blocks of a group, and the rows that gave none, when its rows have been read
    ingest/{group}/000000.json    a block, when its shard is stored
    ingest/groups.json            groups of the published dataset; replaced at the same moment as the manifests

A marker has a hash of its content. One that is damaged, or whose shard is gone or was changed, counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar, get_args

from pipelines.errors import UserError
from pipelines.ingest.groups import StoredGroups
from pipelines.ingest.report import Tally
from pipelines.samples import StoredSplit
from pipelines.shards.manifest import ShardInfo
from pipelines.storage.publish import read_published
from pipelines.storage.store import Store
from pipelines.stored_json import parse_json

FOLDER = "ingest"
GROUPS_PATH = f"{FOLDER}/groups.json"
_PLAN = "plan.json"
_GROUP = re.compile(r"[0-9a-f]{32}")
_READERS = 32
_UNFOUND = ("missing_file", "outside_folder")

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlannedBlock:
    """A block of a plan, without its samples. `digest` is that of `Block`."""

    split: StoredSplit
    source: str
    num_samples: int
    digest: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What the rows of a group give: blocks in order, the task of each source, and rows that give nothing."""

    seen: int
    tasks: dict[str, str]
    blocks: tuple[PlannedBlock, ...]
    num_free: dict[str, int]  # source -> samples that name no split
    tally: Tally

    @property
    def may_change(self) -> bool:
        """Whether a file that was missing may be there by now."""
        return any(reason in self.tally.rejected for reason in _UNFOUND)

    @property
    def num_samples(self) -> int:
        """Samples of all blocks."""
        return sum(block.num_samples for block in self.blocks)


@dataclass(frozen=True, slots=True)
class WrittenBlock:
    """A block whose shard is stored. `shard` is None if no sample was usable. `tags` are those of shard and index.

    The first block of a source in a group has `examples`: its first samples, as JSON.
    """

    number: int
    digest: str
    shard: ShardInfo | None = None
    tags: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    tally: Tally = field(default_factory=Tally)


@dataclass(slots=True)
class StoredGroup:
    """What the markers of a group say."""

    plan: Plan | None = None
    blocks: dict[int, WrittenBlock] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        if self.plan is None or self.plan.may_change:
            return False
        return all(
            number in self.blocks and self.blocks[number].digest == block.digest
            for number, block in enumerate(self.plan.blocks)
        )


def write_plan(out: Store, group: str, plan: Plan) -> None:
    """Store the marker of a plan. An equal one may be there, from a task that was repeated."""
    out.write_if(f"{FOLDER}/{group}/{_PLAN}", _with_hash(asdict(plan)), None)


def write_block_marker(out: Store, group: str, block: WrittenBlock) -> None:
    """Store the marker of a block, after its shard. An equal one may be there, from a task that was repeated."""
    out.write_if(_block_path(group, block.number), _with_hash(asdict(block)), None)


def delete_block_marker(out: Store, group: str, number: int) -> None:
    """Delete the marker of a block that has other samples by now."""
    out.delete(_block_path(group, number))


def read_markers(out: Store, groups: Iterable[str]) -> dict[str, StoredGroup]:
    """Return what is stored of each group. Markers that hold no longer are deleted: their work is done again."""
    wanted = {group: StoredGroup() for group in groups}
    paths = [path for path in out.list(FOLDER) if path.split("/")[1] in wanted]
    tags = {path: tag for split in get_args(StoredSplit) for path, tag in out.tags(split).items()} if paths else {}
    with ThreadPoolExecutor(_READERS) as pool:
        for path, marker in zip(paths, pool.map(lambda path: _read(out, path), paths), strict=True):
            group = wanted[path.split("/")[1]]
            if isinstance(marker, Plan) and not marker.may_change:
                group.plan = marker
            elif isinstance(marker, WrittenBlock) and _is_stored(marker, tags):
                group.blocks[marker.number] = marker
            else:
                out.delete(path)
    return wanted


def _read(out: Store, path: str) -> Plan | WrittenBlock | None:
    """Return a marker. None for one that is damaged, which is reported."""
    try:
        kind: type[Plan] | type[WrittenBlock] = Plan if path.endswith(f"/{_PLAN}") else WrittenBlock
        return _parsed(out.read(path), f"{out.url}/{path}", kind)
    except UserError as error:
        _log.warning("%s: %s; its work is done again", error.place, error.problem)
        return None


def _is_stored(block: WrittenBlock, tags: Mapping[str, str]) -> bool:
    shard = block.shard
    found = (tags.get(shard.path), tags.get(shard.index_path)) if shard else ()
    if found == block.tags:
        return True
    _log.warning("%s is gone or was changed; it is written again", shard.path if shard else "a shard")
    return False


def groups_file(groups: StoredGroups) -> bytes:
    """Return the content of `groups.json`."""
    return _with_hash({"groups": groups})


@dataclass(frozen=True, slots=True)
class _GroupsFile:
    groups: dict[str, dict[str, tuple[str, ...]]]


def read_groups(out: Store) -> StoredGroups:
    """Return the groups of the published dataset, and none if there is none or the file is damaged."""
    try:
        return _parsed(read_published(out, GROUPS_PATH), f"{out.url}/{GROUPS_PATH}", _GroupsFile).groups
    except FileNotFoundError:
        return {}
    except UserError as error:
        _log.warning("%s: %s; groups are formed again", error.place, error.problem)
        return {}


def delete_markers(out: Store, kept: Iterable[str] = ()) -> None:
    """Delete the markers of all groups but those that are kept."""
    known = set(kept)
    found = {path.split("/")[1] for path in out.list(FOLDER)}
    for group in sorted(found - known):
        if _GROUP.fullmatch(group):
            out.delete_tree(f"{FOLDER}/{group}")


def _block_path(group: str, number: int) -> str:
    return f"{FOLDER}/{group}/{number:06d}.json"


def _with_hash(content: Mapping[str, Any]) -> bytes:
    return (json.dumps({**content, "sha256": _hash(content)}, indent=1, ensure_ascii=False) + "\n").encode()


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parsed(data: bytes, place: str, kind: type[T]) -> T:
    """Return the content of a file that `_with_hash` made. Raises `UserError` for anything else."""
    parsed = parse_json(data, place, kind)
    content = json.loads(data)
    if content.pop("sha256", None) != _hash(content):
        raise UserError(place, "its hash is not that of its content", "delete it")
    return parsed
