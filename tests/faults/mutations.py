"""Thousands of damaged files of each kind: each is used, counted by a reason, or one clear error. Run by hand:

    python -m tests.faults.mutations [FILES] [SEED] > tests/faults/mutations.md

An exception that is none of these, or a file that takes longer than its limit, ends the run with a traceback.
"""

from __future__ import annotations

import io
import json
import random
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import av
import numpy as np
from PIL import Image
from reportlab.pdfgen.canvas import Canvas

from jobs.spec.load import check, read_document
from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.media.decode import Decoder
from pipelines.media.documents import page_texts
from pipelines.media.sandbox import Sandbox
from pipelines.shards.external import scan
from pipelines.shards.mapping import SampleMapper, SourceMapping
from tests.cases.test_safety_stored import KINDS
from tests.paths import ROOT

MEDIA = MediaConfig(max_cpu_s=3, frames=4, page_pixels=50_000, max_pixels=4_000_000)
LIMIT_S = 30.0
"""Most seconds of one file: the wall time that a sandbox grants with `max_cpu_s` of 3."""
SHARES = {"image": 0.3, "video": 0.15, "document": 0.15, "tar": 0.15, "stored JSON": 0.15, "YAML": 0.1}
_NUMBERS = (
    b"\x00" * 4,
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xf0",
    b"\x00\x00\x00\x01",
    b"\x80\x00\x00\x00",
)


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return a copy with one to four damages: cuts, changed bits, numbers, copies, gaps, parts of another file."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not found:
            break
        at, length = rng.randrange(len(found)), rng.choice((1, 2, 4, 16, 256, 4096))
        match rng.randrange(8):
            case 0:
                del found[at:]
            case 1:
                found[at] ^= 1 << rng.randrange(8)
            case 2:
                found[at : at + 4] = rng.choice(_NUMBERS)
            case 3:
                found[at:at] = found[at : at + length]
            case 4:
                del found[at : at + length]
            case 5:
                found[at : at + length] = bytes(length)
            case 6:
                found[at : at + length] = rng.randbytes(min(length, len(found) - at))
            case _:
                start = rng.randrange(len(other))
                found[at : at + length] = other[start : start + length]
    return bytes(found)


def picture(number: int) -> Image.Image:
    """Return a small picture with structure, of a size of its own."""
    rng = np.random.default_rng(number)
    blocks = rng.integers(0, 255, (4, 6, 3), np.uint8)
    return Image.fromarray(np.kron(blocks, np.ones((9 + number, 8, 1), np.uint8)))


