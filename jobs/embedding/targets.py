"""Files and tables without captions as a dataset next to their vectors: ingest keeps it up to date."""

from __future__ import annotations

from jobs.data.ingest import run as run_ingest
from jobs.data.specs import IngestSpec
from jobs.embedding.specs import EmbedSpec
from jobs.runtime.progress import say


def ingest_targets(spec: EmbedSpec) -> dict[str, int]:
    """Bring the dataset at `data.root` up to date with the folder or tables. Return what was skipped, by reason."""
    result = run_ingest(
        IngestSpec(
            kind="ingest",
            input=spec.input,
            sources=spec.sources,
            out=spec.data.root,
            endpoint=spec.data.endpoint or spec.endpoint,
            media=spec.data.media,
            held_out_fraction=0.0,
            keep_uncaptioned=True,
        )
    )
    skipped: dict[str, int] = result["rejected"]
    if count := skipped.get("too_long_video"):
        limit = f"longer than {spec.data.media.max_video_s:g} s"
        say(f"  {count:,} videos left out, {limit}: --set data.media.max_video_s=14400 takes four hours")
    return skipped
