"""How well curation finds planted duplicates and leaks, and what it costs.

    python -m tests.benchmarks.curate            prints the tables: 90 s of CPU, 1 GB
    python -m tests.benchmarks.curate --write    and replaces tests/benchmarks/curate.md

5% of the samples are near duplicates of others, and 1% show or say what a held-out split has. Recall is the share of
them that is found. Precision is the share of what is left out that was planted.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from pipelines.config import MediaConfig
from pipelines.curate.exact import find_exact
from pipelines.curate.features import FAMILIES
from pipelines.curate.hamming import near_pairs
from pipelines.curate.leakage import find_leaks
from pipelines.curate.load import load_evaluation, load_samples
from pipelines.curate.near import find_near
from pipelines.curate.samples import Verdicts
from pipelines.curate.settings import ExactRule, LeakageRule, NearRule
from pipelines.curate.texts import min_hashes, normalized
from pipelines.media.decode import decode_pixels
from pipelines.media.documents import extract_page
from pipelines.storage.location import open_store
from pipelines.synthetic.clips import all_clips, draw_clip, encode_clip
from pipelines.synthetic.documents import all_pages, draw_document
from pipelines.synthetic.scenes import all_scenes, draw_scene
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import show
from tests.curation import SETTINGS, Pair, cropped, edited, encoded, featured, publish

MEDIA = MediaConfig()
Change = Callable[[Image.Image], Image.Image]


def _through(format: str, quality: int) -> Change:
    def change(image: Image.Image) -> Image.Image:
        return Image.open(io.BytesIO(encoded(image, format, quality))).convert("RGB")

    return change


def _scaled(factor: float) -> Change:
    return lambda image: image.resize((round(image.width * factor), round(image.height * factor)))


CHANGES: dict[str, Change] = {
    "JPEG 50": _through("JPEG", 50),
    "JPEG 30": _through("JPEG", 30),
    "WebP 40": _through("WEBP", 40),
    "half the size": _scaled(0.5),
    "1.3 times the size": _scaled(1.3),
    "cropped by 2%": lambda image: cropped(image, 0.02),
    "cropped by 4%": lambda image: cropped(image, 0.04),
}
NO_CROPS = [name for name in CHANGES if "cropped" not in name]


@dataclass
class Planted:
    """Samples of each source, and for each kind of plant the numbers of its samples and of their originals."""

    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    copies: dict[tuple[str, str], list[tuple[int, int]]] = field(default_factory=dict)
    held_out: dict[str, list[Pair]] = field(default_factory=dict)
    leaks: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def plant(self, source: str, kind: str, original: int, pair: Pair) -> None:
        """Add a near duplicate of a sample."""
        self.copies.setdefault((source, kind), []).append((len(self.pairs[source]), original))
        self.pairs[source].append(pair)

    def leak(self, source: str, kind: str, pair: Pair) -> None:
        """Add a sample that shows or says what the held-out split has."""
        self.leaks.setdefault((source, kind), []).append(len(self.pairs[source]))
        self.pairs[source].append(pair)


def plant(sizes: Mapping[str, int], seed: int = 0) -> Planted:
    """Return datasets of these sizes with 5% near duplicates and 1% leaks."""
    found, rng = Planted(), Random(seed)
    for source, make in (("pictures", _pictures), ("pages", _pages), ("clips", _clips)):
        count = sizes[source]
        num_copies, num_leaks = max(1, count // 20), max(1, count // 100)
        num_own = count - num_copies - num_leaks
        texts, draw, write = make(num_own + num_leaks, rng)
        found.pairs[source] = [(texts[n], write(draw(n), None)) for n in range(num_own)]
        held_out = [(f"held out {n}", write(draw(num_own + n), None)) for n in range(num_leaks)]
        found.held_out[source] = held_out
        names = list(CHANGES) if source == "pictures" else NO_CROPS
        for number in range(num_copies):
            name, original = names[number % len(names)], rng.randrange(num_own)
            text = edited(texts[original], rng) if number % 2 else texts[original]
            found.plant(source, name, original, (text, write(draw(original), CHANGES[name])))
        for number in range(num_leaks):
            name = names[number % len(names)]
            found.leak(source, name, (f"leaks {number}", write(draw(num_own + number), CHANGES[name])))
    _texts(found, sizes["texts"], rng)
    return found


_Made = tuple[Sequence[str], Callable[[int], list[Image.Image]], Callable[[list[Image.Image], Change | None], bytes]]


def _pictures(count: int, rng: Random) -> _Made:
    scenes = rng.sample(all_scenes(), count)

    def write(frames: list[Image.Image], change: Change | None) -> bytes:
        return encoded(change(frames[0]), "PNG") if change else encoded(frames[0], quality=90)

    return [one.wordings()[0] for one in scenes], lambda n: [draw_scene(scenes[n], 160, Random(str(n)))], write


def _pages(count: int, rng: Random) -> _Made:
    """Pages of one layout: another topic, chart or color. Copies are pictures of them."""
    pages = rng.sample(all_pages(), count)
    drawn: dict[int, bytes] = {}

    def draw(number: int) -> list[Image.Image]:
        pdf = draw_document(pages[number : number + 1], "Report", Random(str(number)), "pymupdf")
        drawn[number] = extract_page(pdf, 0, MEDIA)
        return [Image.fromarray(decode_pixels("document", drawn[number], MEDIA)[0][0])]

    def write(frames: list[Image.Image], change: Change | None) -> bytes:
        return encoded(change(frames[0]), "WEBP", 80) if change else drawn[max(drawn)]

    return [one.wordings()[0] for one in pages], draw, write


def _clips(count: int, rng: Random) -> _Made:
    clips = rng.sample(all_clips(), count)

    def write(frames: list[Image.Image], change: Change | None) -> bytes:
        changed = [change(frame) if change else frame for frame in frames]
        return encode_clip([frame.crop((0, 0, frame.width // 2 * 2, frame.height // 2 * 2)) for frame in changed])

    return [one.wordings()[0] for one in clips], lambda n: draw_clip(clips[n], 112, 8, Random(str(n))), write


def _texts(found: Planted, count: int, rng: Random) -> None:
    """Passages of 60 words from a vocabulary of 2,000. Copies have another case and three other letters."""
    vocabulary = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(2, 9))) for _ in range(2000)]
    num_copies, num_leaks = count // 20, count // 100
    passages = [" ".join(rng.choices(vocabulary, k=60)) for _ in range(count - num_copies)]
    num_own = len(passages) - num_leaks
    found.pairs["texts"] = [(passages[n], f"title {n} {rng.choice(vocabulary)}") for n in range(num_own)]
    found.held_out["texts"] = [(passages[num_own + n], f"answer {n}") for n in range(num_leaks)]
    for _ in range(num_copies):
        original = rng.randrange(num_own)
        text, title = found.pairs["texts"][original]
        found.plant("texts", "three letters", original, (edited(text, rng, 3), str(title).upper()))
    for number in range(num_leaks):
        words = passages[num_own + number].split()
        start = rng.randrange(30)
        own = " ".join(rng.choices(vocabulary, k=20))
        quote = " ".join(words[start : start + 20])
        found.leak("texts", "20 of 60 words", (f"{own} {quote} {own}", f"reply {number}"))


def measure(found: Planted) -> tuple[list[str], dict[str, float]]:
    """Return a row of the table for each kind of plant, and the seconds of each step."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="curate-") as place:
        folder = Path(place)
        inputs = publish(folder, found.pairs)
        held_out = publish(folder, found.held_out, "held_out")
        cache = open_store(str(folder / "cache"))
        begun_s = time.perf_counter()
        featured(folder, [*inputs, *held_out])
        seconds["features"] = time.perf_counter() - begun_s
        samples = load_samples(inputs, FAMILIES, SETTINGS, cache)
        verdicts = Verdicts.of(len(samples))
        verdicts.add(find_exact(samples, verdicts.keep, ExactRule(), "all"))
        begun_s = time.perf_counter()
        near = find_near(samples, verdicts.keep, NearRule(), "all")
        seconds["near"] = time.perf_counter() - begun_s
        begun_s = time.perf_counter()
        everything = np.ones(len(samples), np.bool_)
        rule = LeakageRule(ngram_words=SETTINGS.ngram_words, min_words=SETTINGS.min_words)
        evaluation = [("held_out", held_out)]
        leaks = find_leaks(samples, everything, lambda: load_evaluation(evaluation, SETTINGS, cache), rule)
        seconds["leakage"] = time.perf_counter() - begun_s
    start_of = dict(zip(samples.sources, samples.starts.tolist(), strict=False))
    rows = []
    copies = {
        (source, kind): [(start_of[source] + copy, start_of[source] + original) for copy, original in some]
        for (source, kind), some in found.copies.items()
    }
    original_of = {copy: original for some in copies.values() for copy, original in some}
    # Of a group of copies, the largest stays. So the original may be the one that is left out.
    joined = [(drop.sample, drop.like) for drop in near if isinstance(drop.like, int)]
    right = [pair for pair in joined if len({original_of.get(number, number) for number in pair}) == 1]
    touched = {number for pair in right for number in pair}
    for (source, kind), some in copies.items():
        recall = sum(copy in touched for copy, _ in some) / len(some)
        rows.append(f"| {source} | near duplicates, {kind} | {len(some)} | {recall:.3f} | |")
    recall, precision = len(right) / len(original_of), len(right) / len(joined)
    rows.append(f"| all | near duplicates | {len(original_of)} | {recall:.3f} | {precision:.3f} |")
    leaked = {drop.sample for drop in leaks}
    planted: set[int] = set()
    for (source, kind), numbers in found.leaks.items():
        mine = {start_of[source] + number for number in numbers}
        planted |= mine
        rows.append(f"| {source} | leaks, {kind} | {len(mine)} | {len(mine & leaked) / len(mine):.3f} | |")
    precision = len(leaked & planted) / max(1, len(leaked))
    rows.append(f"| all | leaks | {len(planted)} | {len(planted & leaked) / len(planted):.3f} | {precision:.3f} |")
    seconds["samples"] = float(len(samples))
    return rows, seconds