def images() -> list[bytes]:
    """Return one picture in each format and mode."""
    found = []
    for number, (form, mode) in enumerate(
        [
            *((form, "RGB") for form in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")),
            *(("PNG", mode) for mode in ("RGBA", "L", "P", "1", "I;16")),
            *(("TIFF", mode) for mode in ("L", "CMYK", "I;16")),
            ("JPEG", "CMYK"),
        ]
    ):
        sink = io.BytesIO()
        some = picture(number)
        some = some.convert("L").convert("I").convert("I;16") if mode == "I;16" else some.convert(mode)
        some.save(sink, form, **({"compression": "tiff_lzw"} if form == "TIFF" and mode == "L" else {}))
        found.append(sink.getvalue())
    return found


def videos() -> list[bytes]:
    """Return one clip in each container."""
    found = []
    for container, codec in (
        *(("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")),
        *(("mpegts", "mpeg2video"), ("mp4", "mpeg4"), ("flv", "flv1")),
    ):
        sink = io.BytesIO()
        with av.open(sink, "w", format=container) as target:
            stream = target.add_stream(codec, rate=24)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for number in range(20):
                frame = av.VideoFrame.from_ndarray(np.asarray(picture(number % 5).resize((64, 48))), format="rgb24")
                target.mux(stream.encode(frame))
            target.mux(stream.encode(None))
        found.append(sink.getvalue())
    return found


def documents() -> list[bytes]:
    """Return PDFs with text, drawings, a picture, several pages, and with and without compression."""
    found = []
    for compressed in (0, 1):
        sink = io.BytesIO()
        canvas = Canvas(sink, pagesize=(300, 400), pageCompression=compressed)
        for number in range(3):
            canvas.drawString(40, 350, f"page {number} with words on it")
            canvas.circle(150, 200, 30 + number)
            canvas.drawInlineImage(picture(number), 40, 40, 60, 60)
            canvas.showPage()
        canvas.save()
        found.append(sink.getvalue())
    return found


def tars() -> list[bytes]:
    """Return shards of pictures with captions, in each format of tar."""
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w", format=form) as tar:
            for number in range(6):
                name = f"{number:03}{'x' * (120 if number == 5 and form != tarfile.USTAR_FORMAT else 0)}"
                caption = json.dumps({"caption": f"a caption {number}"}).encode()
                for suffix, data in (("jpg", images()[0]), ("json", caption)):
                    entry = tarfile.TarInfo(f"{name}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        found.append(sink.getvalue())
    return found


@dataclass(slots=True)
class Outcomes:
    """What became of the files of one kind."""

    used: int = 0
    counted: Counter[str] = field(default_factory=Counter)
    errors: int = 0
    slowest_s: float = 0.0


class Mutations:
    """Tries damaged files. `decoder` decodes as the feed does: images in this process, the others in the child."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._rng = random.Random(seed)
        self._decoder, self._sandbox = Decoder(MEDIA), Sandbox(MEDIA)
        self._readers: dict[str, Callable[[bytes], Iterator[str]]] = {
            **{kind: self._media(kind) for kind in ("image", "video", "document")},
            "tar": self._tar,
            "YAML": self._yaml,
        }
        self._seeds = {
            **{"image": images(), "video": videos(), "document": documents(), "tar": tars()},
            "YAML": [path.read_bytes() for path in sorted((ROOT / "jobs").glob("*.yaml"))],
        }

    def run(self, kind: str, count: int) -> Outcomes:
        """Try `count` files of a kind. Raises what is neither a `BadMedia` nor a `UserError`, and for a slow file."""
        outcomes = Outcomes()
        for _ in range(count):
            began_s = time.monotonic()
            try:
                reasons = list(self._try(kind))
                outcomes.counted.update(reasons)
                outcomes.used += not reasons
            except UserError as error:
                if "\n" in error.problem or not error.place or not error.problem:
                    raise AssertionError(f"an error of several lines, or without place or problem: {error}") from error
                outcomes.errors += 1
            taken_s = time.monotonic() - began_s
            if taken_s > LIMIT_S:
                raise AssertionError(f"a file of kind {kind} took {taken_s:.1f} s")
            outcomes.slowest_s = max(outcomes.slowest_s, taken_s)
        return outcomes

    def close(self) -> None:
        """End the children."""
        self._decoder.close()
        self._sandbox.close()

    def _try(self, kind: str) -> Iterator[str]:
        """Yield the reasons for which a file, or parts of it, are not used."""
        if kind == "stored JSON":
            return self._stored()
        seeds = self._seeds[kind]
        return self._readers[kind](mutated(self._rng.choice(seeds), self._rng.choice(seeds), self._rng))

    def _media(self, kind: str) -> Callable[[bytes], Iterator[str]]:
        def read(data: bytes) -> Iterator[str]:
            try:
                visual = self._decoder.member(kind, data)  # type: ignore[arg-type]
                assert visual.frames.dtype == np.uint8
                assert visual.frames.ndim == 4
                if kind == "document":
                    self._sandbox.call(page_texts, data, MEDIA)
            except BadMedia as bad:
                yield bad.reason

        return read

    def _tar(self, data: bytes) -> Iterator[str]:
        mapping = SourceMapping.model_validate({"query": {"text": "json:caption"}})
        _, counts, _ = scan(data, SampleMapper("s", mapping))
        assert counts.seen == counts.accepted + sum(counts.rejected.values())
        yield from counts.rejected
        yield from counts.findings

    def _yaml(self, data: bytes) -> Iterator[str]:
        path = self._folder / "a.yaml"
        path.write_bytes(data)
        check(read_document(path))
        yield from ()

    def _stored(self) -> Iterator[str]:
        """Read a file next to undamaged files of the other kinds."""
        root = self._folder / "store"
        name, content, read = KINDS[self._rng.choice([kind for kind in KINDS if kind != "dataset.json"])]
        for path, whole, _ in KINDS.values():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(whole)
        (root / name).write_bytes(mutated(content, content, self._rng))
        read(root / name)
        yield from ()


def table(found: dict[str, Outcomes], counts: dict[str, int]) -> str:
    """Return the outcomes as a table of Markdown. Parts of a tar are counted for themselves."""
    lines = ["| kind | files | used whole | counted | one error | slowest, s | most frequent reasons |"]
    lines.append("|---|---:|---:|---:|---:|---:|---|")
    for kind, some in found.items():
        reasons = ", ".join(f"`{reason}` {count:,}" for reason, count in some.counted.most_common(4))
        counted = counts[kind] - some.used - some.errors
        cells = [
            kind,
            f"{counts[kind]:,}",
            f"{some.used:,}",
            f"{counted:,}",
            f"{some.errors:,}",
            f"{some.slowest_s:.1f}",
        ]
        lines.append(f"| {' | '.join([*cells, reasons])} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Print the table."""
    files, seed = (int(text) for text in [*arguments, *("10000", "0")[len(arguments) :]][:2])
    counts = {kind: round(share * files) for kind, share in SHARES.items()}
    found: dict[str, Outcomes] = {}
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rzen-mutations-") as folder:
        mutations = Mutations(Path(folder), seed)
        try:
            for kind, count in counts.items():
                found[kind] = mutations.run(kind, count)
        finally:
            mutations.close()
    print("# Damaged files, by kind\n")
    print(
        f"`python -m tests.faults.mutations {files} {seed}`, {date.today()}, {time.monotonic() - began_s:.0f} s on two"
    )
    print("shared cores. No file ended a process or took longer than its limit, and none gave a traceback.\n")
    print(table(found, counts))


if __name__ == "__main__":
    main(sys.argv[1:])
