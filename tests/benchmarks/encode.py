"""Encoding a mixed corpus: rzen's way, the plain loop that pads to the longest, and sentence-transformers.

    python -m tests.benchmarks.encode --write                 half an hour on two cores; writes encode.md
    python -m tests.benchmarks.encode --items 120 --turns 1   a glance

The corpus is files: texts of 5 to 400 words, JPEGs of many sizes, pages of PDFs and clips. Each way decodes them from
disk, one after the other, and has one thread and the same backbone, random, of a real class.

    rzen                    what tasks and actors of the embedding engine do, in one process
    plain                   32 items in the order given, padded to the longest, through transformers
    sentence-transformers   `encode` of the exported model, in batches of 32; only where there is torchvision

Every turn is a process of its own, which loads the model, embeds a few items, and then is timed; the ways take turns.
Ratios are to `plain` of the same turn. Vectors are compared, and memory is the peak of the process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pymupdf
import torch
from PIL import Image

import rzen
from pipelines.benchmarks.custom import read_custom
from pipelines.config import MediaConfig
from pipelines.items.decode import ItemDecoder
from pipelines.items.types import Item
from pipelines.items.units import units
from pipelines.samples import DecodedInput
from rzen.config import ModelIdentity, PromptConfig, TinyBackbone
from rzen.export.export import ExportOptions, export_model, load_encoder
from rzen.inputs.processor import EncodedBatch, Processor
from rzen.model.backbone import build_tiny
from rzen.model.embedding_model import EmbeddingModel
from tests.benchmarks import plain
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import answer, say, show, spread

BACKBONE = TinyBackbone(hidden=128, layers=4, heads=4, vision_width=64, vision_depth=4, vocabulary=1024, init_std=0.02)
IDENTITY = ModelIdentity(prompt=PromptConfig(max_visual_tokens=256))
MEDIA = MediaConfig(frames=8, image_pixels=256 * 28 * 28, page_pixels=256 * 28 * 28)
BATCH, CHUNK_TOKENS, WARM_UP = 32, 4096, 8
Vectors = np.ndarray[Any, np.dtype[np.float32]]
Way = Callable[[Sequence[Item]], Vectors]


def draw(root: Path, num_items: int) -> None:
    """Of twenty items twelve are texts, five images, two pages and one a clip."""
    rng = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    for number in range(num_items):
        kind = ("text",) * 12 + ("image",) * 5 + ("document",) * 2 + ("video",)
        line: dict[str, Any] = {"_id": str(number)}
        match kind[number % 20]:
            case "text":
                low, high = (5, 30) if number % 20 < 9 else (100, 400)
                line["text"] = " ".join(f"word{word}" for word in rng.integers(0, 90, rng.integers(low, high)))
            case "image":
                _picture(root / f"{number}.jpg", rng, *rng.integers(60, 900, 2))
                line["image"] = f"{number}.jpg"
            case "document":
                with pymupdf.open() as document:
                    text = "\n".join(f"Line {row} of page {number}" for row in range(40))
                    document.new_page().insert_text((50, 50), text)
                    document.save(root / f"{number}.pdf")
                line["document"] = f"{number}.pdf"
            case "video":
                for frame in range(8):
                    _picture(root / f"{number}" / f"{frame}.jpg", rng, 112, 168)
                line["video"] = str(number)
        lines.append(line)
    rng.shuffle(lines)  # type: ignore[arg-type]
    (root / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "queries.jsonl").write_text('{"_id": "q", "text": "word1"}\n')
    (root / "qrels").mkdir()
    (root / "qrels/test.tsv").write_text("q\t0\t1\n")


def _picture(path: Path, rng: np.random.Generator, height_px: int, width_px: int) -> None:
    path.parent.mkdir(exist_ok=True)
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(small).resize((int(width_px), int(height_px)), Image.Resampling.BICUBIC).save(path)


def by_rzen(model: Path) -> Way:
    """In units of like items, in chunks of tokens."""
    embedder = rzen.load(model, chunk_tokens=CHUNK_TOKENS)
    decoder = ItemDecoder(MEDIA)

    def encode(items: Sequence[Item]) -> Vectors:
        found: dict[str, Vectors] = {}
        for unit in units(items):
            encoded = [embedder.processor.encode([decoder.input(item)]) for item in unit]
            vectors = embedder.embed_encoded(encoded)
            found |= {item.id: vector for item, vector in zip(unit, vectors, strict=True)}
        return np.stack([found[item.id] for item in items])

    return encode


def by_plain_loop(model: Path) -> Way:
    """Each batch padded to its longest."""
    processor, embedder = _loaded(model)
    backbone: Any = embedder.backbone

    def encode(items: Sequence[Item]) -> Vectors:
        found = []
        for inputs in _batches(items):
            encoded = EncodedBatch.concat([processor.encode([input]) for input in inputs])
            found.append(plain.vectors(backbone, plain.library_inputs(encoded, backbone.config)).numpy())
        return np.concatenate(found)

    return encode


def by_sentence_transformers(model: Path) -> Way:
    """What its user writes."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(model), device="cpu")

    def encode(items: Sequence[Item]) -> Vectors:
        inputs = [_input(input) for batch in _batches(items) for input in batch]  # all at once: it sorts by length
        vectors: Vectors = encoder.encode(inputs, batch_size=BATCH)
        return vectors

    return encode


