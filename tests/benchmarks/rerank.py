"""Re-ranking image candidates: pairs grouped by candidate, pairs as they come, and CrossEncoder.

    python -m tests.benchmarks.rerank --write                      some minutes on two cores; writes rerank.md
    python -m tests.benchmarks.rerank --queries 4 --turns 1        a glance
    python -m tests.benchmarks.rerank --device cuda --model DIR    a re-ranker of your own, on a GPU

Each query is a text with `--top-k` of `--candidates` images. All ways start from decoded pixels, and have the same
weights and one thread. They take turns in one process. Ratios are to `ungrouped` of the same turn, and log-odds are
compared before.

    grouped                 what rzen does: pairs of a candidate follow each other, and the tower reads an image once
    ungrouped               rzen on batches of 32 pairs, query by query: the tower reads an image for each batch
    sentence-transformers   `CrossEncoder.predict` of the exported model, in batches of 32
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import rzen
from pipelines.samples import DecodedInput
from rzen.config import Dtype, PairPromptConfig, TinyBackbone
from rzen.export.export import ExportOptions
from rzen.export.opening import has_torchvision, register_processors
from rzen.export.reranker import export_reranker
from rzen.model.backbone import build_tiny
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import say, seconds_of, show, spread
from tests.tiny import noise

BACKBONE = TinyBackbone(hidden=128, layers=4, heads=4, vision_width=64, vision_depth=4, vocabulary=1024, init_std=0.02)
PROMPT = PairPromptConfig(max_visual_tokens=256)
SIDE_PX = 448
BATCH = 32
TOLERANCE: dict[str, float] = {"cpu": 1e-4, "cuda": 0.2}
"""Largest difference of z: fp32 on a CPU, bf16 on a GPU."""
Scores = np.ndarray[tuple[int], np.dtype[np.float32]]
Way = Callable[[], Scores]


class Task:
    """Queries, candidates, and the pairs of both `[P, 2]`, query by query. Each candidate has about as many pairs."""

    def __init__(self, num_queries: int, num_candidates: int, top_k: int) -> None:
        rng = np.random.default_rng(0)
        words = [" ".join(f"word{word}" for word in rng.integers(0, 90, 12)) for _ in range(num_queries)]
        self.queries = [DecodedInput(text) for text in words]
        self.candidates = [
            DecodedInput(visuals=(noise("image", 1, SIDE_PX, SIDE_PX, number),)) for number in range(num_candidates)
        ]
        chosen = [rng.choice(num_candidates, top_k, replace=False) for _ in range(num_queries)]
        self.pairs = np.array([(query, one) for query, some in enumerate(chosen) for one in some], np.int64)


def ways(folder: Path, task: Task, device: str) -> dict[str, Way]:
    """Return each way to the log-odds of all pairs, in their order."""
    reranker = rzen.load_reranker(folder, device=device)

    def grouped() -> Scores:
        order = np.lexsort((task.pairs[:, 0], task.pairs[:, 1]))
        scores = np.empty(len(task.pairs), np.float32)
        scores[order] = reranker.log_odds(reranker.encoder.encode(task.queries, task.candidates, task.pairs[order]))
        return scores

    def ungrouped() -> Scores:
        parts = []
        for start in range(0, len(task.pairs), BATCH):
            some = task.pairs[start : start + BATCH]
            numbers = np.arange(len(some))
            batch = reranker.encoder.encode(
                [task.queries[one] for one in some[:, 0]],
                [task.candidates[one] for one in some[:, 1]],
                np.stack([numbers, numbers], axis=1),
            )
            parts.append(reranker.log_odds(batch))
        return np.concatenate(parts)

    if not has_torchvision():
        register_processors()
    from sentence_transformers import CrossEncoder

    cross_encoder = CrossEncoder(str(folder), device=device)
    images = [Image.fromarray(one.visuals[0].frames[0]) for one in task.candidates]
    asked = [(task.queries[query].text, images[one]) for query, one in task.pairs.tolist()]

    def by_library() -> Scores:
        found: Scores = cross_encoder.predict(asked, batch_size=BATCH, activation_fn=nn.Identity())
        return found

    return {"ungrouped": ungrouped, "grouped": grouped, "sentence-transformers": by_library}


def report(options: argparse.Namespace) -> str:
    """Measures all, in Markdown. Raises `AssertionError` where scores differ."""
    torch.set_num_threads(1)
    task = Task(options.queries, options.candidates, options.top_k)
    dtype: Dtype = "bfloat16" if options.device == "cuda" else "float32"
    with tempfile.TemporaryDirectory() as name:
        base = options.model or f"{name}/base"
        if not options.model:
            words = [" ".join(f"word{word}" for word in range(90)), *["yes", "no"] * 20]
            build_tiny(Path(base), BACKBONE, words)
        export_reranker(base, None, Path(name) / "reranker", PROMPT, ExportOptions(dtype=dtype))
        timed = ways(Path(name) / "reranker", task, options.device)
        expected = timed["ungrouped"]()
        apart = {way: float(np.abs(score() - expected).max()) for way, score in timed.items()}
        assert max(apart.values()) < TOLERANCE[options.device], apart
        rates: dict[str, list[float]] = {way: [] for way in timed}
        for turn in range(options.turns):
            for way, score in timed.items():
                rates[way].append(len(task.pairs) / seconds_of(score, options.device))
                say(f"turn {turn + 1}, {way}: {rates[way][-1]:.1f} pairs/s")
    lines = [
        "# Re-ranking image candidates",
        "",
        f"{describe_machine(options.device)}. Median of {options.turns} turns (smallest to largest).",
        f"`python -m tests.benchmarks.rerank {' '.join(sys.argv[1:])}`; `rerank.py` tells how it is measured.",
        "",
        f"{options.queries} queries with {options.top_k} of {options.candidates} images of {SIDE_PX} x {SIDE_PX} pixels"
        f" each: an image is in {len(task.pairs) / options.candidates:.1f} pairs in the mean. {options.note}".strip(),
        "",
        "| way | pairs/s | of ungrouped | z differs by |",
        "|---|---:|---:|---:|",
    ]
    for way, own in rates.items():
        ratios = [rate / base for rate, base in zip(own, rates["ungrouped"], strict=True)]
        lines.append(f"| {way} | {spread(own, '.1f')} | {spread(ratios, '.2f')} | {apart[way]:.0e} |")
    return "\n".join([*lines, ""])


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.rerank", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--candidates", type=int, default=40, help="images (%(default)s)")
    parser.add_argument("--top-k", type=int, default=10, help="candidates of each query (%(default)s)")
    parser.add_argument("--turns", type=int, default=7, help="of each way (%(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(%(default)s)")
    parser.add_argument("--model", help="re-ranker to measure, a directory; a random one of a real class without it")
    parser.add_argument("--note", default="", help="a sentence for the report, such as what else ran")
    parser.add_argument("--write", action="store_true", help="keep the report beside this file")
    return parser.parse_args(words)


if __name__ == "__main__":
    chosen = arguments()
    show(report(chosen), __file__, write=chosen.write, on_gpu=chosen.device == "cuda")
