"""A teacher's vectors for the pairs of a run: those that `rzen embed` stored, found by the content of each input.

Tasks of the data loader read them, so that this module imports neither torch nor Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from jobs.training.specs import TrainSpec
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.items.types import as_ids, query_id, target_id
from pipelines.plan.plan import Plan
from pipelines.samples import Rejected
from pipelines.storage.location import open_store, resolve_endpoint
from rzen.embedding.corpus import VectorsFile, all_parts, read_manifest, read_version
from rzen.index.by_id import Ids, VectorIndex

SETTING = "data.teacher_vectors"
_LOOKED_AT = 8  # first samples of each source, read with their files
_FIX = "run a job of kind embed with queries: true and this data.root, and name its `out`"


@dataclass(frozen=True)
class Teacher:
    """One version of stored vectors. Pickles: each process reads the ids once, and vectors as it needs them.

    The ids take 48 bytes a vector in each process, and parts of vectors that were read last up to 256 MB.
    """

    url: str
    endpoint: str | None
    version: str
    """Name of the content. A version that is gone is an error."""

    @classmethod
    def of(cls, spec: TrainSpec) -> Teacher | None:
        """Return the live version of the vectors that a run learns from; None if it learns from none.

        Raises `UserError` where there are no vectors, or none of queries.
        """
        if not spec.objective.distills_vectors or spec.data.teacher_vectors is None:
            return None
        url, endpoint = spec.data.teacher_vectors, resolve_endpoint(spec.data.endpoint)
        manifest = read_manifest(url, endpoint)
        version = manifest.get("version")
        if version is None:
            raise UserError(f"{SETTING}={url}", "was written by an earlier version of rzen", "run the job embed again")
        if not manifest.get("query_parts"):
            raise UserError(f"{SETTING}={url}", "has no vectors of queries", _FIX)
        return cls(url, endpoint, version)

    def vectors(self, ids_BR: Ids) -> npt.NDArray[np.float32]:
        """Return the vectors of the inputs with these ids, `[B, R, D]`. NaN for those that have none."""
        index = _index(self)
        return index.rows(ids_BR.ravel()).reshape(*ids_BR.shape, index.width)

    def lacks(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return which of these ids have no vector, in their shape."""
        return _index(self).missing(ids)

    def check(self, reader: Reader, plan: Plan) -> list[str]:
        """Return a warning for each source whose first samples do not all have vectors.

        Raises `UserError` where none has: the vectors are those of other data or other instructions.
        """
        found: dict[str, npt.NDArray[np.bool_]] = {
            source: np.any(self.lacks(_first_ids(reader, source)), axis=1) for source in plan.members
        }
        if all(lacks.all() for lacks in found.values()):
            problem = f"has no vectors of the first samples of {', '.join(found)}: other data or other instructions"
            raise UserError(f"{SETTING}={self.url}", problem, _FIX)
        return [
            f"{SETTING}: no vectors for {lacks.sum()} of the first {len(lacks)} samples of {source}, which then learn"
            " from their pairs only"
            for source, lacks in found.items()
            if lacks.any()
        ]

    def describe(self) -> str:
        """Return which model made the vectors, and how many there are."""
        manifest = _manifest(self)
        return f"learns from {manifest['num_vectors']:,} targets and their queries, vectors of {manifest['model']}"


def _first_ids(reader: Reader, source: str) -> Ids:
    """Return the ids of query and target of the first samples of a source that can be read, `[B, 2]`."""
    rows = range(min(_LOOKED_AT, reader.sizes()[source]))
    ids = [
        id
        for sample in reader.records(source, rows)
        if not isinstance(sample, Rejected)
        for id in (query_id(sample), target_id(sample))
    ]
    return as_ids(ids).reshape(-1, 2)


def _manifest(teacher: Teacher) -> VectorsFile:
    store = open_store(teacher.url, teacher.endpoint)
    manifest = read_version(store, teacher.version)
    if manifest is None:
        problem = f"does not have version {teacher.version} any more, which this run learns from"
        raise UserError(f"{SETTING}={teacher.url}", problem, "keep more versions in the job embed, or start a new run")
    return manifest


@cache
def _index(teacher: Teacher) -> VectorIndex:
    """Return the ids of a version, read once in a process."""
    index = VectorIndex()
    index.add(open_store(teacher.url, teacher.endpoint), all_parts(_manifest(teacher)))
    return index
