"""Real corpora from Debian's packages, ingested: what becomes of every sample, and how long it takes.

    python -m tests.benchmarks.corpora --write           fetches 0.4 GB; half an hour; writes corpora.md
    python -m tests.benchmarks.corpora --only pages      one of them

    stamps     stamps of Tux Paint (GPL-2): pictures with descriptions in 78 languages, a source for each language
    clipart    Open Clip Art Library (public domain): pictures with titles and keywords
    pages      manuals of TeX Live: PDFs, whose text layer is the caption of each page

Needs apt and dpkg. Packages are unpacked into the scratch folder, and not installed. Nothing of them is in this
repository.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import yaml

from jobs.cli import main as rzen
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import ROOT, say, show

SCRATCH = Path("runs/corpora")
_SHOWN = 6  # sources of a corpus, and reasons, in the table
_LANGUAGE = re.compile(r"^([a-z]{2,3}(?:_[A-Z]{2})?(?:@\w+)?)\.utf8=(.+)$")
_TITLE = re.compile(r"<dc:title>(?:\s*<[^>]+>)*([^<]+)")
_KEYWORDS = re.compile(r"<dc:subject>(.*?)</dc:subject>", re.DOTALL)
_ITEM = re.compile(r"<rdf:li[^>]*>([^<]+)</rdf:li>")


@dataclass(frozen=True, slots=True)
class Corpus:
    """Packages, and what of them is ingested: `settings` returns settings of a job of kind `ingest`."""

    packages: tuple[str, ...]
    license: str
    settings: Callable[[Path, Path], dict[str, Any]]
    """Takes the folder of the unpacked files, and a folder for a table."""


def stamps(files: Path, out: Path) -> dict[str, Any]:
    """Write a row for each description of a picture. The first line is in English, the others name their language."""
    root = files / "usr/share/tuxpaint/stamps"

    def rows() -> Iterator[dict[str, str]]:
        for path in sorted(root.rglob("*.txt")):
            picture = path.with_suffix(".png")
            if not picture.exists():  # a drawing
                continue
            image = picture.relative_to(root).as_posix()
            first, *others = path.read_text("utf-8", "replace").splitlines()
            yield {"image": image, "caption": first.strip(), "language": "en"}
            for language, caption in (found.groups() for found in map(_LANGUAGE.match, others) if found):
                yield {"image": image, "caption": caption.strip(), "language": language.replace("@", "-")}

    source = {"query": {"text": "caption"}, "positive": {"media": "image"}, "split_by": "language"}
    return {"sources": {"stamps": source | _table(out / "stamps.jsonl", rows(), root)}}


def clipart(files: Path, out: Path) -> dict[str, Any]:
    """Write a row for each picture, with the title and the keywords of its drawing."""
    root = files / "usr/share/openclipart"

    def rows() -> Iterator[dict[str, str]]:
        for path in sorted((root / "png").rglob("*.png")):
            drawing = root / "svg" / path.relative_to(root / "png").with_suffix(".svg")
            text = drawing.read_text("utf-8", "replace") if drawing.exists() else ""
            titles = _TITLE.search(text)
            keywords = _ITEM.findall("".join(_KEYWORDS.findall(text)))
            words = [unescape(word).strip() for word in [*(titles.groups() if titles else ()), *keywords]]
            yield {"image": path.relative_to(root).as_posix(), "caption": ", ".join(dict.fromkeys(filter(None, words)))}

    source = {"query": {"text": "caption"}, "positive": {"media": "image"}}
    return {"sources": {"clipart": source | _table(out / "clipart.jsonl", rows(), root)}}


def pages(files: Path, out: Path) -> dict[str, Any]:
    """Take the folder as it is, with all files that are no PDFs."""
    return {"input": str(files / "usr/share/doc/texlive-doc"), "keep_uncaptioned": True}


CORPORA = {
    "stamps": Corpus(("tuxpaint-stamps-default",), "GPL-2", stamps),
    "clipart": Corpus(("openclipart-png", "openclipart-svg"), "public domain", clipart),
    "pages": Corpus(("texlive-latex-base-doc",), "of each manual", pages),
}


def _table(path: Path, rows: Iterator[dict[str, str]], root: Path) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return {"table": str(path), "media_root": str(root), "task": "text_image"}


def fetch(package: str, folder: Path, debs: Path) -> str:
    """Download a package with apt and unpack it into a folder, once. Return its version."""
    debs.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(debs.glob(f"{package}_*.deb"))):
        subprocess.run(["apt-get", "download", package], cwd=debs, check=True, stdout=subprocess.DEVNULL)
        found = sorted(debs.glob(f"{package}_*.deb"))
    subprocess.run(["dpkg", "-x", str(found[-1]), str(folder)], check=True)
    asked = ["dpkg-deb", "--field", str(found[-1]), "Version"]
    return subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def ingested(name: str, scratch: Path) -> str:
    """Fetch and ingest a corpus. Return its section of the report."""
    corpus, folder = CORPORA[name], scratch / name
    folder.mkdir(parents=True, exist_ok=True)
    versions = [f"`{package}` {fetch(package, folder / 'files', scratch / 'debs')}" for package in corpus.packages]
    settings = corpus.settings(folder / "files", folder)
    job = folder / "ingest.yaml"
    spec = {"kind": "ingest", "out": str(folder / "data"), "held_out_fraction": 0.1, "reuse": False}
    job.write_text(yaml.safe_dump(spec | settings, sort_keys=False))
    say(f"{name}: {job}")
    started_s = time.monotonic()
    if status := rzen(["run", str(job)]):
        raise SystemExit(status)
    minutes = (time.monotonic() - started_s) / 60
    return section(name, corpus, versions, json.loads((folder / "data/report.json").read_text()), minutes)


def section(name: str, corpus: Corpus, versions: list[str], report: dict[str, Any], minutes: float) -> str:
    """Return what became of the samples of a corpus, in Markdown."""
    lines = [f"## {name}", "", f"{', '.join(versions)}; license: {corpus.license}.", ""]
    lines += ["| split or reason | samples | in |", "|---|---:|---|"]
    for split, sources in report["accepted"].items():
        largest = sorted(sources.items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{source} {count:,}" for source, count in largest[:_SHOWN])
        more = f", and {len(largest) - _SHOWN} more sources" if len(largest) > _SHOWN else ""
        lines.append(f"| {split} | {sum(sources.values()):,} | {shown}{more} |")
    for reason, count in sorted(report["rejected"].items(), key=lambda item: -item[1]):
        lines.append(f"| skipped: `{reason}` | {count:,} | |")
    size = f"{report['num_bytes'] / 1e6:,.0f} MB of shards"
    return "\n".join([*lines, "", f"{size} in {minutes:.1f} minutes.", ""])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CORPORA, help="one corpus (all)")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help=f"folder of packages and datasets ({SCRATCH})")
    parser.add_argument("--write", action="store_true", help="replace corpora.md next to this file")
    options = parser.parse_args()
    scratch = options.scratch.resolve() if options.scratch.is_absolute() else (ROOT / options.scratch)
    sections = [ingested(name, scratch) for name in ([options.only] if options.only else CORPORA)]
    head = f"""# Real corpora, ingested

{describe_machine()}. `python -m tests.benchmarks.corpora --write`; `corpora.py` says what they are.
"""
    show("\n".join([head, *sections]), __file__, write=options.write)


if __name__ == "__main__":
    main()