def scale(counts: Sequence[int]) -> list[str]:
    """Return a row for each number of random hashes: the seconds in which all pairs within 10 bits are found."""
    rows = []
    for count in counts:
        hashes = np.random.default_rng(0).integers(0, 1 << 63, count, dtype=np.uint64) * np.uint64(2)
        begun_s = time.perf_counter()
        num_pairs = sum(len(left) for left, _ in near_pairs(hashes, 10))
        rows.append(f"| {count:,} hashes, all pairs within 10 bits | {time.perf_counter() - begun_s:.1f} |")
        assert num_pairs < count
    texts = [normalized(" ".join(Random(n).choices(["one", "two", "red", "blue", "dog"], k=40))) for n in range(5000)]
    begun_s = time.perf_counter()
    min_hashes(texts)
    rows.append(f"| {len(texts):,} texts of 40 words, MinHash | {time.perf_counter() - begun_s:.1f} |")
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace curate.md next to this file")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the numbers of samples")
    options = parser.parse_args()
    base = {"pictures": 4000, "pages": 400, "clips": 200, "texts": 4000}
    sizes = {name: round(count * options.scale) for name, count in base.items()}
    rows, seconds = measure(plant(sizes))
    num_samples = int(seconds.pop("samples"))
    table = [
        "# Curation: planted near duplicates and leaks",
        "",
        f"{describe_machine()}. `python -m tests.benchmarks.curate --write`",
        "",
        f"{num_samples:,} samples: "
        + ", ".join(f"{count:,} {name}" for name, count in sizes.items())
        + ". The pictures,",
        "pages and clips are those of the synthetic corpus. Half of the copies have an edited text, too.",
        "",
        "| source | planted | number | recall | precision |",
        "|---|---|---:|---:|---:|",
        *rows,
        "",
        "| step, one process | seconds |",
        "|---|---:|",
        *(f"| {name} of {num_samples:,} samples | {value:.1f} |" for name, value in seconds.items()),
        *scale([round(count * options.scale) for count in (100_000, 300_000)]),
    ]
    show("\n".join(table) + "\n", __file__, write=options.write)


if __name__ == "__main__":
    main()
