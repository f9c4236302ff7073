"""jobs/umarvel_demo.yaml on a corpus of seconds: the same jobs, with fewer samples and steps."""

from __future__ import annotations

from pathlib import Path

from tests.paths import ROOT

SPEC = ROOT / "jobs/umarvel_demo.yaml"
STAGES = ("nli", "pairs", "instruct", "hard", "distil")
_CORPUS = "{num_images: 60, num_composed: 0, num_documents: 0, num_clips: 0, num_texts: 60}"


def options(out: Path, *, steps: int, checkpoint_steps: int) -> list[str]:
    """What comes after `rzen run`. Everything is written below `out`."""
    changes = {
        "vars.out": out,
        "vars.store": out / "store",
        "jobs.corpus.set.corpus": _CORPUS,
        "jobs.ingest.set.held_out_fraction": 0.2,
    }
    for name in (*STAGES, "reranker"):
        changes |= {f"jobs.{name}.set.steps": steps, f"jobs.{name}.set.global_batch": 8}
        changes[f"jobs.{name}.set.checkpoint.every_steps"] = checkpoint_steps
    return [str(SPEC), *(word for key, value in changes.items() for word in ("--set", f"{key}={value}"))]
