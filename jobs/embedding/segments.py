"""Segments of the long videos of a dataset: their lengths are read once, by Ray tasks, and kept with the listings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from jobs.embedding.listings import each_shard
from jobs.embedding.settings import EmbedderSettings
from jobs.embedding.specs import EmbedSpec
from pipelines.config import DataConfig
from pipelines.items.listing import ListedShard
from pipelines.items.segments import (
    Segmentation,
    has_videos,
    is_divisible,
    lengths_path,
    read_lengths,
    write_lengths,
)
from pipelines.samples import Rejected, Sample, TimeRange
from pipelines.storage.store import Store
from rzen.embedding.corpus import SegmentsEntry

WHOLE: tuple[None] = (None,)
"""The only segment of a target that is not divided."""


class TargetSegments:
    """The segments of targets. Without `segmentation`, every target is embedded whole, and no video is measured."""

    def __init__(self, segmentation: Segmentation | None, data: DataConfig, listings: Store) -> None:
        self.segmentation, self._data, self._listings = segmentation, data, listings
        self._lengths: tuple[str, dict[int, float | Rejected]] = ("", {})
        self.paths: list[str] = []
        """Files of lengths that the job needs."""

    @classmethod
    def of_job(cls, spec: EmbedSpec, settings: EmbedderSettings, listings: Store) -> TargetSegments:
        """Return the segments that a spec asks for."""
        assert settings.data is not None
        segmentation = None
        if spec.segment_seconds is not None:
            segmentation = Segmentation(spec.segment_seconds, spec.segment_overlap_seconds)
        return cls(segmentation, settings.data, listings)

    def measure(
        self, shards: Sequence[ListedShard], cpus_per_task: float, on_progress: Callable[[int, int], None]
    ) -> None:
        """Read the lengths of the videos of all shards that are not known yet. `on_progress` gets (done, all)."""
        if self.segmentation is None:
            return
        paths = {lengths_path(self._data, shard): shard for shard in shards}
        kept = set(self._listings.list())
        lacking = {
            path: shard for path, shard in paths.items() if path not in kept and has_videos(shard, self._listings)
        }
        self.paths = [path for path in paths if path in kept or path in lacking]
        read = each_shard(write_lengths, self._data, [*lacking.values()], self._listings, cpus_per_task, few=1)
        for done, _ in enumerate(read, start=1):
            on_progress(done, len(lacking))

    def of(self, shard: ListedShard, index: int, sample: Sample) -> Sequence[TimeRange | None] | Rejected:
        """Return the segments of a target, `WHOLE` for one that is not divided, or why its video has no length."""
        if self.segmentation is None or not is_divisible(sample):
            return WHOLE
        path = lengths_path(self._data, shard)
        if self._lengths[0] != path:
            self._lengths = path, read_lengths(self._data, shard, self._listings)
        length_s = self._lengths[1][index]
        if isinstance(length_s, Rejected):
            return length_s
        return self.segmentation.divide(length_s) or WHOLE

    def entry(self, counts: Counter[str]) -> SegmentsEntry | None:
        """Return what `vectors.json` says of them, given the number of `videos` and `segments`."""
        if self.segmentation is None:
            return None
        return {
            "seconds": self.segmentation.seconds,
            "overlap_s": self.segmentation.overlap_s,
            "num_videos": counts["videos"],
            "num_segments": counts["segments"],
        }
