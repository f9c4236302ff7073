"""Job of kind `corpus`: draws a folder of files with captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.data.specs import CorpusSpec
from jobs.runtime.lease import hold_output
from jobs.runtime.progress import Bars, say
from pipelines.storage.location import open_store
from pipelines.storage.store import disk_errors
from pipelines.synthetic.corpus import make_corpus


def run(spec: CorpusSpec) -> dict[str, Any]:
    """Draw the corpus. A finished one is left unchanged."""
    with hold_output(open_store(spec.out), "corpus", "draws a corpus") as lease, disk_errors(spec.out), Bars() as bars:

        def on_progress(done: int, total: int) -> None:
            lease.check()  # after the last file, too: before the captions, which name all of them
            bars.update("draw", done, total, unit="files")

        samples = make_corpus(Path(spec.out), spec.corpus, on_progress)
    say(f"  {sum(samples.values()):,} samples in {spec.out}: {_listed(samples)}")
    return {"outputs": [spec.out], "samples": samples}


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
