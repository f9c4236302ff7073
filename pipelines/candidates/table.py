"""A published table: its manifest, and the rows of each shard when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines.candidates.files import parse_part, parse_plan, read_checked
from pipelines.candidates.types import (
    FORMAT_VERSION,
    MANIFEST,
    PARTS,
    PLAN,
    CandidateManifest,
    CandidateRows,
    PartInfo,
    PlanRows,
    Stage,
    fingerprint_of,
    iter_parts,
)
from pipelines.errors import UserError
from pipelines.shards.manifest import Manifest
from pipelines.storage.location import open_store
from pipelines.storage.store import Store
from pipelines.stored_json import parse_json

JOB = "job"
"""Key of `made_from`: what identifies the job that made the table (`PartWriter.job`)."""
_FIX = "run the job again that wrote it"
_SHOWN = 12  # of a fingerprint, in an error


@dataclass(frozen=True, slots=True)
class CandidateTable:
    """A table in a store. `fingerprint` identifies all of its content."""

    store: Store
    manifest: CandidateManifest
    fingerprint: str

    def check_data(self, data: Manifest) -> None:
        """Raise `UserError` if the table is of other samples than those of a split, in any of its sources.

        Sources of the split that the table does not have are left as they are.
        """
        mine = self.manifest.data
        if mine.split != data.split:
            raise UserError(self.store.url, f"is of the split {mine.split}, not {data.split}", "mine this split")
        for source, fingerprint in mine.sources.items():
            if source not in data.sources:
                problem = f"is of the source {source!r}, which the data do not have"
                raise UserError(self.store.url, problem, "mine again, or name the table of these data")
            found = data.sources[source].fingerprint
            if found != fingerprint:
                problem = f"is of another version of {source}: {fingerprint[:_SHOWN]}, the data have {found[:_SHOWN]}"
                raise UserError(self.store.url, problem, "mine again")

    def check_candidates(self, fix: str = "name a table that mine, judge, select or cluster wrote") -> None:
        """Raise `UserError` for a table of drops only."""
        if not self.manifest.parts:
            raise UserError(self.store.url, f"lists no candidates: {self.manifest.stage} wrote it", fix)

    def derived(
        self,
        stage: Stage,
        job: str,
        parts: Mapping[str, Sequence[PartInfo]],
        settings: dict[str, Any],
        counts: dict[str, Any],
    ) -> CandidateManifest:
        """Return the manifest of a table with other parts that `job` makes of this one in a later stage."""
        manifest = self.manifest
        return replace(
            manifest,
            stage=stage,
            parts={source: tuple(some) for source, some in parts.items()},
            settings=settings,
            made_from=manifest.made_from | {manifest.stage: self.fingerprint, JOB: job},
            counts=counts,
        )

    def plan_rows(self, source: str) -> PlanRows:
        """Return the samples of a source that are dropped or in a cluster. None are in a source without a plan file."""
        info = self.manifest.plan.get(source)
        if info is None:
            return PlanRows.join([])
        data = read_checked(self.store, info.path, info.sha256)
        return parse_plan(data, f"{self.store.url}/{info.path}")

    def has_rows(self, source: str) -> bool:
        """Return whether the table lists candidates of a source."""
        return bool(self.manifest.parts.get(source))

    def rows(self, source: str, shard: int) -> CandidateRows:
        """Read the candidates of the samples of a shard, by its ordinal. Raises `UserError` for damaged files."""
        info = self.manifest.parts[source][shard]
        rows = parse_part(read_checked(self.store, info.path, info.sha256), f"{self.store.url}/{info.path}")
        if len(rows) != info.num_samples:
            problem = f"has {len(rows)} samples, the manifest says {info.num_samples}"
            raise UserError(f"{self.store.url}/{info.path}", problem, _FIX)
        return rows


def read_table(store: Store) -> CandidateTable:
    """Open a table by its manifest. Raises `UserError` if it is missing, damaged or of another version."""
    place = f"{store.url}/{MANIFEST}"
    try:
        data = store.read(MANIFEST)
    except FileNotFoundError as error:
        fix = "run a job of kind mine, judge, select, cluster or curate that writes here"
        raise UserError(place, "there is no such table", fix) from error
    manifest = parse_json(data, place, CandidateManifest, _FIX)
    if manifest.format_version != FORMAT_VERSION:
        problem = f"format version {manifest.format_version}, this program reads {FORMAT_VERSION}"
        raise UserError(place, problem, "mine again")
    return CandidateTable(store, manifest, fingerprint_of(data))


def finished_table(store: Store, job: str) -> CandidateTable | None:
    """Return the table that is there, if this very job has made it and no file is gone."""
    try:
        table = read_table(store)
    except UserError:  # none, or a damaged one, which is replaced
        return None
    if table.manifest.made_from.get(JOB) != job:
        return None
    named = {part.path for _, _, part in iter_parts(table.manifest)}
    named |= {info.path for info in table.manifest.plan.values()}
    return table if named <= {path for folder in (PARTS, PLAN) for path in store.list(folder)} else None


def check_other(out: str, table: str, endpoint: str | None, use: str) -> None:
    """Raise `UserError` if a job would write its output where the table is that it reads. `use` says what for."""
    if open_store(out, endpoint).url == open_store(table, endpoint).url:
        raise UserError(f"out={out}", f"is the table that is {use}", "name another folder")


def open_table(url: str, endpoint: str | None = None) -> CandidateTable:
    """Open the table at a path or URL. Raises `UserError` as `read_table` does."""
    return read_table(open_store(url, endpoint))
