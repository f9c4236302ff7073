"""Job of kind `judge`: the candidates of a table, and the positives of its samples, get the scores of a judge.

    {out}/candidates.json, parts/, plan/     a candidate table with teacher scores (`pipelines.candidates`)
    {out}/scores/                            scores by content of query, document and judge, kept for the next job
    {out}/listings/                          what the shards hold

Parts are made one after the other, so that the job needs the memory of a few of them. Nothing is done if the table is
there, of the same candidates and judge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from jobs.embedding.engine import check_workers
from jobs.embedding.listings import list_shards
from jobs.embedding.vectors import VectorCache
from jobs.judging.endpoint import RemoteJudge
from jobs.judging.inputs import InputPlaces
from jobs.judging.local import LocalJudge, Work
from jobs.judging.pairs import (
    PAIRS_AT_ONCE,
    Int64Array,
    Keys,
    PartPairs,
    Unit,
    judged_candidates,
    missing_of,
    pairs_of,
    windows,
)
from jobs.judging.scores import KeptScores, repeated_queries
from jobs.judging.specs import JudgeSpec
from jobs.runtime.cluster import ray_cluster
from jobs.runtime.lease import Lease, hold_output
from jobs.runtime.progress import Bars, say
from pipelines.candidates.files import parse_part, read_checked
from pipelines.candidates.table import CandidateTable, check_other, finished_table, open_table
from pipelines.candidates.types import KIND, CandidateRows, PartInfo, TableData, iter_parts
from pipelines.candidates.write import PartWriter, Place, publish_table
from pipelines.items.listing import ListedShard, read_listing
from pipelines.shards.manifest import read_manifest
from pipelines.storage.location import open_store, resolve_endpoint
from pipelines.storage.store import Store

SCORES, LISTINGS = "scores", "listings"


class Judge(Protocol):
    """Who scores pairs. `config` has content only: equal ones give equal scores."""

    @property
    def config(self) -> dict[str, Any]:
        """What decides a score."""

    @property
    def name(self) -> str:
        """What people call it."""

    def score(self, work: Work, workers: JudgeSpec, on_pairs: Any) -> Counter[str]:
        """Judge units and keep the scores. Return how many pairs have none, by reason."""


@dataclass(slots=True)
class _Counts:
    """What the manifest says of the pairs of all parts."""

    scored: int = 0
    without_score: int = 0

    def add(self, rows: CandidateRows, top_k: int | None) -> None:
        """Count the pairs of a part."""
        scores = np.concatenate([rows.teacher[judged_candidates(rows, top_k)], rows.positive_teacher[rows.keep]])
        self.scored += int(np.isfinite(scores).sum())
        self.without_score += int(np.isnan(scores).sum())


@dataclass(slots=True)
class _Part:
    """One part of the table on its way."""

    place: Place
    rows: CandidateRows
    pairs: PartPairs
    cache: VectorCache


def run(spec: JudgeSpec) -> dict[str, Any]:
    """Judge every pair that has no score yet, and publish the table with the scores of all."""
    store = open_store(spec.out, spec.endpoint)
    check_other(spec.out, spec.table, spec.endpoint, "judged")
    with hold_output(store, KIND, "judges") as lease:
        return _Job(spec, store, open_table(spec.table, spec.endpoint), lease).run()


@dataclass
class _Job:
    spec: JudgeSpec
    store: Store
    table: CandidateTable
    lease: Lease
    reasons: Counter[str] = field(default_factory=Counter)
    counts: _Counts = field(default_factory=_Counts)
    judged: int = 0

    def run(self) -> dict[str, Any]:
        self.table.check_candidates()
        spec, manifest = self.spec, self.table.manifest
        changes = {"split": manifest.data.split, "endpoint": resolve_endpoint(spec.data.endpoint)}
        data = spec.data.model_copy(update=changes)
        self.table.check_data(read_manifest(open_store(data.root, data.endpoint), manifest.data.split))
        places = InputPlaces(data, manifest.pools, manifest.data.sources)
        judge = self._judge(places)
        identity = {"table": self.table.fingerprint, "judge": judge.config, "top_k": spec.top_k}
        writer = PartWriter.of(self.store, identity)
        finished = finished_table(self.store, writer.job)
        if finished is not None and self._has_scores():
            say(f"  {self.store.url} is up to date: nothing to judge")
            self.counts = _Counts(**finished.manifest.counts["pairs"])
            if self.counts.without_score:
                say(f"  {self.counts.without_score:,} of its pairs have no score", "yellow")
            return self._result(finished)
        with ray_cluster() if self._on_cluster else nullcontext(), Bars() as bars:
            if self._on_cluster:
                check_workers(spec)
            done = writer.done()
            for part in done.values():
                rows = parse_part(read_checked(self.store, part.path, part.sha256), part.path)
                self.counts.add(rows, spec.top_k)
            shards = self._shards(data)
            total = sum(self._num_pairs(part) for _, _, part in iter_parts(manifest))
            say(f"  at most {total:,} pairs of {spec.table}, judge {judge.name} -> {self.store.url}")
            self._bars, self._total = bars, total
            self._seen = sum(self._num_pairs(part) for source, n, part in iter_parts(manifest) if (source, n) in done)
            kept = KeptScores(self.store.child(SCORES), judge.config, by_shard=self._on_cluster)
            for window in self._windows(shards, done, kept):
                self._judge_window(window, judge, kept)
                for one in window:
                    done[one.place] = writer.write(*one.place, self._with_scores(one, kept))
        return self._publish(judge, writer.job, done)

    @property
    def _on_cluster(self) -> bool:
        """Whether the job needs Ray. An endpoint is asked by this process."""
        return self.spec.model is not None

    def _judge(self, places: InputPlaces) -> Judge:
        spec = self.spec
        if spec.model is not None:
            return LocalJudge.of(spec.model, places, resolve_endpoint(spec.endpoint), spec.chunk_tokens)
        assert spec.api is not None
        return RemoteJudge.of(spec.api, places)

    def _shards(self, data: Any) -> dict[Place, ListedShard]:
        sources = list(self.table.manifest.parts)
        listed = list_shards(
            data,
            [data.split],
            self.store.child(LISTINGS),
            self.spec.cpus_per_task,
            sources,
            on_cluster=self._on_cluster,
        )
        numbers: Counter[str] = Counter()
        found = {}
        for shard in listed:
            found[shard.source, numbers[shard.source]] = shard
            numbers[shard.source] += 1
        return found

    def _num_pairs(self, part: PartInfo) -> int:
        most = part.num_candidates
        if self.spec.top_k is not None:
            most = min(most, self.spec.top_k * part.num_samples)
        return most + part.num_samples - part.num_dropped

    def _windows(
        self, shards: dict[Place, ListedShard], done: dict[Place, PartInfo], kept: KeptScores
    ) -> Iterator[list[_Part]]:
        """Yield the parts that are not done, as many at a time as memory allows."""
        num_pairs = {
            (source, number): self._num_pairs(part)
            for source, number, part in iter_parts(self.table.manifest)
            if (source, number) not in done
        }
        if not num_pairs:
            return
        by_shard = shards.values() if self._on_cluster else ()
        instructions = self.spec.data.instructions
        repeated = repeated_queries(by_shard, self.store.child(LISTINGS), instructions=instructions)
        for places in windows(num_pairs, num_pairs.__getitem__, PAIRS_AT_ONCE):
            yield [self._part(place, shards[place], repeated, kept) for place in places]

    def _part(self, place: Place, shard: ListedShard, repeated: Int64Array, kept: KeptScores) -> _Part:
        rows, samples = self.table.rows(*place), list(read_listing(shard, self.store.child(LISTINGS)))
        instructions = self.spec.data.instructions
        pairs = pairs_of(rows, samples, shard, self.table.manifest, self.spec.top_k, instructions, repeated)
        return _Part(place, rows, pairs, kept.cache_of(shard))

    def _judge_window(self, window: list[_Part], judge: Judge, kept: KeptScores) -> None:
        repeated = [(part.cache, part.pairs.repeated) for part in window]
        kept.share(repeated)  # what a job that was killed has kept of one shard, others may need, too
        work: list[tuple[VectorCache, Unit]] = []
        asked: set[bytes] = set()  # the first part asks for a pair that several have
        for part in window:
            missing = kept.missing(part.cache, part.pairs.keys)
            wanted: Keys = missing[[key not in asked for key in missing.tolist()]]
            work += [(part.cache, unit) for unit in missing_of(part.pairs.units, wanted)]
            asked.update(wanted.tolist())
        waiting = sum(len(unit) for _, unit in work)
        self._seen += sum(len(part.pairs.candidate_keys) + len(part.pairs.positive_keys) for part in window) - waiting
        self._show(0)
        self.reasons += judge.score(work, self.spec, self._show)
        self.judged += waiting
        kept.share(repeated)

    def _show(self, num_pairs: int) -> None:
        self._seen = min(self._seen + num_pairs, self._total)
        self._bars.update("judge", self._seen, self._total, unit="pairs")

    def _with_scores(self, part: _Part, kept: KeptScores) -> CandidateRows:
        keys = part.pairs.candidate_keys, part.pairs.positive_keys
        teacher, positive_teacher = np.split(kept.scores(part.cache, np.concatenate(keys)), [len(keys[0])])
        rows = replace(part.rows, teacher=teacher, positive_teacher=positive_teacher)
        self.counts.add(rows, self.spec.top_k)
        return rows

    def _has_scores(self) -> bool:
        """Return whether scores are kept. Who deletes them asks for new ones."""
        return bool(self.store.child(SCORES).list())

    def _publish(self, judge: Judge, job: str, done: dict[Place, PartInfo]) -> dict[str, Any]:
        manifest = self.table.manifest
        parts = {
            source: tuple(done[source, number] for number in range(len(old))) for source, old in manifest.parts.items()
        }
        settings = {"judge": judge.config, "top_k": self.spec.top_k}
        new = self.table.derived("judge", job, parts, settings, {"pairs": asdict(self.counts)})
        data = TableData(self.spec.data.root, manifest.data.split, manifest.data.sources)
        published = publish_table(self.store, replace(new, data=data), before_publish=self.lease.check)
        say(f"  {self.judged:,} pairs were judged; the others had their score")
        for reason, count in sorted(self.reasons.items()):
            say(f"  without a score: {reason} {count:,}", "yellow")
        return self._result(published)

    def _result(self, table: CandidateTable) -> dict[str, Any]:
        return {
            "outputs": [self.spec.out],
            "judged": self.judged,
            **asdict(self.counts),
            "reasons": dict(self.reasons),
            "fingerprint": table.fingerprint,
        }
