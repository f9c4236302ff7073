"""Which effects of the first corpus of the evidence carry over to another one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.evidence_cells import ALPHA, PUBLISHED, Results
from tests.benchmarks.runs import points, table

FIRST = Path(__file__).with_name("evidence.md")
"""Report of the first corpus."""
VERDICTS = {
    "carries over": "both intervals exclude 0, on the same side",
    "reverses": "both intervals exclude 0, on opposite sides",
    "first only": "only that of the first corpus excludes 0",
    "here only": "only that of this corpus excludes 0",
    "not shown": "neither excludes 0",
}
"""Verdict -> when it is given. Registered before the first run of a test seed."""


@dataclass(frozen=True)
class Effect:
    """An effect that both corpora have, with its points on each."""

    title: str
    data: str
    temperature: str
    first: str
    here: str

    @property
    def verdict(self) -> str:
        """Return whether it carries over."""
        return verdict(self.first, self.here)


def compare(results: Results) -> list[str]:
    """Return the lines of the report: a sentence for each effect, and a table of all."""
    effects = list(_effects(results))
    counts = [f"{name} {sum(effect.verdict == name for effect in effects)}" for name in VERDICTS]
    rows = [[some.title, some.data, some.temperature, some.first, some.here, some.verdict] for some in effects]
    return [
        "## Which findings carry over",
        "",
        f"Both corpora have {len(effects)} effects: {', '.join(counts)}. The verdicts were registered with the cells."
        f" `best, {results.corpus.second:g}` is the best temperature of each arm on the first corpus, and"
        f" {results.corpus.second:g} on this one.",
        "",
        *(f"* {name}: {text}." for name, text in VERDICTS.items()),
        "",
        *(f"* **{title}** {_sentence(effects, title)}" for title in dict.fromkeys(some.title for some in effects)),
        "",
        *table(["effect", "data", "temperature", "first corpus", "this corpus", "verdict"], rows),
    ]


def _sentence(effects: list[Effect], title: str) -> str:
    parts = []
    for name in VERDICTS:
        found = [some for some in effects if (some.title, some.verdict) == (title, name)]
        if found:
            parts.append(f"{name}: {', '.join(f'{some.data} ({some.temperature})' for some in found)}")
    return "; ".join(parts) + "."


def _effects(results: Results) -> Iterator[Effect]:
    corpus, first = results.corpus, read_tables(FIRST.read_text("utf-8"))
    for tuned in (False, True):
        temperature = f"best, {corpus.second:g}" if tuned else f"{PUBLISHED:g}"
        for contrast in corpus.contrasts():
            for data in corpus.contents:
                here = points(results.contrast(contrast, data, tuned))
                there = first.get(("best" if tuned else "published", contrast.title, data))
                if here and there:
                    yield Effect(contrast.title, data, temperature, there, here)
    for alpha in (0.0, ALPHA):
        for temperature in map(str, corpus.higher):
            title = f"{temperature} instead of {PUBLISHED}, alpha {alpha:g}"
            for data in corpus.contents:
                here = points(results.temperature(data, alpha, float(temperature)))
                yield Effect(title, data, temperature, first["published", title, data], here)


def verdict(first: str, here: str) -> str:
    """Return whether an effect carries over, from the points of both reports, bold where 0 is outside."""
    signs = [text[2] if text.startswith("**") else "" for text in (first, here)]
    if all(signs):
        return "carries over" if signs[0] == signs[1] else "reverses"
    if any(signs):
        return "first only" if signs[0] else "here only"
    return "not shown"


def read_tables(text: str) -> dict[tuple[str, str, str], str]:
    """Read a report: (`published` or `best` temperatures, effect, data) -> points with their interval."""
    found: dict[tuple[str, str, str], str] = {}
    where, head = "published", [""]
    for line in text.splitlines():
        if line.startswith("## "):
            where, head = "best" if "best temperature" in line else "published", [""]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith(("| contrast", "| without ids")):
            head = cells
        elif line.startswith("| ") and len(head) > 1:
            found |= {(where, cells[0], data): cell for data, cell in zip(head[1:], cells[1:], strict=True) if cell}
    return found