def _input(input: DecodedInput) -> str | dict[str, Any]:
    if not input.visuals:
        return input.text
    (visual,) = input.visuals
    if visual.kind == "video":
        return {"video": visual.frames.transpose(0, 3, 1, 2)}
    return {"image": Image.fromarray(visual.frames[0])}


def _batches(items: Sequence[Item]) -> Iterator[list[DecodedInput]]:
    decoder = ItemDecoder(MEDIA)
    for start in range(0, len(items), BATCH):
        yield [decoder.input(item) for item in items[start : start + BATCH]]


def _loaded(model: Path) -> tuple[Processor, EmbeddingModel]:
    processor, embedder = load_encoder(str(model), "float32")
    return processor, embedder.requires_grad_(False).eval()


WAYS: dict[str, Callable[[Path], Way]] = {
    "plain": by_plain_loop,
    "rzen": by_rzen,
    "sentence-transformers": by_sentence_transformers,
}


def measure(way: str, folder: Path) -> None:
    """One turn, in this process; prints seconds and peak bytes, and leaves the vectors in the folder."""
    torch.set_num_threads(1)
    items = list(read_custom(folder / "corpus", "corpus").candidates)
    with torch.inference_mode():
        encode = WAYS[way](folder / "model")
        encode(items[:WARM_UP])
        begun_s = time.perf_counter()
        vectors = encode(items)
        seconds = time.perf_counter() - begun_s
    np.save(folder / f"{way}.npy", vectors)
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


def report(options: argparse.Namespace) -> str:
    """Measures all, in Markdown."""
    ways = [way for way in WAYS if way != "sentence-transformers" or importlib.util.find_spec("torchvision")]
    runs: dict[str, list[float]] = {way: [] for way in ways}
    peaks = dict.fromkeys(ways, 0.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "corpus").mkdir()
        draw(folder / "corpus", options.items)
        build_tiny(folder / "base", BACKBONE, [" ".join(f"word{word}" for word in range(90))])
        export_model(str(folder / "base"), None, folder / "model", IDENTITY, ExportOptions(dtype="float32"))
        for turn in range(options.turns):
            for way in ways:
                seconds, peak = answer("tests.benchmarks.encode", "--measure", way, name, OMP_NUM_THREADS="1")
                runs[way].append(options.items / seconds)
                peaks[way] = max(peaks[way], peak)
                say(f"turn {turn + 1}, {way}: {options.items / seconds:.1f} items/s")
        vectors = {way: np.load(folder / f"{way}.npy") for way in ways}
    lines = [
        "# Encoding a mixed corpus",
        "",
        f"{describe_machine('cpu')}; one thread for each way. Median of {options.turns} turns (smallest to largest).",
        f"`python -m tests.benchmarks.encode {' '.join(sys.argv[1:])}`; `encode.py` tells how it is measured.",
        "",
        f"{options.items} items: texts of 5 to 400 words, images of 60 to 900 pixels a side, pages, clips of 8 frames.",
        "",
        "| way | items/s | of plain | peak memory, GB | vectors differ from plain's by |",
        "|---|---:|---:|---:|---:|",
    ]
    for way in ways:
        ratios = [run / base for run, base in zip(runs[way], runs["plain"], strict=True)]
        apart = float(np.abs(vectors[way] - vectors["plain"]).max())
        lines.append(
            f"| {way} | {spread(runs[way], '.1f')} | {spread(ratios, '.2f')} | {peaks[way] / 1e9:.2f} | {apart:.0e} |"
        )
    return "\n".join([*lines, ""])


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.encode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=1200, help="of the corpus (1200)")
    parser.add_argument("--turns", type=int, default=5, help="of each way (5)")
    parser.add_argument("--write", action="store_true", help="replace encode.md beside this file")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    """The command line."""
    options = arguments()
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]))
        return
    show(report(options), __file__, write=options.write)


if __name__ == "__main__":
    main()
