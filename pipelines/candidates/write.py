"""Writes a table part by part, so that a job that was killed goes on where it was.

    {table}/parts/{source}-{shard:06d}-{digest}.parquet    a part; the digest is that of its bytes
    {table}/unfinished/{job}/{source}-{shard:06d}.json     says that this part is made; deleted when the table is whole
    {table}/unfinished/{job}/kept/{name}                   what a job keeps for its next try; deleted, too
    {table}/plan/{source}-{digest}.parquet                 drops and clusters of a source
    {table}/candidates.json                                written last

`job` identifies all that decides the parts. A task writes a part, then its marker. Tasks that make a part twice write
the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import accumulate
from typing import Any

from pipelines.candidates.files import parse_part, part_bytes, plan_bytes, read_checked
from pipelines.candidates.table import CandidateTable
from pipelines.candidates.types import (
    MANIFEST,
    PARTS,
    PLAN,
    CandidateManifest,
    CandidateRows,
    PartInfo,
    PlanInfo,
    PlanRows,
    fingerprint_of,
)
from pipelines.storage.store import Store
from pipelines.stored_json import parse_json

UNFINISHED, KEPT = "unfinished", "kept"
DIGEST_CHARS = 12
_OURS = re.compile(rf"({PARTS}/.+-\d{{6}}|{PLAN}/.+)-[0-9a-f]{{{DIGEST_CHARS}}}\.parquet")
_THREADS = 16
Place = tuple[str, int]
"""Source, and ordinal of a shard in it."""


@dataclass(frozen=True, slots=True)
class WrittenPart(PartInfo):
    """What a marker says: a part, and what its job notes of it."""

    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def info(self) -> PartInfo:
        """Return the part as a manifest has it."""
        return PartInfo(*(getattr(self, item.name) for item in fields(PartInfo)))


@dataclass(frozen=True, slots=True)
class PartWriter:
    """Writes the parts of one job. It pickles, and any number of tasks may use it at the same time."""

    store: Store
    job: str

    @classmethod
    def of(cls, store: Store, identity: Mapping[str, Any]) -> PartWriter:
        """Return the writer of a job that is identified by all that decides its parts, as JSON."""
        text = json.dumps(identity, sort_keys=True)
        return cls(store, hashlib.sha256(text.encode()).hexdigest()[:32])

    @property
    def _folder(self) -> str:
        return f"{UNFINISHED}/{self.job}"

    def done(self) -> dict[Place, PartInfo]:
        """Return the parts that this job has made so far. Those whose file is gone are left out."""
        return {place: part.info for place, part in self.written().items()}

    def written(self) -> dict[Place, WrittenPart]:
        """Return the parts of `done` with what was noted of each."""
        there = set(self.store.list(PARTS))
        paths = [path for path in self.store.list(self._folder) if not path.startswith(f"{self._folder}/{KEPT}/")]
        with ThreadPoolExecutor(_THREADS) as pool:
            parts = pool.map(self._marker, paths)
        found = {}
        for path, part in zip(paths, parts, strict=True):
            source, _, ordinal = path.removeprefix(f"{self._folder}/").removesuffix(".json").rpartition("-")
            if part.path in there:
                found[source, int(ordinal)] = part
        return found

    def _marker(self, path: str) -> WrittenPart:
        return parse_json(self.store.read(path), f"{self.store.url}/{path}", WrittenPart, "delete the file")

    def kept_path(self, name: str) -> str:
        """Return the place of what is kept under a name."""
        return f"{self._folder}/{KEPT}/{name}"

    def keep(self, name: str, data: bytes) -> None:
        """Keep what this job has computed until its table is published."""
        self.store.write(self.kept_path(name), data)

    def kept(self, name: str) -> bytes | None:
        """Return what an earlier try of this job has kept under a name, or None."""
        try:
            return self.store.read(self.kept_path(name))
        except FileNotFoundError:
            return None

    def write(self, source: str, shard: int, rows: CandidateRows, notes: Mapping[str, Any] | None = None) -> PartInfo:
        """Write the candidates of a shard's samples, then its marker. `notes` are JSON, for `written`."""
        data = part_bytes(rows)
        sha256 = hashlib.sha256(data).hexdigest()
        plan = PlanRows.of(rows.keep, rows.cluster)
        info = PartInfo(
            path=f"{PARTS}/{source}-{shard:06d}-{sha256[:DIGEST_CHARS]}.parquet",
            sha256=sha256,
            num_samples=len(rows),
            num_candidates=len(rows.candidate),
            num_dropped=plan.num_dropped,
            num_clustered=plan.num_clustered,
        )
        self.store.write(info.path, data)
        marker = json.dumps(asdict(info) | {"notes": dict(notes or {})}) + "\n"
        self.store.write(f"{self._folder}/{source}-{shard:06d}.json", marker.encode())
        return info


def publish_table(
    store: Store,
    manifest: CandidateManifest,
    plan: Mapping[str, PlanRows] | None = None,
    before_publish: Callable[[], None] = lambda: None,
) -> CandidateTable:
    """Write the plan files and the manifest, then delete what it does not name. Return the table.

    Without `plan`, drops and clusters are those of the parts. `before_publish` is called before the manifest is
    written, such as to check a lease.
    """
    plans = {}
    for source in manifest.data.sources:
        rows = _plan_of_parts(store, manifest.parts.get(source, ())) if plan is None else plan.get(source)
        if rows is not None and len(rows):
            plans[source] = _write_plan(store, source, rows)
    manifest = replace(manifest, plan=plans)
    data = (json.dumps(asdict(manifest), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
    before_publish()
    store.write(MANIFEST, data)
    named = {info.path for parts in manifest.parts.values() for info in parts}
    named |= {info.path for info in plans.values()}
    for folder in (PARTS, PLAN):
        for path in store.list(folder):
            if path not in named and _OURS.fullmatch(path):
                store.delete(path)
    store.delete_tree(UNFINISHED)
    return CandidateTable(store, manifest, fingerprint_of(data))


def _write_plan(store: Store, source: str, rows: PlanRows) -> PlanInfo:
    data = plan_bytes(rows)
    sha256 = hashlib.sha256(data).hexdigest()
    path = f"{PLAN}/{source}-{sha256[:DIGEST_CHARS]}.parquet"
    store.write(path, data)
    return PlanInfo(path, sha256, rows.num_dropped, rows.num_clustered)


def _plan_of_parts(store: Store, parts: tuple[PartInfo, ...]) -> PlanRows:
    """Return drops and clusters of a source. Parts without any are not read."""
    starts = accumulate((part.num_samples for part in parts), initial=0)
    work = [(part, start) for part, start in zip(parts, starts, strict=False) if part.num_dropped or part.num_clustered]

    def read(some: tuple[PartInfo, int]) -> PlanRows:
        part, start = some
        rows = parse_part(read_checked(store, part.path, part.sha256), f"{store.url}/{part.path}")
        return PlanRows.of(rows.keep, rows.cluster, start)

    with ThreadPoolExecutor(_THREADS) as pool:
        return PlanRows.join([*pool.map(read, work)])
